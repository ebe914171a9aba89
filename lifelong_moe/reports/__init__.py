"""What is said of a run after it was measured: loss matrices, comparisons, inspections."""
