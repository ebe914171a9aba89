"""Addresses of pages in the MLflow UI."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from lifelong_moe.redaction import is_web, shown_address, without_credentials

LOCAL_UI = "http://127.0.0.1:5000"
"""Where ``lifelong-moe ui`` serves a local database by default."""


def ui_url(uri: str, experiment_id: str, run_ids: Sequence[str] | None = None) -> str:
    """Link to the chart comparison of an experiment.

    Args:
        uri: Tracking URI.
        experiment_id: MLflow's experiment id.
        run_ids: Show only these runs; None shows all.

    Returns:
        A link that opens the charts.
    """
    base = without_credentials(shown_address(uri)).rstrip("/") if is_web(uri) else LOCAL_UI
    # Without the query MLflow opens a page for language-model traces.
    link = f"{base}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&compareRunsMode=CHART"
    if run_ids:
        chosen = ", ".join(f"'{run_id}'" for run_id in run_ids)
        link += "&searchFilter=" + quote(f"attributes.run_id IN ({chosen})")
    return link
