"""Addresses of pages in the MLflow UI."""

from __future__ import annotations

from urllib.parse import quote

from lifelong_moe.redaction import is_web, shown_address, without_credentials

LOCAL_UI = "http://127.0.0.1:5000"
"""Where ``lifelong-moe ui`` serves a local database by default."""


def run_page(experiment_id: str, run_id: str) -> str:
    """Address of a run's page from any other page of the same MLflow.

    Args:
        experiment_id: MLflow's experiment id.
        run_id: MLflow's run id.
    """
    return f"#/experiments/{quote(experiment_id)}/runs/{quote(run_id)}"


def ui_url(uri: str, experiment_id: str, search: str | None = None, order: str | None = None) -> str:
    """Link to the chart comparison of an experiment.

    Args:
        uri: Tracking URI.
        experiment_id: MLflow's experiment id.
        search: Filter in MLflow's syntax; None shows all runs.
        order: Key by which the rows are ordered, such as ``params.arm``, ascending; None is MLflow's order.

    Returns:
        A link that opens the charts.
    """
    base = without_credentials(shown_address(uri)).rstrip("/") if is_web(uri) else LOCAL_UI
    # Without the query MLflow opens a page for language-model traces.
    link = f"{base}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&compareRunsMode=CHART"
    if search:
        link += "&searchFilter=" + quote(search)
    if order:
        link += f"&orderByKey={quote(order)}&orderByAsc=true"
    return link
