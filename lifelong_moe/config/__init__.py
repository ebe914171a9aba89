"""A run's configuration: its sections composed, its rules, and how it is read from YAML and overrides. Torch-free."""
