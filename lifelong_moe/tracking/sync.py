"""Deliver to MLflow everything that it missed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from lifelong_moe.redaction import note_address
from lifelong_moe.tracking.connection import local_uri, prepare_environment, probe, resolve_uri
from lifelong_moe.tracking.failures import failures, reason_of, unusable
from lifelong_moe.tracking.spool import Delivered, Spool, left_for_others
from lifelong_moe.tracking.store import Store


@dataclass(frozen=True)
class Synced:
    """The outcome for one store's spool."""

    address: str
    """Tracking URI as it may be shown."""
    delivered: Delivered
    """Empty if a problem ended the delivery."""
    problem: str | None
    """Why records are left, in one line; None if none are."""


def sync(root: Path) -> list[Synced]:
    """Deliver the user's spools under ``mlruns/``; repeating it, or continuing after a kill, adds nothing twice.

    The user's own addresses are ``MLFLOW_TRACKING_URI`` and the database of this store. What a spool says of its own
    address is only shown: a store may come from somebody else, who must not choose where this user's records go, nor
    to whom this user's password is sent.

    Args:
        root: The ``mlruns/`` directory.

    Returns:
        The outcome for each spool that held something.
    """
    prepare_environment()
    own = {uri: Spool(root, uri) for uri in dict.fromkeys([resolve_uri(None, root), local_uri(root)])}
    outcomes = [_deliver(uri, spool, root) for uri, spool in own.items() if not spool.empty]
    missing = "set MLFLOW_TRACKING_URI to this address, or start a command whose configuration names it"
    return outcomes + [Synced(address, Delivered(), missing) for address in left_for_others(root, own.values())]


def _deliver(uri: str, spool: Spool, root: Path) -> Synced:
    note_address(uri)
    # MLflow's client would retry for minutes on a store that is down.
    if (problem := probe(uri)) is not None:
        return Synced(spool.address, Delivered(), unusable(uri, problem))
    try:
        return Synced(spool.address, spool.deliver(Store(uri, root).deliver, math.inf), None)
    except failures() as error:
        return Synced(spool.address, Delivered(), unusable(uri, reason_of(error, uri)))
    except ImportError as error:  # the database's driver is not installed
        return Synced(spool.address, Delivered(), str(error))
