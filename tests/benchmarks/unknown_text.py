"""What a mixture over generations costs on text of no generation's kind, beside the best generation in hindsight.

    python -m tests.benchmarks.unknown_text RUN STAGE FILE… [--tokens 12000]

The run is one of the store in ``mlruns``; each line of a file, ``.jsonl`` or ``.jsonl.gz``, is ``{"text"}``. Prints as
JSON, for each file, nats a token of the mixture and of each generation alone, and by how much more perplexity the
mixture costs than the best of them; and the same against the best generation of each document, which nobody can know
before the document is read.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lifelong_moe
from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.tokens.shards import tokenize_documents
from lifelong_moe.data.tokens.windows import evaluation_windows
from lifelong_moe.evaluation.loss import evaluate
from lifelong_moe.serving.model import StageModel
from tests.benchmarks.mixture_weights import costs_of


def texts_of(path: Path) -> list[str]:
    """The documents of a file."""
    data = path.read_bytes()
    plain = gzip.decompress(data) if path.suffix == ".gz" else data
    return [json.loads(line)["text"] for line in plain.splitlines()]


def measured(model: StageModel, texts: list[str], tokens: int) -> dict[str, Any]:
    """Losses of the mixture, of each generation alone, and what the mixture costs more than the best."""
    language_model = model.model
    shard = tokenize_documents([Document(text, "") for text in texts], model.tokenizer())
    windows = evaluation_windows(shard, language_model.architecture.model.context, tokens)
    found = evaluate(language_model, windows, distribution=None, batch_tokens=8192)
    as_stored = language_model.architecture
    try:
        rows = [row for row in costs_of(language_model, windows) if len(row)]
    finally:
        language_model.architecture = as_stored
    alone_G = torch.cat(rows).mean(dim=0)
    by_document = sum(float(row.sum(dim=0).min()) for row in rows) / sum(len(row) for row in rows)
    return {
        "tokens": found.tokens,
        "documents": found.documents,
        "mixture": found.nats_per_token,
        "readers": found.readers,
        "alone": {one.stage: loss for one, loss in zip(as_stored.generations, alone_G.tolist(), strict=True)},
        "more_than_best_percent": 100 * float(np.expm1(found.nats_per_token - float(alone_G.min()))),
        "more_than_best_of_each_document_percent": 100 * float(np.expm1(found.nats_per_token - by_document)),
    }


def main(arguments: list[str]) -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description="A mixture on text of no generation's kind.")
    parser.add_argument("run")
    parser.add_argument("stage")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=12_000)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = lifelong_moe.load(given.run, given.stage)
    print(json.dumps({path.name: measured(model, texts_of(path), given.tokens) for path in given.files}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
