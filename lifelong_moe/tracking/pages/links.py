"""Addresses of pages in the MLflow UI."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

from lifelong_moe.errors import CorruptError
from lifelong_moe.redaction import is_web, shown_address, without_credentials
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.keys import canonical_json
from lifelong_moe.storage.plain import PlainError, from_plain
from lifelong_moe.storage.stored import read_stored
from lifelong_moe.tracking.pages.views import View

PORT = 5000
"""On which ``lifelong-moe ui`` serves a local database by default."""
SERVED = "ui.json"
"""File of a store that says on which port it was served last."""


@dataclass(frozen=True)
class _Served:
    port: int

    def __post_init__(self) -> None:
        if not 0 < self.port < 1 << 16:
            raise PlainError("not a port", ".port")


def served_port(root: Path) -> int:
    """The port on which ``lifelong-moe ui`` served a store last; the default one if it never did, or nobody can tell.

    Args:
        root: The ``mlruns/`` directory.
    """
    with suppress(OSError, CorruptError):
        return read_stored(root / SERVED, partial(from_plain, _Served)).port
    return PORT


def note_port(root: Path, port: int) -> None:
    """Note the port on which a store is served; one that cannot be written to is served all the same."""
    if port != served_port(root):
        with suppress(OSError):
            write_atomic(root / SERVED, canonical_json(asdict(_Served(port))))


def starting(uri: str, port: int) -> str:
    """What to print beside a link: the command that serves it; empty for a server of the user's, which is up.

    Args:
        uri: Tracking URI.
        port: Of a local database.
    """
    option = "" if port == PORT else f" --port {port}"
    return "" if is_web(uri) else f"  (start it with: lifelong-moe ui{option})"


def run_page(experiment_id: str, run_id: str) -> str:
    """Address of a run's page from any other page of the same MLflow.

    Args:
        experiment_id: MLflow's experiment id.
        run_id: MLflow's run id.
    """
    return f"#/experiments/{quote(experiment_id)}/runs/{quote(run_id)}"


def ui_url(uri: str, experiment_id: str, search: str, port: int = PORT) -> str:
    """Link to charts of some runs.

    Args:
        uri: Tracking URI.
        experiment_id: MLflow's experiment id.
        search: Filter in MLflow's syntax.
        port: Of a local database.
    """
    return f"{_runs(uri, experiment_id, port)}&compareRunsMode=CHART&searchFilter={quote(search)}"


def view_url(uri: str, experiment_id: str, view: View, port: int = PORT) -> str:
    """Link to a saved view: a table of all runs, charts of a choice of them.

    Args:
        uri: Tracking URI.
        experiment_id: MLflow's experiment id; the view must be one of its tags.
        view: The view.
        port: Of a local database.
    """
    # With a filter in the address too, MLflow takes that in place of the whole view.
    link = f"{_runs(uri, experiment_id, port)}&viewStateShareKey={quote(view.key)}"
    return f"{link}&compareRunsMode=CHART" if view.search else link


def _runs(uri: str, experiment_id: str, port: int) -> str:
    base = without_credentials(shown_address(uri)).rstrip("/") if is_web(uri) else f"http://127.0.0.1:{port}"
    # Without the query MLflow opens a page for language-model traces.
    return f"{base}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
