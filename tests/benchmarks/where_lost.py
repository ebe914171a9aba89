"""Where in a text a later stage loses: by position, how much more texts cost after it than after an earlier one.

    python -m tests.benchmarks.where_lost RUN EARLIER LATER FILE.jsonl.gz [TOKENS]

The run is one of the store in ``mlruns``; each line of the file is ``{"text"}``.
"""

from __future__ import annotations

import gzip
import itertools
import json
import sys

import numpy as np
from numpy.typing import NDArray

import lifelong_moe
from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.tokens.shards import tokenize_documents
from lifelong_moe.data.tokens.windows import evaluation_windows
from lifelong_moe.evaluation.reading import read_windows
from lifelong_moe.serving.model import StageModel

BORDERS = (0, 8, 16, 32, 64, 128, sys.maxsize)
BATCH_TOKENS = 8192


def costs(model: StageModel, texts: list[str], tokens: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Nats of each scored token, and how many tokens of its text precede it."""
    shard = tokenize_documents([Document(text, "") for text in texts], model.tokenizer())
    windows = evaluation_windows(shard, model.model.architecture.model.context, tokens)
    nats, lengths = np.zeros(windows.shard.num_tokens), np.diff(windows.shard.offsets)
    for batch in read_windows(model.model, windows, distribution=None, batch_tokens=BATCH_TOKENS):
        nats[batch.tokens(windows)] = batch.nats_T.cpu().numpy()
    before = np.arange(len(nats)) - np.repeat(windows.shard.offsets[:-1], lengths)
    return nats[windows.counted], before[windows.counted]


def main(run: str, earlier: str, later: str, file: str, tokens: str = "12000") -> None:
    """Print the rise, and the share of each range of positions in it."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    (old, before), (new, _) = (costs(lifelong_moe.load(run, stage), texts, int(tokens)) for stage in (earlier, later))
    rise = new - old
    print(f"{len(rise):,} tokens, perplexity {100 * np.expm1(rise.mean()):+.2f} %")
    for low, high in itertools.pairwise(BORDERS):
        here = (before >= low) & (before < high)
        share = 100 * rise[here].sum() / rise.sum()
        print(f"tokens from {low} on: {share:5.1f} % of it, {rise[here].mean():+.1e} nats each")


if __name__ == "__main__":
    main(*sys.argv[1:])
