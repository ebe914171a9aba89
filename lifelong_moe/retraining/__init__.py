"""Drift, decision and gate of scheduled retraining, from numbers alone."""
