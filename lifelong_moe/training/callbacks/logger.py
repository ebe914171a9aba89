"""A Lightning Logger that sends points to the tracker in batches, off the critical path."""

from __future__ import annotations

import argparse
from typing import Any

from lightning.pytorch.loggers import Logger

from lifelong_moe.training.callbacks.points import Row, Send

FLUSH_ROWS = 500
"""Points in a batch; MLflow takes at most 1,000 metrics in one request."""


class BatchedLogger(Logger):
    """Collects ``(key, value, step)`` rows and hands them to ``send`` in batches.

    Args:
        name: Name of the run.
        version: Id of the run, if there is one.
        send: Receives the rows; must not raise for a server that is gone.
        first_step: Added to every step: the steps of earlier phases.
    """

    def __init__(self, name: str, version: str | None, send: Send, first_step: int = 0) -> None:
        super().__init__()
        self._name, self._version, self._send, self._first_step = name, version, send, first_step
        self._rows: list[Row] = []

    @property
    def name(self) -> str:
        """Name of the run."""
        return self._name

    @property
    def version(self) -> str | None:
        """Id of the run."""
        return self._version

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep metrics, and send them once there are ``FLUSH_ROWS``."""
        # Lightning adds "epoch" to every point; it says nothing here, where a phase is one epoch.
        self._rows += [(k, float(v), self._first_step + (step or 0)) for k, v in metrics.items() if k != "epoch"]
        if len(self._rows) >= FLUSH_ROWS:
            self.save()

    def log_hyperparams(self, params: dict[str, Any] | argparse.Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the pipeline logs parameters when it starts the run."""

    def save(self) -> None:
        """Send the metrics kept so far."""
        # Emptied first, so that no point is sent twice if sending is interrupted.
        rows, self._rows = self._rows, []
        if rows:
            self._send(rows)

    def finalize(self, status: str) -> None:
        """Send the rest, also after an error."""
        self.save()
