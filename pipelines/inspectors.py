"""What can be asked of a run that exists: status, report, lineage, evaluation, generation."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from lifelong_moe.data.config import SourceConfig
from lifelong_moe.data.files import read_documents
from lifelong_moe.data.shards import tokenize_documents
from lifelong_moe.data.tokenizer import Tokenizer
from lifelong_moe.data.windows import evaluation_windows
from lifelong_moe.errors import ConfigError
from lifelong_moe.evaluation.loss import evaluate as score_windows
from lifelong_moe.model.architecture import Architecture
from lifelong_moe.model.generation import generate as sample
from lifelong_moe.model.int8 import hold_in_int8
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.stages.keys import SHORT
from lifelong_moe.stages.lineage import lineage_rows, work_under_way
from lifelong_moe.stages.runs import RunRecord, require_head
from lifelong_moe.stages.store import CommittedStage, StageStore
from lifelong_moe.stages.versions import champion, describe
from lifelong_moe.training.stage import load_model
from pipelines import render
from pipelines.workspace import ROOT


def status(run: str, console: Console) -> dict[str, Any]:
    """Stages committed, under way, and to do."""
    head, store = require_head(ROOT, run), StageStore(ROOT)
    stages = []
    for name, key in zip(head["names"], head["plan"], strict=True):
        stage = store.find(key)
        steps = None if stage else work_under_way(ROOT / "work" / key[:SHORT])
        state = "committed" if stage else ("to do" if steps is None else "under way")
        stages.append({"name": name, "key": key, "state": state, "checkpoint_step": steps})
    table = Table(title=f"run {run}", title_justify="left")
    for header in ("stage", "key", "state", "checkpoint"):
        table.add_column(header)
    for row in stages:
        step = "" if row["checkpoint_step"] is None else f"step {row['checkpoint_step']}"
        table.add_row(row["name"], row["key"][:SHORT], row["state"], step)
    console.print(table)
    result: dict[str, Any] = {"run": run, "method": head["method"], "stages": stages}
    if head.get("versions"):
        now, tick = champion(head), head.get("last_tick")
        console.print(describe(now), highlight=False)
        result["champion"] = {"version": now.id, "stage": now.stages[-1].name, "key": now.key, "since": now.at}
        result["last_tick_at"] = tick["at"] if tick else None
        if tick:
            console.print(f"last tick {tick['at']}: {tick['outcome']}: {tick['reason']}", highlight=False)
    return result


def report(runs: list[str], console: Console) -> list[dict[str, Any]]:
    """Tables of one or more runs, side by side."""
    reports = []
    for run in runs:
        require_head(ROOT, run)
        found = RunRecord(ROOT, run).report()
        if found is None:
            raise ConfigError(f"run {run} has no report yet: no stage is committed and evaluated.")
        reports.append(found)
    render.report(console, reports)
    return reports


def lineage(run: str, console: Console) -> list[dict[str, Any]]:
    """Which stage, on which data, bore which experts, with hashes."""
    rows = lineage_rows(StageStore(ROOT), require_head(ROOT, run)["stages"])
    table = Table(title=f"lineage of {run}", title_justify="left")
    for header in ("stage", "parent", "trained on", "bore experts", "weights SHA-256"):
        table.add_column(header)
    for row in rows:
        data = "\n".join(f"{name} {digest[:12]}" for name, digest in row["data"].items())
        parent = (row["parent"] or "–")[:SHORT]
        table.add_row(
            f"{row['name']}\n{row['key'][:SHORT]}", parent, data, row["experts"], row["weights_sha256"][:SHORT]
        )
    console.print(table)
    return rows


def open_stage(run: str, stage: str | None) -> tuple[StageStore, CommittedStage]:
    """A committed stage of a run by name; the last one by default."""
    head, store = require_head(ROOT, run), StageStore(ROOT)
    committed = [store.get(key) for key in head["stages"]]
    if not committed:
        raise ConfigError(f"run {run} has no committed stage yet.")
    if stage is None:
        return store, committed[-1]
    for one in committed:
        if one.name == stage:
            return store, one
    raise ConfigError(f"run {run} has no committed stage {stage}; there are {', '.join(s.name for s in committed)}.")


def check_label(stage: CommittedStage, label: str | None, console: Console) -> None:
    """Refuse a label that would mean nothing; say so where one is missing."""
    architecture = stage.config["architecture"]
    known = [name for name, _ in architecture["labels"]]
    routing = Architecture.from_json(architecture).routing
    if not routing.by_label:
        if label is not None:
            raise ConfigError(f"--label={label}: routing.mode={routing.mode} does not look at labels.")
    elif label is None:
        console.print(f"no --label: routed as {known[0]}; there are {', '.join(known)}")
    elif label not in known:
        raise ConfigError(f"--label={label} is unknown to stage {stage.name}; there are {', '.join(known)}.")


def evaluate(
    run: str, stage: str | None, data: str, label: str | None, console: Console, *, int8: bool = False
) -> dict[str, Any]:
    """Loss and bits per byte of a stage on any text, its matrices in 8 bits if asked."""
    store, committed = open_stage(run, stage)
    check_label(committed, label, console)
    tokenizer = Tokenizer.from_text(store.tokenizer(committed))
    shard = tokenize_documents(read_documents(data, SourceConfig(files=data)), tokenizer)
    model = _loaded(store, committed, int8=int8)
    context = model.architecture.model.context
    result = score_windows(
        model, evaluation_windows(shard, context, sys.maxsize), distribution=label, batch_tokens=8192
    ).to_json()
    del result["expert_counts"]
    console.print(
        f"{committed.name} on {data}: {result['nats_per_token']:.4f} nats/token, {result['bits_per_byte']:.4f} "
        f"bits/byte ({result['documents']:,} documents, {result['tokens']:,} tokens, {result['bytes']:,} bytes)"
    )
    return {"run": run, "stage": committed.name, "key": committed.key, "data": data, **result}


def generate(
    run: str,
    stage: str | None,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    label: str | None,
    console: Console,
    int8: bool = False,
) -> dict[str, Any]:
    """Continue a text, printing as it comes."""
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ConfigError("the prompt is not UTF-8.")
    store, committed = open_stage(run, stage)
    check_label(committed, label, console)
    tokenizer = Tokenizer.from_text(store.tokenizer(committed))
    model = _loaded(store, committed, int8=int8)
    ids: list[int] = []
    shown = ""
    console.print(prompt, end="", markup=False, highlight=False)
    for token in sample(
        model,
        tokenizer.encode(prompt),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        distribution=label,
    ):
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may span several tokens
            console.print(text[len(shown) :], end="", markup=False, highlight=False)
            shown = text
    console.print()
    return {"run": run, "stage": committed.name, "prompt": prompt, "text": tokenizer.decode(ids), "tokens": len(ids)}


def _loaded(store: StageStore, committed: CommittedStage, *, int8: bool) -> LanguageModel:
    """A stage's model, for reading only."""
    model = load_model(store, committed).requires_grad_(False)
    if int8:
        hold_in_int8(model)
    return model
