"""What the experts of a stage specialize in: measured on held-out text, or shown token by token on a given one."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import and_
from pathlib import Path
from typing import Any

from rich.console import Console

from lifelong_moe.config.load import build_config
from lifelong_moe.config.references import stored_config
from lifelong_moe.config.run import RunConfig
from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.data.tokens.tokenizer import Tokenizer
from lifelong_moe.data.tokens.windows import EvaluationSet, evaluation_windows
from lifelong_moe.errors import ConfigError, DataError
from lifelong_moe.evaluation.loss import evaluate
from lifelong_moe.evaluation.probing import (
    BATCH_TOKENS,
    Observation,
    expert_similarities,
    observe,
    observe_text,
    routing_columns,
    shuffled_experts,
)
from lifelong_moe.evaluation.routed_text import route_text
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.reports.figures.specialization import FIGURES, inspection_figures
from lifelong_moe.reports.inspection import Readings, build_inspection
from lifelong_moe.reports.pages.routed_text import text_page
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.opening import read_bounded
from lifelong_moe.storage.plain_files import corrupt_if_irregular
from lifelong_moe.storage.tables import write_parquet
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import RunRecord, require_head
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.training.callbacks.points import Row
from lifelong_moe.training.loop.device import on_configured_device
from lifelong_moe.training.restore import load_model
from pipelines.inspect import tables as inspect_tables
from pipelines.inspect.opening import step_of
from pipelines.inspect.targets import require_targets
from pipelines.shared.options import InspectionRequest
from pipelines.shared.recorded import tracker_of
from pipelines.shared.workspace import ROOT, read_data, recorded_trainer, remembered

Windows = Mapping[str, EvaluationSet]

HELDOUT_TOKENS = 8192
"""Held-out tokens per distribution that are read by default."""


def on_text(
    run: str,
    store: StageStore,
    committed: CommittedStage,
    text: str,
    mode: int,
    asked: InspectionRequest,
    console: Console,
) -> Mapping[str, Any]:
    """Show which experts each token of a text chooses; ``--html`` and ``--save`` write files of permissions ``mode``.

    Raises:
        ConfigError: If the text is empty.
    """
    tokenizer = store.tokenizer(committed, asked.label)
    model = load_model(store, committed)
    architecture, token_ids = model.architecture, tokenizer.encode(text)
    if not token_ids:
        raise ConfigError("the text has no token; give a longer one.")
    seen = observe_text(on_configured_device(model, recorded_trainer(run)), token_ids, distribution=asked.label)
    routed = route_text(architecture, seen, tokenizer.decode, asked.layer)
    inspect_tables.text(console, routed)
    require_targets(asked)
    if asked.html is not None:
        write_atomic(Path(asked.html), text_page(routed, f"{run}, stage {committed.name}"), mode)
        console.print(f"written: {asked.html}")
    if asked.save is not None:
        _save(asked.save, architecture, {asked.label or "": seen}, tokenizer, mode, console)
    rows = [
        {
            "token_id": token.token_id,
            "text": token.text,
            "owner": routed.owners[token.owner],
            "experts": [dict(chosen) for chosen in token.experts],
        }
        for token in routed.tokens
    ]
    return {"layers": routed.layers, "tokens": rows}


def on_heldout(
    run: str, store: StageStore, committed: CommittedStage, asked: InspectionRequest, console: Console
) -> Mapping[str, Any]:
    """Measure what the experts specialize in on held-out text, and keep the result with the run.

    Args:
        run: A run.
        store: Holds its stages.
        committed: The stage to inspect.
        asked: Held-out tokens per distribution, and the file for every token's experts, if any.
        console: Where people read.
    """
    tokens = asked.tokens or HELDOUT_TOKENS
    head, record = require_head(ROOT, run), RunRecord(ROOT, run)
    config = build_config(stored_config(head.config), is_stored=True)
    with console.status("reading held-out text") as status:
        windows, tokenizer, mode = heldout_windows(head, config, committed, tokens)
        if missing := [name for name in config.evaluated if name not in windows]:
            console.print(f"not measured, because the held-out text is gone: {', '.join(missing)}")
        chain = store.chain(committed.key)

        def told(reading: int) -> None:
            # The last stage reads all of it twice more.
            status.update(f"running the model on it, reading {reading} of {len(chain) + 2}")

        result, observed = _measure(store, chain, config, windows, tokenizer, told)
    result = {"run": run, "stage": committed.name, "key": committed.key, **result}
    result = _keep(record, head, config, result, tokens, mode, console)
    inspect_tables.heldout(console, result)
    console.print(f"written: {record.path / 'inspection.json'}, {record.path / 'inspection'}/*.png")
    if asked.save is not None:
        require_targets(asked)
        _save(asked.save, committed.architecture, observed, tokenizer, mode, console)
    return result


def _keep(
    record: RunRecord,
    head: RunHead,
    config: RunConfig,
    result: Mapping[str, Any],
    tokens: int,
    mode: int,
    console: Console,
) -> Mapping[str, Any]:
    """Write the result and its figures to the run's folder, and log them to MLflow unless they are there already.

    Returns:
        The result with the id of the run's MLflow run.
    """
    path, folder = record.path / "inspection.json", record.path / "inspection"
    tracker = tracker_of(head)
    run_id = head.mlflow.run
    target = run_id if run_id and tracker.run_exists(run_id) else None
    # Part of the text that is compared below: once the run has another MLflow run, everything is logged to that one.
    result = {**result, "mlflow_run": target}
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    # A copy per stage and number of tokens says which points MLflow has: those cannot be taken back, while
    # inspection.json holds the last inspection only.
    copy = record.path / f"inspection-{result['stage']}-{tokens}.json"
    known, plotted = (holds(one, text) for one in (path, copy))
    folder.mkdir(exist_ok=True)
    # The last inspection may have drawn more figures, of more stages or more layers.
    for name in FIGURES:
        with corrupt_if_irregular(folder / f"{name}.png"):
            (folder / f"{name}.png").unlink(missing_ok=True)
    for name, figure in inspection_figures(result, result["stage"]).items():
        figure.savefig(folder / f"{name}.png")
        if not known:
            tracker.log_figure(target, figure, f"inspection/{result['stage']}/{name}.png")
    if not known:
        tracker.log_text(target, text, f"inspection/{result['stage']}/inspection.json")
    if not plotted:
        tracker.log_metrics(target, _rows(result, tokens, step_of(head, result["key"])))
    if tracker.problem and config.tracking.enabled:
        console.print(tracker.problem, style="yellow")
    # Last: if the process dies before, the next inspection logs again rather than never.
    # Private where the text was: it shows the tokens that experts choose most.
    write_atomic(copy, text, mode)
    write_atomic(path, text, mode)
    return result


def holds(path: Path, text: str) -> bool:
    """Whether a file of the store, which may hold anything, holds this text."""
    data = text.encode("utf-8")
    try:
        return read_bounded(path, len(data), follow=False) == data
    except OSError:  # also if it is longer
        return False


def _rows(result: Mapping[str, Any], tokens: int, step: int) -> list[Row]:
    """Points of MLflow's curves over stages."""
    rows: list[Row] = []
    # Measurements on different numbers of tokens do not compare, so each number has its own curve.
    prefix = f"inspection/{tokens}_tokens"
    for layer in result["layers"]:
        for kind in ("token", "distribution"):
            if layer[kind] is not None:
                # What is above chance: shuffled labels have positive mutual information too.
                excess = layer[kind]["nats"] - layer[kind]["null_mean"]
                rows.append((f"{prefix}/{kind}_information_nats/L{layer['layer']}", excess, step))
    for name, losses in result["shuffled"].items():
        cost = losses["shuffled_nats_per_token"] - losses["nats_per_token"]
        rows.append((f"{prefix}/{name}/cost_of_shuffling_nats_per_token", cost, step))
    return rows


def heldout_windows(
    head: RunHead, config: RunConfig, committed: CommittedStage, tokens: int
) -> tuple[dict[str, EvaluationSet], Tokenizer, int]:
    """Held-out text of each distribution that still has it, cut into windows as in the run's evaluation.

    Returns:
        It, its tokenizer, and permissions of files that are made of it.

    Raises:
        ConfigError: If the tokenizer has changed since the stage was trained.
        DataError: If all held-out text is gone.
    """
    run = head.run
    if committed.architecture.num_tokens > committed.architecture.vocab_size:
        raise ConfigError(
            f"run {run}: stages of it added tokens (vocabulary.add), so not all held-out text is read in the same; "
            f"inspect a --text."
        )
    data = read_data(config, known=remembered(head, None))
    if data.tokenizer.hash != committed.tokenizer.hash:
        raise ConfigError(
            f"run {run}: text or tokenizer has changed since stage {committed.name} was trained, so token ids have "
            f"another meaning; restore the old text, or inspect a --text."
        )
    context = config.model.context
    there = [name for name in config.evaluated if name in data.heldout]
    if not there:
        raise DataError(f"run {run}: all held-out text is gone; inspect a --text instead.")
    windows = {name: evaluation_windows(data.heldout[name], context, tokens) for name in there}
    return windows, data.tokenizer, functools.reduce(and_, map(data.mode, there))


def _loaded(store: StageStore, trainer: TrainerConfig, stage: CommittedStage) -> LanguageModel:
    return on_configured_device(load_model(store, stage), trainer)


def _measure(
    store: StageStore,
    chain: Sequence[CommittedStage],
    config: RunConfig,
    windows: Windows,
    tokenizer: Tokenizer,
    told: Callable[[int], None],
) -> tuple[Mapping[str, Any], dict[str, Observation]]:
    """Observe the last stage of a chain and its ancestors on the same text; ``told`` hears which reading it is."""
    # One model at a time: only what was observed is kept of the earlier stages.
    load = functools.partial(_loaded, store, config.trainer)
    earlier = {}
    for reading, one in enumerate(chain[:-1], 1):
        told(reading)
        earlier[one.name] = _observe_all(load(one), windows)
    model = load(chain[-1])
    told(len(chain))
    observed = _observe_all(model, windows)
    told(len(chain) + 1)
    losses = _losses(model, windows)
    told(len(chain) + 2)
    # The same weights with the experts of each layer permuted: what the choice of expert is worth, in nats.
    with shuffled_experts(model):
        shuffled = _losses(model, windows)
    inspection = build_inspection(
        model.architecture,
        Readings(
            observed,
            earlier,
            expert_similarities(model, [(text, name) for name, text in windows.items()]),
            {name: (losses[name], shuffled[name]) for name in windows},
        ),
        stages=[one.name for one in chain],
        learned_in={name: index for index, one in enumerate(chain) for name in one.spec.learns},
        name_token=tokenizer.name,
    )
    return inspection, observed


def _observe_all(model: LanguageModel, windows: Windows) -> dict[str, Observation]:
    return {name: observe(model, text, distribution=name) for name, text in windows.items()}


def _losses(model: LanguageModel, windows: Windows) -> dict[str, float]:
    return {
        name: evaluate(model, text, distribution=name, batch_tokens=BATCH_TOKENS).nats_per_token
        for name, text in windows.items()
    }


def _save(
    path: str,
    architecture: Architecture,
    observed: Mapping[str, Observation],
    tokenizer: Tokenizer,
    mode: int,
    console: Console,
) -> None:
    """Write every token's experts as a table, one row per token and layer."""

    # Streamed: the whole table may not fit into memory.
    def parts() -> Iterator[dict[str, Any]]:
        for name, seen in observed.items():
            yield from routing_columns(architecture, seen, name, tokenizer.name)

    console.print(f"written: {path} ({write_parquet(Path(path), parts(), mode):,} rows)")
