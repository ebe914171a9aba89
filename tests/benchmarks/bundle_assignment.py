"""How well the text so far picks the bundle: share of held-out tokens by true and assigned stage.

Run by hand; needs the corpora of ``LIFELONG_DATA``::

    LIFELONG_DATA=… .venv/bin/python tests/benchmarks/bundle_assignment.py [--out FILE] [key=value …]

Keys are those of ``routing`` (``margin=0``, ``clusters=1``, ``chunk_tokens=8``, …). Every stage is fitted on its own
training text alone, in order; BPE of 2,048 entries from the first one's. ``--out`` keeps the last
stage's numbers in a file, beside those of other settings. Legend: D distributions in order of learning.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from lifelong_moe.config.model import ModelConfig
from lifelong_moe.config.routing.base import Bundles
from lifelong_moe.config.routing.topk import LearnedConfig
from lifelong_moe.data.tokens.tokenizer import Tokenizer, train_tokenizer
from lifelong_moe.growth.clusters import fit_document_clusters
from lifelong_moe.model.domains import DocumentClusters
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Architecture, Generation
from tests.benchmarks.provenance import keep, made_with

ORDER = ("wiki_en", "multilingual", "dialogue", "code_python")
VOCAB_SIZE = 2048
PREFIXES = (1, 4, 8, 16, 32, 64, 128, 256, 512)
"""Positions in a document at which prefix length is reported."""

Documents = list[NDArray[np.int64]]


def read(root: Path, name: str, part: str) -> list[str]:
    """Texts of one file."""
    with gzip.open(root / f"{name}.{part}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def tokenized(tokenizer: Tokenizer, texts: list[str]) -> Documents:
    """Documents with BOS."""
    return [np.array([tokenizer.bos_id, *ids], np.int64) for ids in tokenizer.encode_batch(texts)]


def unfitted(routing: LearnedConfig, tokenizer: Tokenizer) -> LanguageModel:
    """A model too small to matter, with room for the first stage's centroids."""
    shape = ModelConfig(
        layers=1, width=8, heads=1, kv_heads=1, expert_width=8, experts=2, context=8, document_mask=True
    )
    first = (Generation(ORDER[0], 2),)
    return LanguageModel(Architecture(shape, routing, tokenizer.vocab_size, tokenizer.bos_id, first))


def confusion(clusters: DocumentClusters, heldout: list[Documents]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens by distribution and bundle ``(D, D)``, of all chunks and of those after the first."""
    shape = (len(heldout), len(heldout))
    every, later = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    chunk = clusters.routing.chunk_tokens
    for true, documents in enumerate(heldout):
        for document in documents:
            groups = clusters.domain_ids(document)
            every[true] += np.bincount(groups, minlength=len(heldout))
            later[true] += np.bincount(groups[chunk:], minlength=len(heldout))
    return every, later


def by_prefix(clusters: DocumentClusters, heldout: list[Documents]) -> NDArray[np.float64]:
    """Share of documents in their own bundle at each of ``PREFIXES`` that they reach ``(D, P)``."""
    shares = np.full((len(heldout), len(PREFIXES)), np.nan)
    for true, documents in enumerate(heldout):
        ids = [clusters.domain_ids(document) for document in documents]
        for column, position in enumerate(PREFIXES):
            reached = [groups[position] for groups in ids if len(groups) > position]
            shares[true, column] = np.mean(np.array(reached) == true)
    return shares


def show(title: str, rows: NDArray[np.floating], columns: list[str]) -> None:
    """A table in per cent."""
    print(f"{title:<28}" + "".join(f"{column:>14}" for column in columns))
    for name, row in zip(ORDER, rows, strict=False):
        print(f"{name:<28}" + "".join(f"{100 * value:14.3f}" for value in row))


def record(path: Path, origin: dict[str, Any], settings: dict[str, int | float], tokens: NDArray[np.int64]) -> None:
    """Add held-out tokens by distribution and bundle to a file, in place of what it had of the same settings."""
    known = json.loads(path.read_text(encoding="utf-8"))["settings"] if path.is_file() else []
    others = [one for one in known if {key: one[key] for key in settings} != settings]
    entry = settings | {"commit": origin["commit"], "tokens": tokens.tolist()}
    found = sorted([*others, entry], key=lambda one: (one["margin"], one["chunk_tokens"]))
    keep(path, {"distributions": ORDER, "settings": found}, origin)


def main(overrides: Sequence[str], out: Path | None, origin: dict[str, Any]) -> None:
    """Fit stage by stage, and print."""
    root = Path(os.environ["LIFELONG_DATA"])
    tokenizer = train_tokenizer(read(root, ORDER[0], "train"), VOCAB_SIZE)
    train = [tokenized(tokenizer, read(root, name, "train")) for name in ORDER]
    heldout = [tokenized(tokenizer, read(root, name, "validation")) for name in ORDER]
    wanted = OmegaConf.merge(
        OmegaConf.structured(LearnedConfig(bundles=Bundles.cluster)), OmegaConf.from_dotlist(overrides)
    )
    routing: LearnedConfig = OmegaConf.to_object(wanted)  # type: ignore[assignment]
    print(f"margin={routing.margin} clusters={routing.num_clusters(2)} chunk_tokens={routing.chunk_tokens}")
    model = unfitted(routing, tokenizer)
    assert model.document_clusters is not None
    before = None
    for stage, name in enumerate(ORDER):
        if stage:
            model.document_clusters.add(2)
        began = time.perf_counter()
        fit_document_clusters(model, train[stage], seed=1000 * stage)
        fitted = time.perf_counter() - began
        known = heldout[: stage + 1]
        every, later = confusion(model.document_clusters, known)
        old = [np.concatenate([model.document_clusters.domain_ids(d) for d in documents]) for documents in known]
        changed = [np.mean(a != b) for a, b in zip(before or [], old, strict=False)]
        print(f"\nafter {name} (fitted in {fitted:.1f} s); changed: {', '.join(f'{100 * c:.3f} %' for c in changed)}")
        show("all chunks, %", every / every.sum(axis=1, keepdims=True), list(ORDER[: stage + 1]))
        show("without chunk 0, %", later / later.sum(axis=1, keepdims=True), list(ORDER[: stage + 1]))
        before = old
    print()
    show("own bundle at position, %", by_prefix(model.document_clusters, heldout), [str(p) for p in PREFIXES])
    if out:
        settings = {"chunk_tokens": routing.chunk_tokens, "margin": routing.margin, "clusters": routing.num_clusters(2)}
        record(out, origin, settings, every)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to keep the numbers, JSON")
    parser.add_argument("overrides", nargs="*", help="keys of routing, key=value")
    options = parser.parse_args()
    main(options.overrides, options.out, made_with())
