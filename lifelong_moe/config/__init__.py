"""A run's configuration: a dataclass for each section, rules across sections, YAML and overrides. Torch-free."""
