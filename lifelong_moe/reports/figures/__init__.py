"""Pictures of runs, comparisons and experts."""
