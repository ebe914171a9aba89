"""Checkpoints of transformers in and out."""
