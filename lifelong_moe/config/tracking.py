"""Settings of tracking: where MLflow records go. Torch-free and MLflow-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class TrackingConfig:
    """MLflow tracking; never part of a stage's key."""

    enabled: bool = True
    """Record runs in MLflow; false records nothing there."""
    uri: str | None = None
    """Tracking URI. Null: the environment variable ``MLFLOW_TRACKING_URI``, or else SQLite under ``mlruns/``."""
    experiment: str = "lifelong-moe"
    """Name of the MLflow experiment in which runs appear."""
