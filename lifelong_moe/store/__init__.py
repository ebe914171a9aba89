"""Committed stages, runs and their versions, stored evaluations, the lineage of experts, and garbage collection."""
