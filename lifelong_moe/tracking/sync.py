"""Deliver to MLflow everything that it missed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from lifelong_moe.tracking.connection import prepare_environment, probe, with_credentials
from lifelong_moe.tracking.failures import failures, one_line, unusable
from lifelong_moe.tracking.spool import Delivered, Spool
from lifelong_moe.tracking.store import Store


@dataclass(frozen=True)
class Synced:
    """The outcome for one store's spool."""

    address: str
    """Tracking URI without credentials."""
    delivered: Delivered
    """Empty if a problem ended the delivery."""
    problem: str | None
    """Why records are left, in one line; None if none are."""


def sync(root: Path) -> list[Synced]:
    """Deliver every spool under ``mlruns/``; repeating it, or continuing after a kill, adds nothing twice.

    No spool holds credentials: they come from ``MLFLOW_TRACKING_URI`` if it is the same store, or from MLflow's own
    ``MLFLOW_TRACKING_USERNAME`` and ``MLFLOW_TRACKING_PASSWORD``.

    Args:
        root: The ``mlruns/`` directory.

    Returns:
        The outcome for each spool that held something.
    """
    prepare_environment()
    return [_deliver(spool, root) for spool in Spool.all(root)]


def _deliver(spool: Spool, root: Path) -> Synced:
    uri = with_credentials(spool.address, root)
    # MLflow's client would retry for minutes on a store that is down.
    if (problem := probe(uri)) is not None:
        return Synced(spool.address, Delivered(), unusable(uri, problem))
    try:
        return Synced(spool.address, spool.deliver(Store(uri, root).perform, math.inf), None)
    except failures() as error:
        return Synced(spool.address, Delivered(), unusable(uri, one_line(error)))
    except ImportError as error:  # the database's driver is not installed
        return Synced(spool.address, Delivered(), str(error))
