"""What an inspection leaves in MLflow, and that repeating it adds nothing."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines.inspect.inspect import inspect_stage
from pipelines.shared.options import InspectionRequest
from tests.tiny import tiny_config, train, write_config


def inspected(stage: str | None = None, **options: Any) -> dict[str, Any]:
    return inspect_stage("tiny", stage, InspectionRequest(**{"tokens": 200} | options), Console(file=io.StringIO()))


def test_figures_and_curves_are_with_the_run_once(lab: Path, template: Path) -> None:
    from mlflow import MlflowClient

    (lab / "mlruns").mkdir()
    shutil.copy(template, lab / "mlruns/mlflow.db")
    write_config(tiny_config(tracking={"enabled": True}))
    train()
    found = inspected()
    assert inspected() == found
    run_id, client = found["mlflow_run"], MlflowClient(f"sqlite:///{lab / 'mlruns/mlflow.db'}")
    kept = {path.name for path in (lab / f"mlruns/artifacts/{run_id}/artifacts/inspection/code").iterdir()}
    names = ("information", "similarity", "leak", "saturation")  # one expert a token: no co-activation
    assert kept == {f"{name}.png" for name in names} | {"inspection.json"}
    history = client.get_metric_history(run_id, "inspection/200_tokens/token_information_nats/L0")
    token = found["layers"][0]["token"]
    assert [(point.step, point.value) for point in history] == [(1, token["nats"] - token["null_mean"])]
    losses = found["shuffled"]["fruit"]
    (cost,) = client.get_metric_history(run_id, "inspection/200_tokens/fruit/cost_of_shuffling_nats_per_token")
    assert cost.value == losses["shuffled_nats_per_token"] - losses["nats_per_token"]
    assert client.get_run(run_id).info.status == "FINISHED"
    way = inspected(interpolate=True)
    assert inspected(interpolate=True) == way
    there = lab / f"mlruns/artifacts/{run_id}/artifacts/interpolation"
    assert {path.name for path in there.iterdir()} == {"code.png", "code.json"}


def test_no_step_of_a_curve_has_two_points(lab: Path, template: Path) -> None:
    from mlflow import MlflowClient

    (lab / "mlruns").mkdir()
    shutil.copy(template, lab / "mlruns/mlflow.db")
    write_config(tiny_config(tracking={"enabled": True}))
    train()
    few, more = inspected(tokens=200), inspected(tokens=400)
    first = inspected(stage="fruit", tokens=200)
    assert inspected(tokens=200) == few and inspected(tokens=400) == more  # what was in between is forgotten by then
    run_id, client = few["mlflow_run"], MlflowClient(f"sqlite:///{lab / 'mlruns/mlflow.db'}")
    for tokens, results in ((200, (first, few)), (400, (more,))):
        history = client.get_metric_history(run_id, f"inspection/{tokens}_tokens/token_information_nats/L0")
        excess = [found["layers"][0]["token"]["nats"] - found["layers"][0]["token"]["null_mean"] for found in results]
        assert [point.value for point in sorted(history, key=lambda point: point.step)] == excess
        assert len({point.step for point in history}) == len(history)
    assert all(
        len({point.step for point in history}) == len(history)
        for key in client.get_run(run_id).data.metrics
        if key.startswith("inspection/") and (history := client.get_metric_history(run_id, key))
    )
