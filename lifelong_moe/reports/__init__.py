"""Reports of what was measured: a run's loss matrix, comparisons of runs, inspections of experts."""
