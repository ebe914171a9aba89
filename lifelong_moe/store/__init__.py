"""What was committed: stages, runs and their versions, evaluations; and what nothing refers to any more."""
