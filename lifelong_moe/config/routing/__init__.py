"""Settings of routing: keys that every mode shares, and a dataclass for each mode. Torch-free."""
