"""Committed stages, runs and their versions, evaluations, lineage, garbage collection."""
