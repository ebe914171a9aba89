"""The training loop of a stage's phases: Lightning module, data module, optimizer, workers."""
