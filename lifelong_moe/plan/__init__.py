"""A configuration resolved into stages: methods, specifications, keys, parameters, FLOPs, disk, advice. Torch-free."""
