"""Lightning: module, data, schedules, callbacks, logger, checkpoints, and one stage's story."""
