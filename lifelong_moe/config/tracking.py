"""Where MLflow records go. Torch-free and MLflow-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class TrackingConfig:
    """MLflow; never part of a stage's key."""

    enabled: bool = True
    """Record in MLflow at all."""
    uri: str | None = None
    """Tracking URI; the default is ``MLFLOW_TRACKING_URI``, else SQLite under ``mlruns/``."""
    experiment: str = "lifelong-moe"
    """MLflow experiment that the runs appear in."""
