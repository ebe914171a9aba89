"""The training loop of a phase: Lightning module, data module, optimizer, schedule, worker processes."""
