"""`lifelong-moe ui`: the MLflow UI on our database, opened at the list of runs, the best first."""

from __future__ import annotations

import webbrowser

from rich.console import Console

from lifelong_moe.config.tracking import TrackingConfig
from lifelong_moe.errors import ConfigError, CorruptError, TryAgainError
from lifelong_moe.tracking.pages.links import note_port, view_url
from lifelong_moe.tracking.pages.server import require_free, serve_command, serving, wait_until_up
from lifelong_moe.tracking.pages.views import RUNS
from lifelong_moe.tracking.tracker import Tracker
from lifelong_moe.training.callbacks.interrupt import handling_signals
from pipelines.shared.places import ROOT

START_SECONDS = 90.0
"""Longest wait for the server to answer."""


def ui(port: int, host: str, browser: bool, experiment: str, console: Console) -> int:
    """Serve the MLflow UI until interrupted; returns the server's exit code.

    Raises:
        ConfigError: If the port is taken, or there is no database.
        CorruptError: If the store's database is not MLflow's, or names files outside of the store.
        TryAgainError: If the server does not answer in time, or SIGTERM arrived.
    """
    require_free(host, port)
    tracker = Tracker.connect(TrackingConfig(experiment=experiment), ROOT)
    if tracker.experiment_id is None:
        refused = CorruptError if tracker.is_refused else ConfigError
        raise refused(tracker.problem or "nothing is tracked.")
    command, environment = serve_command(None, ROOT, port, host)
    base = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    url = view_url(base, tracker.experiment_id, RUNS)
    console.print("starting the MLflow UI …")
    # Left running, the server would keep the port: it ends with us, also where we are killed.
    with handling_signals(), serving(command, environment) as server:
        try:
            # Another server may have taken the port since: it answers until ours has failed to bind.
            if not wait_until_up(base, START_SECONDS, server, lambda: tracker.is_behind(base)):
                if server.poll() is None:
                    raise TryAgainError(f"the MLflow UI does not answer at {base} within {START_SECONDS:g} s.")
                console.print(f"The MLflow server ended with exit code {server.returncode}; see its messages above.")
                return server.returncode
            # Links that later runs print lead here.
            note_port(ROOT, port)
            console.print(f"MLflow: {url}   (Ctrl-C stops it)", soft_wrap=True)
            if browser:
                webbrowser.open(url)
            return server.wait()
        except KeyboardInterrupt:
            return 0
