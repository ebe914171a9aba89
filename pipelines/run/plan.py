"""`lifelong-moe plan`: what a run would do and what it would cost. Prepares data, but trains nothing."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from lifelong_moe.clustering.unigrams import unigram_divergence
from lifelong_moe.config.load import LoadedConfig, written_config
from lifelong_moe.data.formats.progress import telling
from lifelong_moe.measures import duration
from lifelong_moe.plan.advice import (
    beginning,
    growth_advice,
    idle_retention,
    noncausal_routing,
    other_separator,
    unheld,
)
from lifelong_moe.plan.cost import count_parameters
from lifelong_moe.plan.disk import run_need
from lifelong_moe.plan.memory import LIBRARIES_BYTES, memory_need
from lifelong_moe.plan.planned import PlannedStage
from lifelong_moe.plan.published import sentence as published_sentence
from lifelong_moe.plan.spec import BASE
from lifelong_moe.plan.stages import epochs_by_distribution, stage_need
from lifelong_moe.storage.keys import SHORT
from lifelong_moe.store.runs import RunRecord
from lifelong_moe.store.speeds import measured_speed
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.tracking.provenance import machine
from pipelines.run import render
from pipelines.run.file_list import show_data
from pipelines.run.sizes import incoming, sentences, sizes
from pipelines.shared.tables import show
from pipelines.shared.workspace import ROOT, Prepared, further_training, prepare

COMPARED_TOKENS = 200_000
"""Leading tokens of each distribution whose frequencies are compared."""


TIMED_SECONDS = 3.0
"""Of steps that are taken to see how fast they are."""
ASK = "`lifelong-moe plan --time` takes a few steps to see; "


def plan(loaded: LoadedConfig, console: Console, times: bool = False) -> dict[str, Any]:
    """Show the stages with keys, sizes and cost; returns the same as plain data. With ``times`` it times steps."""
    with console.status("reading and tokenizing the distributions") as status, telling(status.update):
        prepared = prepare(loaded)
    store = StageStore(ROOT)
    head = RunRecord(ROOT, prepared.config.run).head()
    rows = [_row(i, prepared, store) for i in range(len(prepared.plan))]
    came, found = incoming(prepared), [sizes(prepared, i) for i in range(len(prepared.plan))]
    rows = [{**row, **one} for row, one in zip(rows, found, strict=True)]
    files = show_data(console, prepared)
    todo = [stage for stage, row in zip(prepared.plan, rows, strict=True) if row["action"] == "train"]
    disk = run_need([stage_need(stage, prepared.config) for stage in todo])
    seconds, how_long = _time(todo, prepared, store, times)
    _print(console, rows, disk, how_long)
    for planned, row in zip(prepared.plan, rows, strict=True):
        if planned.spec.mixed:
            console.print(
                render.mixture_sentence(planned.spec, {name: one["epochs"] for name, one in row["mixture"].items()})
            )
    for sentence in sentences(prepared, came, found):
        console.print(sentence)
    for sentence in beginning(prepared.config, prepared.data.tokenizer.bos_id, prepared.data.tokenizer.bos_name):
        console.print(sentence)
    if published := published_sentence(prepared.config):
        console.print(published)
    warnings = [*prepared.loaded.left_behind, *noncausal_routing(prepared.config), *idle_retention(prepared.config)]
    warnings += other_separator(prepared.config, prepared.data.tokenizer.bos_id)
    written = written_config(prepared.loaded.raw)
    warnings += unheld(prepared.config, written)
    for sentence in warnings:
        console.print(sentence, style="yellow")
    advice = growth_advice(prepared.plan, _divergence(prepared), written)
    gone = [name for name in prepared.config.trained if name in prepared.data.gone]
    if gone and any(row["action"] == "train" for row in rows):
        names = ", ".join(dict.fromkeys(gone))
        advice.append(f"how near new text is to {names} cannot be told: that text is gone.")
    for sentence in advice:
        console.print(f"· {sentence}")
    # A longer or shorter plan continues the run; only a stage that differs needs another name.
    if head is not None and any(row["key"] != old for row, old in zip(rows, head.plan, strict=False)):
        console.print(
            f"run={head.run} exists with other stages; running needs run=NAME or --replace."
            f"{further_training(head, prepared.plan, store)}",
            style="yellow",
        )
    return {
        "run": prepared.config.run,
        "method": prepared.config.method.value,
        "from": came,
        "files": files,
        "stages": rows,
        "disk_bytes": disk,
        "seconds": seconds,
        "warnings": warnings,
        "advice": advice,
    }


def _divergence(prepared: Prepared) -> dict[str, dict[str, float]]:
    """Unigram divergence of each distribution's text from that of each one of a stage before its first."""
    vocab_size, there = prepared.data.tokenizer.vocab_size, prepared.data.corpora
    found: dict[str, dict[str, float]] = {}
    for stage in prepared.config.stages:
        new = [name for name in stage.learns if name in there and name not in found]
        text = {name: there[name].train.tokens[:COMPARED_TOKENS] for name in (*found, *new)}
        found |= {name: {old: unigram_divergence(text[name], text[old], vocab_size) for old in found} for name in new}
    return found


def _row(i: int, prepared: Prepared, store: StageStore) -> dict[str, Any]:
    planned = prepared.plan[i]
    spec, count, committed = planned.spec, planned.parameters, store.find(planned.key)
    passes = _epochs(planned, prepared, committed)
    shares = {name: share / sum(spec.shares) for name, share in zip(spec.new, spec.shares, strict=True)}
    before = None
    if spec.parent is not None:
        base = prepared.base if spec.parent == BASE else None
        before = count_parameters((base or prepared.plan[spec.parent]).architecture)
    return {
        "name": spec.name,
        "key": planned.key,
        "action": "committed" if committed else "train",
        "routing": planned.routing,
        "experts_per_layer": planned.architecture.num_experts,
        "new_experts_per_layer": spec.grow.experts
        if spec.grow
        else (0 if before else planned.architecture.num_experts),
        "parameters_total": count.total,
        "parameters_active": count.active,
        "parameters_trainable": planned.trainable,
        "tokens": planned.tokens,
        "epochs": max(passes.values()),
        "mixture": {name: {"share": shares[name], "epochs": passes[name]} for name in spec.new if spec.mixed},
        "replay_fraction": spec.replay.fraction,
        "teacher_tokens": spec.teacher_tokens,
        "active_flops": planned.flops,
        "disk_bytes": stage_need(planned, prepared.config).total,
        "memory_bytes": memory_need(spec, planned.architecture, prepared.config.trainer).total,
    }


def _epochs(planned: PlannedStage, prepared: Prepared, committed: CommittedStage | None) -> dict[str, float]:
    """Passes of the stage over each distribution that it learns."""
    spec, corpora = planned.spec, prepared.data.corpora
    # Text that is gone cannot be counted; the committed stage recorded the numbers.
    if committed is not None and not set(spec.new) <= set(corpora):
        return dict(committed.metrics.get("epochs_by_distribution") or {spec.data: float(committed.metrics["epochs"])})
    return epochs_by_distribution(spec, corpora)


def _time(todo: list[PlannedStage], prepared: Prepared, store: StageStore, times: bool) -> tuple[float | None, str]:
    """Seconds that training will take, None if nobody knows, and the same in words; ``times`` allows to try."""
    if not todo:
        return 0.0, ""
    place = {"machine": machine(), "accelerator": prepared.config.trainer.accelerator}
    found = measured_speed(ROOT, store, todo[0].spec, **place)
    if found is None and times and prepared.config.trainer.processes == 1:
        return _timed(todo, prepared)
    if found is None:
        return None, (
            "How long training takes is not known: no stage of this model was trained on this machine before. "
            f"{ASK if prepared.config.trainer.processes == 1 else ''}`run` tells the time left while it trains, and "
            f"Ctrl-C saves a checkpoint."
        )
    seconds = sum(stage.flops for stage in todo) / found.flops_per_second
    stages = "a stage" if found.stages == 1 else f"{found.stages} stages"
    return seconds, (
        f"Training takes about {duration(seconds)} at the speed of {stages} of this model on this machine; "
        f"evaluation comes on top."
    )


def _timed(todo: list[PlannedStage], prepared: Prepared) -> tuple[float, str]:
    """As :func:`_time`, by some steps of the model that the run begins with."""
    from lifelong_moe.training.timing import timed_speed

    trainer, first, spec = prepared.config.trainer, prepared.base or prepared.plan[0], todo[0].spec
    sequences = spec.optim.batch_tokens // spec.model.context // trainer.accumulate_grad_batches
    speed = timed_speed(first.architecture, max(1, sequences), trainer, TIMED_SECONDS)
    seconds = sum(stage.flops for stage in todo) / speed
    return seconds, (
        f"Training takes about {duration(seconds)} at the speed of steps that were taken just now, on random tokens; "
        f"evaluation comes on top."
    )


def _print(console: Console, rows: list[dict[str, Any]], disk: int, how_long: str) -> None:
    table = Table(title="Plan", title_justify="left")
    for header in ("stage", "key", "", "experts", "total", "active", "trains", "tokens", "epochs", "replay", "FLOPs"):
        table.add_column(header, justify="left" if header in ("stage", "key", "") else "right")
    for row in rows:
        table.add_row(
            row["name"],
            row["key"][:SHORT],
            row["action"],
            f"{row['experts_per_layer']} (+{row['new_experts_per_layer']})",
            *(render.millions(row[f"parameters_{kind}"]) for kind in ("total", "active", "trainable")),
            f"{row['tokens']:,}",
            f"{row['epochs']:.2f}",
            f"{row['replay_fraction']:.0%}",
            f"{row['active_flops']:.1e}",
        )
    show(console, table)
    todo = [row for row in rows if row["action"] == "train"]
    tokens = sum(row["tokens"] for row in todo)
    text = f"{len(todo)} of {len(rows)} stages to train: {tokens:,} tokens, at most {disk / 1e6:,.1f} MB of disk"
    if todo:
        text += f", at least {max(row['memory_bytes'] for row in todo) / 1e6:,.1f} MB of memory for tensors"
        text += f" and about {LIBRARIES_BYTES / 1e6:,.0f} MB for Python and its libraries"
    console.print(text + ".")
    if how_long:
        console.print(how_long)
