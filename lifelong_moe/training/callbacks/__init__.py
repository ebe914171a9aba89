"""Lightning callbacks, logger and checkpoint format of the training loop."""
