"""`lifelong-moe inspect --interpolate`: the losses of mixtures of a stage's first and last weights."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from lifelong_moe.config.load import build_config
from lifelong_moe.config.references import stored_config
from lifelong_moe.errors import ConfigError
from lifelong_moe.evaluation.loss import evaluate
from lifelong_moe.reports.figures.interpolation import interpolation_figure
from lifelong_moe.retention.average import between, moved_since
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import RunRecord, require_head
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.training.loop.device import on_configured_device
from lifelong_moe.training.restore import load_model
from pipelines.inspect.specialization import heldout_windows, holds
from pipelines.shared.options import InspectionRequest
from pipelines.shared.recorded import tracker_of
from pipelines.shared.tables import show
from pipelines.shared.workspace import ROOT, recorded_trainer

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the learned weights in each mixture. Each costs an evaluation of all distributions."""


def interpolate(
    run: str, store: StageStore, committed: CommittedStage, asked: InspectionRequest, console: Console
) -> Mapping[str, Any]:
    """Evaluate mixtures of the weights that a stage began with and those that it learned.

    Tensors that only the end has, such as new experts, stay as they are at the end.

    Args:
        run: A run.
        store: Holds its stages.
        committed: The stage.
        asked: Held-out tokens per distribution; by default as many as for the run's report.
        console: Where people read.

    Raises:
        ConfigError: If no weight of the stage before has changed.
    """
    head = require_head(ROOT, run)
    config = build_config(stored_config(head.config), is_stored=True)
    with console.status("reading weights and held-out text") as status:
        parent, model = store.get(str(committed.parent)), load_model(store, committed).requires_grad_(False)
        start = moved_since(model, dict(load_model(store, parent).named_parameters()))
        if not start:
            raise ConfigError(
                f"--interpolate: no weight of stage {parent.name} changed in stage {committed.name}, which forgets "
                f"nothing by it; choose another one with --stage."
            )
        windows, _, _ = heldout_windows(head, config, committed, asked.tokens or config.evaluate.tokens)
        model = on_configured_device(model, recorded_trainer(run))
        found = []
        for share in between(model, start, SHARES):
            status.update(f"running the model with {share:.0%} of what {committed.name} learned")
            found.append(
                {
                    name: evaluate(model, text, distribution=name, batch_tokens=config.evaluate.batch_tokens)
                    for name, text in windows.items()
                }
            )
    result = {
        "began_with": parent.name,
        "tensors": len(start),
        "learned": [name for name in committed.spec.learns if name in windows],
        "shares": list(SHARES),
        "bits_per_byte": {name: [losses[name].bits_per_byte for losses in found] for name in windows},
        "nats_per_token": {name: [losses[name].nats_per_token for losses in found] for name in windows},
    }
    _show(console, committed, result)
    _keep(head, committed, result, console)
    return result


def _show(console: Console, stage: CommittedStage, result: Mapping[str, Any]) -> None:
    losses = result["bits_per_byte"]
    table = Table(title=f"{stage.name}: bits per byte between the weights that it began with and those it learned")
    table.add_column("share of the learned")
    for name in losses:
        table.add_column(f"{name} (learned here)" if name in result["learned"] else name, justify="right")
    table.add_column("mean", justify="right")
    for index, share in enumerate(result["shares"]):
        row = [values[index] for values in losses.values()]
        table.add_row(f"{share:.2f}", *(f"{loss:.3f}" for loss in row), f"{sum(row) / len(row):.3f}")
    show(console, table)
    console.print(
        "With method=lifelong, average=S of a stage ends its training at a share of 1 - S of what it learned. Choose S "
        "by other text than you report."
    )


def _keep(head: RunHead, stage: CommittedStage, result: Mapping[str, Any], console: Console) -> None:
    """Write result and figure to the run's folder, and log them to its MLflow run unless that was done."""
    folder, tracker = RunRecord(ROOT, head.run).path / "interpolation", tracker_of(head)
    target = head.mlflow.run if head.mlflow.run and tracker.run_exists(head.mlflow.run) else None
    # With the MLflow run's id: once the run has another one, all is logged to that one.
    text = json.dumps({"stage_key": stage.key, "mlflow_run": target, **result}, indent=1, ensure_ascii=False)
    losses, learned = result["bits_per_byte"], result["learned"]
    figure = interpolation_figure(head.run, result["shares"], losses, learned, stage.name)
    written = folder / f"{stage.name}.json"
    known = holds(written, text)
    write_atomic(folder / f"{stage.name}.png", _png(figure))
    if not known:
        tracker.log_figure(target, figure, f"interpolation/{stage.name}.png")
        tracker.log_text(target, text, f"interpolation/{stage.name}.json")
    if tracker.problem:
        console.print(tracker.problem, style="yellow")
    # Last: if the process dies before, the next call logs again rather than never.
    write_atomic(written, text)
    console.print(f"written: {written}, {stage.name}.png beside it")


def _png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=figure.dpi)
    return image.getvalue()
