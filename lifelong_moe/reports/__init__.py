"""Loss matrices, comparisons and inspections, from measurements."""
