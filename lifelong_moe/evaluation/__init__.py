"""Held-out losses, routing statistics and probes of a model."""
