"""Lightning callbacks, logger and checkpoint plugin of a stage's training loop."""
