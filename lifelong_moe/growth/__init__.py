"""Freeze a model's old experts, add and initialize new ones; remove and merge experts."""
