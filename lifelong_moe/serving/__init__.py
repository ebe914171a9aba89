"""Committed stages that answer: prompts, and what MLflow calls to load a registered version."""
