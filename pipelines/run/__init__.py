"""`lifelong-moe plan`, `prepare` and `run`: a run's stages, from configuration to report."""
