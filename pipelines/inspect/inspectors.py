"""Commands that read a run: `status`, `report`, `lineage`, `evaluate`, `generate`, `inspect`.

Torch is imported inside functions, after the arguments were checked: `status` answers without it, and a mistyped name
costs no seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
"""Held-out tokens per distribution that `inspect` reads by default."""
EVALUATED_TOKENS = 8192
"""Tokens per forward pass of `evaluate`: bounds the memory, whatever the text's length."""


@dataclass(frozen=True)
class StageStatus:
    """How far a stage of a run is."""

    name: str
    key: str
    state: str
    """``committed``, ``under way`` or ``to do``."""
    checkpoint_step: int | None
    """Optimizer step of the last checkpoint of a stage under way."""


def status(run: str, console: Console) -> Mapping[str, Any]:
    """Show which stages are committed, under way and to do; returns the same for ``--json``."""
    head, store = require_head(ROOT, run), StageStore(ROOT)
    stages = []
    for name, key in zip(head.names, head.plan, strict=True):
        stage = store.find(key)
        steps = None if stage else work_under_way(ROOT / "work" / key[:SHORT])
        state = "committed" if stage else ("to do" if steps is None else "under way")
        stages.append(StageStatus(name, key, state, steps))
    table = Table(title=f"run {run}", title_justify="left")
    for header in ("stage", "key", "state", "checkpoint"):
        table.add_column(header)
    for row in stages:
        step = "" if row.checkpoint_step is None else f"step {row.checkpoint_step}"
        table.add_row(row.name, row.key[:SHORT], row.state, step)
    show(console, table)
    result: dict[str, Any] = {"run": run, "method": head.method, "stages": list(map(asdict, stages))}
    # Before the first tick, drop or consolidation there are no versions: the run then serves its last stage.
    if head.versions:
        now, tick = head.champion, head.last_tick
        console.print(describe(now), highlight=False)
        result["champion"] = {"version": now.id, "stage": now.stages[-1].name, "key": now.key, "since": now.at}
        result["last_tick_at"] = tick.at if tick else None
        if tick:
            console.print(f"last tick {tick.at}: {tick.outcome}: {tick.reason}", highlight=False)
    return result


def report(runs: list[str], console: Console) -> list[Mapping[str, Any]]:
    """Show the tables of runs side by side; returns their ``report.json``."""
    reports: list[Mapping[str, Any]] = []
    for run in runs:
        require_head(ROOT, run)
        found = RunRecord(ROOT, run).report()
        if found is None:
            raise ConfigError(f"run {run} has no report yet: no stage is committed and evaluated.")
        reports.append(found)
    # Printed through the type, returned as written: scripts get every key of an earlier version's report.
    render.report(console, [Report.from_json(one) for one in reports])
    return reports


def lineage(run: str, console: Console) -> list[Mapping[str, Any]]:
    """Show which stage created which experts, and from what data, with hashes."""
    rows = lineage_rows(StageStore(ROOT), require_head(ROOT, run).stages)
    table = Table(title=f"lineage of {run}", title_justify="left")
    for header in ("stage", "parent", "trained on", "created experts", "weights SHA-256"):
        table.add_column(header)
    for row in rows:
        data = "\n".join(f"{name} {digest[:12]}" for name, digest in row.data.items())
        parent = (row.parent or "–")[:SHORT]
        table.add_row(f"{row.name}\n{row.key[:SHORT]}", parent, data, row.experts, row.weights_sha256[:SHORT])
    show(console, table)
    return [asdict(row) for row in rows]


def open_stage(run: str, stage: str | None) -> tuple[StageStore, CommittedStage]:
    """A committed stage of a run by name; the last one by default."""
    key, store = require_head(ROOT, run).require_stage(stage), StageStore(ROOT)
    return store, store.get(key)


def check_label(stage: CommittedStage, label: str | None, console: Console) -> None:
    """Check ``--label`` against the stage's routing, and say which domain is assumed without one.

    Raises:
        ConfigError: If the routing ignores labels, or does not know this one.
    """
    architecture, routing = stage.architecture, stage.architecture.routing
    known = [name for name, _ in architecture.labels]
    # With one generation there is nothing to select, so its label is right in any mode.
    if label in known and len(architecture.generations) == 1:
        return
    if not routing.by_label:
        if label is not None:
            raise ConfigError(f"--label={label}: routing.mode={routing.mode} ignores labels; leave it out.")
    elif label is None:
        console.print(f"no --label: routed as {known[0]}; there are {', '.join(known)}")
    elif label not in known:
        raise ConfigError(f"--label={label} is unknown to stage {stage.name}; there are {', '.join(known)}.")


def evaluate(
    run: str, stage: str | None, data: str, label: str | None, console: Console, *, int8: bool = False
) -> Mapping[str, Any]:
    """Measure loss and bits per byte of a stage on any text.

    Args:
        run: A run.
        stage: Name of a committed stage; the last one if None.
        data: Path or glob.
        label: Domain of the text, for routing by label.
        console: Where people read.
        int8: Hold the weight matrices in 8 bits.
    """
    store, committed = open_stage(run, stage)
    check_label(committed, label, console)
    documents = read_documents(data, SourceConfig(files=data))
    from lifelong_moe.data.tokens.windows import evaluation_windows
    from lifelong_moe.evaluation.loss import evaluate as score_windows

    shard = tokenize_documents(documents, Tokenizer.from_text(store.tokenizer(committed)))
    model = _loaded(run, store, committed, int8=int8)
    context = model.architecture.model.context
    # sys.maxsize: the user named this text, so all of it is scored.
    result = score_windows(
        model, evaluation_windows(shard, context, sys.maxsize), distribution=label, batch_tokens=EVALUATED_TOKENS
    ).to_json()
    # A number per layer and expert: `inspect` shows it by name.
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
) -> Mapping[str, Any]:
    """Continue a text, or answer it as a prompt if the stage was fine-tuned; prints token by token.

    Args:
        run: A run.
        stage: Name of a committed stage; the last one if None.
        prompt: A prompt that holds the separator already begins the answer after it.
        sampling: Length, temperature, nucleus and seed.
        console: Where people read.
        label: Domain of the text, for routing by label.
        int8: Hold the weight matrices in 8 bits.
    """
    # Python hands over bytes of the command line that are not UTF-8 as lone surrogates.
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
    # Training pairs were encoded as prompt, separator, answer.
    prompt_ids = tokenizer.encode(f"{prompt}{SEPARATOR}" if answers and SEPARATOR not in prompt else prompt)
    for token in sample(model, prompt_ids, distribution=label, **asdict(sampling)):
        ids.append(token)
        text = tokenizer.decode(ids)
        # A character may span several tokens; until it is complete, decoding ends in a replacement character.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            console.print(text[len(shown) :], end="", markup=False, highlight=False)
            shown = text
    console.print()
    return {"run": run, "stage": committed.name, "prompt": prompt, "text": tokenizer.decode(ids), "tokens": len(ids)}


def inspect(run: str, stage: str | None, asked: InspectionRequest, console: Console) -> Mapping[str, Any]:
    """Inspect a stage on a given text, or on held-out text of the run's distributions if none is given.

    Raises:
        ConfigError: If options contradict each other, or name something that does not exist.
    """
    if asked.tokens is not None and (asked.text is not None or asked.text_file is not None):
        raise ConfigError(f"--tokens={asked.tokens} limits held-out text; leave it out with --text or --text-file.")
    # Cheap checks first: options, files, the run, and only then torch.
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
        raise ConfigError(f"--layer={layer}: the layers of {stage.name} are 0 to {architecture.model.layers - 1}.")
    if layer is not None and not architecture.experts_in(layer):
        raise ConfigError(f"--layer={layer} is dense: it has no experts to choose from.")


def _check_target(option: str, path: Path, ending: str) -> None:
    if not path.parent.is_dir():
        raise ConfigError(f"{option}={path}: no such directory: {path.parent}.")
    if path.suffix != ending or path.is_dir():
        raise ConfigError(f"{option}={path}: give the name of a file that ends in {ending}.")


def _given_text(text: str | None, text_file: str | None) -> str | None:
    if text is not None and text_file is not None:
        raise ConfigError("--text and --text-file exclude each other; give one.")
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
    """A stage's model on the run's device, without gradients."""
    from lifelong_moe.model.int8 import hold_in_int8
    from lifelong_moe.training.loop.device import configured_device
    from lifelong_moe.training.restore import load_model
    from pipelines.shared.workspace import recorded_trainer

    model = load_model(store, committed).requires_grad_(False)
    # Only frozen matrices are quantized, hence no gradients above; on the CPU, so the device holds 8 bits alone.
    if int8:
        hold_in_int8(model)
    return model.to(configured_device(recorded_trainer(run)))
