"""Conversion to and from Mixtral checkpoints of transformers."""
