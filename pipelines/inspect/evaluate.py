"""`lifelong-moe evaluate`: loss and bits per byte of a stage on any text."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.formats.outcomes import Outcome, sentence
from lifelong_moe.data.text.files import read_files
from lifelong_moe.data.tokens.shards import tokenize_documents
from lifelong_moe.measures import duration
from pipelines.inspect.opening import check_label, load_on_device, open_stage

EVALUATED_TOKENS = 8192
"""Tokens per forward pass: bounds the memory, whatever the text's length."""


def evaluate_text(
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
    with console.status(f"reading {data}"):
        documents, files = read_files(data, SourceConfig(files=data))
    if any(file.outcome != Outcome.used for file in files):
        console.print(f"{data}: {sentence(files)}", style="yellow")
    from lifelong_moe.data.tokens.windows import evaluation_windows
    from lifelong_moe.evaluation.loss import evaluate

    what = f"{committed.name}: evaluating"
    with console.status(what) as status:
        shard = tokenize_documents(documents, store.tokenizer(committed, label))
        model = load_on_device(run, store, committed, int8=int8)
        # sys.maxsize: the user named this text, so all of it is scored.
        windows = evaluation_windows(shard, model.architecture.model.context, sys.maxsize)
        began = time.monotonic()

        def tell(scored: int) -> None:
            left = (time.monotonic() - began) * (windows.num_tokens / scored - 1)
            status.update(f"{what}, {scored:,} of {windows.num_tokens:,} tokens, {duration(left)} left")

        found = evaluate(model, windows, distribution=label, batch_tokens=EVALUATED_TOKENS, told=tell)
        result = found.to_json()
    # A number per layer and expert: `inspect` shows it by name.
    del result["expert_counts"]
    console.print(
        f"stage {committed.name} on {data}: {result['nats_per_token']:.4f} nats/token, {result['bits_per_byte']:.4f} "
        f"bits/byte ({result['documents']:,} documents, {result['tokens']:,} tokens, {result['bytes']:,} bytes)"
    )
    return {"run": run, "stage": committed.name, "key": committed.key, "data": data, **result}
