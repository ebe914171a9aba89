"""What can be asked of a run that exists: status, report, lineage, evaluation, generation, inspection.

Nothing heavy is imported on top: a question that needs no model is answered without torch, and what the command line
names is looked at first where one does.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.text.files import read_documents
from lifelong_moe.data.text.jsonl import SEPARATOR
from lifelong_moe.data.tokens.shards import tokenize_documents
from lifelong_moe.data.tokens.tokenizer import Tokenizer
from lifelong_moe.errors import ConfigError
from lifelong_moe.reports.report import Report
from lifelong_moe.storage.keys import SHORT
from lifelong_moe.store.lineage import lineage_rows, work_under_way
from lifelong_moe.store.runs import RunRecord, require_head
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.store.versions import describe
from pipelines.run import render
from pipelines.shared.options import InspectionRequest, SamplingOptions
from pipelines.shared.places import ROOT
from pipelines.shared.tables import show

if TYPE_CHECKING:
    from lifelong_moe.model.transformer import LanguageModel

HELDOUT_TOKENS = 8192
"""Held-out tokens a distribution that an inspection reads, if none are asked for."""


def status(run: str, console: Console) -> dict[str, Any]:
    """Stages committed, under way, and to do."""
    head, store = require_head(ROOT, run), StageStore(ROOT)
    stages: list[dict[str, Any]] = []
    for name, key in zip(head.names, head.plan, strict=True):
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
    show(console, table)
    result: dict[str, Any] = {"run": run, "method": head.method, "stages": stages}
    if head.versions:
        now, tick = head.champion, head.last_tick
        console.print(describe(now), highlight=False)
        result["champion"] = {"version": now.id, "stage": now.stages[-1].name, "key": now.key, "since": now.at}
        result["last_tick_at"] = tick.at if tick else None
        if tick:
            console.print(f"last tick {tick.at}: {tick.outcome}: {tick.reason}", highlight=False)
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
    render.report(console, [Report.from_json(one) for one in reports])
    return reports


def lineage(run: str, console: Console) -> list[dict[str, Any]]:
    """Which stage, on which data, bore which experts, with hashes."""
    rows = lineage_rows(StageStore(ROOT), require_head(ROOT, run).stages)
    table = Table(title=f"lineage of {run}", title_justify="left")
    for header in ("stage", "parent", "trained on", "bore experts", "weights SHA-256"):
        table.add_column(header)
    for row in rows:
        data = "\n".join(f"{name} {digest[:12]}" for name, digest in row.data.items())
        parent = (row.parent or "–")[:SHORT]
        table.add_row(f"{row.name}\n{row.key[:SHORT]}", parent, data, row.experts, row.weights_sha256[:SHORT])
    show(console, table)
    return list(map(asdict, rows))


def open_stage(run: str, stage: str | None) -> tuple[StageStore, CommittedStage]:
    """A committed stage of a run by name; the last one by default."""
    key, store = require_head(ROOT, run).require_stage(stage), StageStore(ROOT)
    return store, store.get(key)


def check_label(stage: CommittedStage, label: str | None, console: Console) -> None:
    """Refuse a label that would mean nothing; say so where one is missing."""
    architecture, routing = stage.architecture, stage.architecture.routing
    known = [name for name, _ in architecture.labels]
    if label in known and len(architecture.generations) == 1:
        return  # what a first stage's text is called; with one generation all text goes there
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
    documents = read_documents(data, SourceConfig(files=data))
    from lifelong_moe.data.tokens.windows import evaluation_windows
    from lifelong_moe.evaluation.loss import evaluate as score_windows

    shard = tokenize_documents(documents, Tokenizer.from_text(store.tokenizer(committed)))
    model = _loaded(run, store, committed, int8=int8)
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
    sampling: SamplingOptions,
    console: Console,
    *,
    label: str | None = None,
    int8: bool = False,
) -> dict[str, Any]:
    """Continue a text, or answer a prompt where the stage was fine-tuned, printing as it comes.

    A prompt to be answered is encoded as pairs are; one that holds the separator already says how the answer begins.
    """
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ConfigError("the prompt is not UTF-8.")
    store, committed = open_stage(run, stage)
    check_label(committed, label, console)
    from lifelong_moe.model.sampling import sample

    tokenizer = Tokenizer.from_text(store.tokenizer(committed))
    model = _loaded(run, store, committed, int8=int8)
    ids: list[int] = []
    shown = ""
    answers = committed.spec.finetune is not None
    console.print(prompt, end="\n" if answers else "", markup=False, highlight=False)
    prompt_ids = tokenizer.encode(f"{prompt}{SEPARATOR}" if answers and SEPARATOR not in prompt else prompt)
    for token in sample(model, prompt_ids, distribution=label, **asdict(sampling)):
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may span several tokens
            console.print(text[len(shown) :], end="", markup=False, highlight=False)
            shown = text
    console.print()
    return {"run": run, "stage": committed.name, "prompt": prompt, "text": tokenizer.decode(ids), "tokens": len(ids)}


def inspect(run: str, stage: str | None, asked: InspectionRequest, console: Console) -> dict[str, Any]:
    """Inspect a stage on a text, or without one on held-out text of the run's distributions.

    Raises:
        ConfigError: If the options do not go together, or what they name is not there.
    """
    if asked.tokens is not None and (asked.text is not None or asked.text_file is not None):
        raise ConfigError(f"--tokens={asked.tokens} bounds held-out text; leave it out with --text or --text-file.")
    given = _given_text(asked.text, asked.text_file)
    for option, value in (("--layer", asked.layer), ("--html", asked.html), ("--label", asked.label)):
        if given is None and value is not None:
            raise ConfigError(f"{option}={value} needs a text: give --text or --text-file.")
    for option, path, ending in (("--html", asked.html, ".html"), ("--save", asked.save, ".parquet")):
        if path is not None:
            _check_target(option, Path(path), ending)
    store, committed = open_stage(run, stage)
    _check_layer(committed, asked.layer)
    if given is not None:
        check_label(committed, asked.label, console)
        from pipelines.inspect.inspect import on_text

        result = on_text(run, store, committed, given, asked, console)
    else:
        from pipelines.inspect.inspect import on_heldout

        result = on_heldout(run, store, committed, asked.tokens or HELDOUT_TOKENS, asked.save, console)
    return {"run": run, "stage": committed.name, "key": committed.key, **result}


def _check_layer(stage: CommittedStage, layer: int | None) -> None:
    architecture = stage.architecture
    if layer is not None and layer >= architecture.model.layers:
        raise ConfigError(f"--layer={layer}: layers of {stage.name} are 0 to {architecture.model.layers - 1}.")
    if layer is not None and not architecture.experts_in(layer):
        raise ConfigError(f"--layer={layer} is dense and has no experts to choose from.")


def _check_target(option: str, path: Path, ending: str) -> None:
    if not path.parent.is_dir():
        raise ConfigError(f"{option}={path}: there is no directory {path.parent}.")
    if path.suffix != ending or path.is_dir():
        raise ConfigError(f"{option}={path}: it takes the name of a file that ends in {ending}.")


def _given_text(text: str | None, text_file: str | None) -> str | None:
    if text is not None and text_file is not None:
        raise ConfigError("--text and --text-file exclude each other.")
    if text_file is not None:
        try:
            return Path(text_file).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(f"--text-file={text_file}: no such file.") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"--text-file={text_file}: not UTF-8 at byte {error.start}.") from None
    if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError("--text is not UTF-8.")
    return text


def _loaded(run: str, store: StageStore, committed: CommittedStage, *, int8: bool) -> LanguageModel:
    """A stage's model on the run's device, for reading only."""
    from lifelong_moe.model.int8 import hold_in_int8
    from lifelong_moe.training.loop.device import configured_device
    from lifelong_moe.training.restore import load_model
    from pipelines.shared.workspace import recorded_trainer

    model = load_model(store, committed).requires_grad_(False)
    if int8:
        hold_in_int8(model)
    return model.to(configured_device(recorded_trainer(run)))
