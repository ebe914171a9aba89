"""Settings of scheduled retraining: drift, decision and gate; inbox, triggers, limits and hooks. Torch-free."""
