"""Tell MLflow everything that it missed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from lifelong_moe.tracking.connection import prepare_environment, probe, with_credentials
from lifelong_moe.tracking.spool import Delivered, Spool
from lifelong_moe.tracking.store import Store, failures, one_line, unusable


@dataclass(frozen=True)
class Synced:
    """What became of one store's spool."""

    address: str
    """Tracking URI without credentials."""
    delivered: Delivered
    """What was done; nothing is counted if a problem ended it."""
    problem: str | None
    """One line why records are left; None if none are."""


def sync(root: Path) -> list[Synced]:
    """Deliver every spool under ``mlruns/``; doing it again, or after being killed in it, adds nothing.

    Credentials are in no spool: they come from ``MLFLOW_TRACKING_URI`` if it is the same store, or from MLflow's own
    ``MLFLOW_TRACKING_USERNAME`` and ``MLFLOW_TRACKING_PASSWORD``.

    Args:
        root: The ``mlruns/`` directory.

    Returns:
        What became of each spool that held something.
    """
    prepare_environment()
    return [_deliver(spool, root) for spool in Spool.all(root)]


def _deliver(spool: Spool, root: Path) -> Synced:
    uri = with_credentials(spool.address, root)
    if (problem := probe(uri)) is not None:
        return Synced(spool.address, Delivered(), unusable(uri, problem))
    try:
        return Synced(spool.address, spool.deliver(Store(uri, root).perform, math.inf), None)
    except failures() as error:
        return Synced(spool.address, Delivered(), unusable(uri, one_line(error)))
    except ImportError as error:  # the database's driver is not installed
        return Synced(spool.address, Delivered(), str(error))
