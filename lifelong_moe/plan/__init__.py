"""A configuration resolved into stages: methods, specifications, keys, sizes, FLOPs, disk, memory; advice. No torch."""
