"""Text that arrives for retraining: the inbox, and the batches that are kept of it."""
