"""Text to tokens on disk through the data preparation, against ``tokenizers`` alone on the same text and threads.

The text is built in, repeated with a number in each sentence's place, so that no two documents are equal.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lifelong_moe.config.data import SourceConfig, TokenizerConfig
from lifelong_moe.data.text.builtin import english_docs
from lifelong_moe.data.text.documents import Corpus, Document
from lifelong_moe.data.text.split import build_corpus
from lifelong_moe.data.tokens.shards import tokenize_corpus
from lifelong_moe.data.tokens.tokenizer import Tokenizer, train_tokenizer
from tests.benchmarks.performance.clock import Ratio, paired
from tests.benchmarks.performance.goals import judged

MEGABYTES = 12
ROUNDS = 9


def documents(megabytes: float) -> list[Document]:
    """So much text."""
    found, size, originals = [], 0.0, list(english_docs())
    for document in _again(originals):
        found.append(document)
        size += document.num_bytes / 1e6
        if size >= megabytes:
            return found
    raise ValueError("this installation carries no text")


def _again(originals: list[Document]) -> Iterator[Document]:
    for turn in range(10_000):
        for number, original in enumerate(originals):
            text = original.text.replace(". ", f". {turn}.{number} ")
            yield Document(f"{turn} {number} {text}", f"{turn}/{original.source}")


def measure() -> dict[str, Any]:
    """Speed of ours relative to ``tokenizers``: of the preparation's tokenizing and packing, on processor time."""
    found = documents(MEGABYTES)
    corpus = build_corpus("text", found, SourceConfig(builtin="english_docs", heldout_fraction=0.01))
    tokenizer = train_tokenizer((d.text for d in found[:2000]), TokenizerConfig().vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        times = compare(corpus, tokenizer, Path(folder))
    num_bytes = sum(d.num_bytes for d in (*corpus.train, *corpus.heldout))
    speed = {"value": 1 / times.ratio, "low": 1 / times.high, "high": 1 / times.low}
    return {
        "goals": {"P9": judged(**speed, goal=">= 0.9", unit="x")},
        "detail": {
            "megabytes": round(num_bytes / 1e6, 2),
            "documents": len(found),
            "seconds": times.json()["seconds"],
            "megabytes_per_second": [round(num_bytes / 1e6 / s, 3) for s in times.seconds],
            "rounds": times.rounds,
        },
    }


def compare(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> Ratio:
    """Our time over theirs."""
    import tokenizers

    theirs = tokenizers.Tokenizer.from_str(tokenizer.text)
    texts = [d.text for d in (*corpus.train, *corpus.heldout)]
    turn = 0

    def ours() -> None:
        """Into a cache that is empty each time, so that all of it is done."""
        nonlocal turn
        turn += 1
        tokenize_corpus(corpus, tokenizer, folder / str(turn))

    def alone() -> int:
        """Only the ids, as a list of lists."""
        return sum(len(encoding.ids) for encoding in theirs.encode_batch_fast(texts, add_special_tokens=False))

    return paired(ours, alone, ROUNDS, warmup=1)


def main() -> None:
    """Print what was measured as one line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print(json.dumps(measure()))


if __name__ == "__main__":
    main()
