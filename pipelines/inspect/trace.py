"""`lifelong-moe lineage RUN --expert …` and `--document …`: what made an expert, and what learned from a document."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from lifelong_moe.config.load import build_config
from lifelong_moe.data.text.batches import BatchStore
from lifelong_moe.data.tokens.prepare import read_texts
from lifelong_moe.data.tokens.records import DIGITS, HeldoutStore
from lifelong_moe.errors import ConfigError
from lifelong_moe.storage.keys import SHORT
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import require_head
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.store.trace import readers, trace_expert
from pipelines.shared.novelty import batch_source
from pipelines.shared.places import CACHE, ROOT
from pipelines.shared.remembering import remembered

LEAST_DIGITS = 8


@dataclass(frozen=True)
class Holder:
    """A distribution whose text holds a document."""

    distribution: str
    part: str
    """``train``, ``heldout``, ``near copy`` or ``unknown``."""
    document: str
    """SHA-256 of its text."""
    train_hash: str | None
    split_hash: str | None
    """These two of the distribution's training text; None where nobody remembers it."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data, without what is not known."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def expert(run: str, name: str, console: Console) -> dict[str, Any]:
    """Which stage and which text made an expert, and who has held its tensors since."""
    head, store = require_head(ROOT, run), StageStore(ROOT)
    if not head.stages:
        raise ConfigError(f"run {run} has no committed stage yet.")
    found = trace_expert(store.chain(head.stages[-1]), name)
    born = found.born
    texts = ", ".join(f"{name} {digest[:12]}" for name, digest in born.data.items())
    console.print(
        f"{name}: born in stage {born.stage} ({born.key[:SHORT]}) on {texts}; began: {born.began}", highlight=False
    )
    for row in found.stages:
        console.print(f"· {row.stage}: {row.tensors}, held by {row.held_by[:SHORT]}", highlight=False)
    return dataclasses.asdict(found)


def document(run: str, digest: str, console: Console) -> dict[str, Any]:
    """Which distributions hold a document, which stages of the run read those, and which experts they trained.

    Args:
        run: A run.
        digest: SHA-256 of the document's text, or its first digits, at least 8.
        console: Where people read.

    Raises:
        ConfigError: If the digits are too few, or nothing that the run read holds such a document.
    """
    digest = digest.lower()
    if len(digest) < LEAST_DIGITS or not set(digest) <= set("0123456789abcdef"):
        raise ConfigError(f"--document={digest}: give at least {LEAST_DIGITS} hexadecimal digits of its SHA-256.")
    head, store = require_head(ROOT, run), StageStore(ROOT)
    holders, gone = _holders(head, digest)
    if gone:
        console.print(f"not known of {', '.join(gone)}, whose text is gone: only what was held out", highlight=False)
    if not holders:
        raise ConfigError(f"--document={digest}: no text that run {run} reads holds such a document.")
    trained, left_out = (
        {row.split_hash for row in holders if row.split_hash and row.part == part} for part in ("train", "near copy")
    )
    found = readers(_stages(head, store), trained, left_out)
    for holder in holders:
        console.print(f"{holder.document[:SHORT]}: {holder.distribution}, {holder.part}", highlight=False)
    for one in found:
        console.print(f"· stage {one.stage} {one.role} {one.distribution}; it trained {one.experts}", highlight=False)
    if not found:
        console.print("· no stage was trained on it")
    held_by, stages = [holder.to_json() for holder in holders], [dataclasses.asdict(one) for one in found]
    return {"document": digest, "held_by": held_by, "stages": stages}


def _holders(head: RunHead, digest: str) -> tuple[list[Holder], list[str]]:
    """Distributions of the run, and batches that it looked at, with the document, and those that are gone; text is read
    again."""
    from omegaconf import OmegaConf

    config, batches = build_config(OmegaConf.create(head.config), is_stored=True), BatchStore(ROOT)
    sources = {name: config.distributions[name] for name in config.evaluated}
    found: list[Holder] = []
    for batch in batches.holding(digest):
        if (settled := head.batches.get(batch)) is None:
            continue
        if not batches.has_text(batch, settled.sources):
            found += _removed_holders(head, settled.name, batches.identities(batch, settled.sources), digest)
        else:
            split = settled.heldout_fraction, settled.heldout_sources
            sources[settled.name] = batch_source(str(batches.path(batch, settled.sources)), *split)
    known = remembered(head, head.config)
    texts = read_texts(sources, [], CACHE, known)
    for name, heldout in texts.heldout.items():
        corpus = texts.corpora.get(name)
        parts = {"heldout": heldout}
        if corpus is not None:
            parts = {"train": corpus.train, **parts, "near copy": corpus.near_copies}
        of = corpus or known.records[name]
        for part, documents in parts.items():
            for held in documents:
                if held.hash.startswith(digest):
                    found.append(Holder(name, part, held.hash, of.train_hash, of.split_hash))
    return found, list(texts.gone)


def _removed_holders(head: RunHead, name: str, identities: set[tuple[str, str]], digest: str) -> list[Holder]:
    """The same of a batch whose text was removed; ``part`` is "unknown" where nothing says more of it."""
    learned = head.texts.get(name)
    held = set()
    if learned is not None and learned.kept is not None:
        held = {document.hash for document in HeldoutStore(ROOT).documents(learned.kept)}
    rows = []
    for found in sorted(hashed for hashed, _ in identities if hashed.startswith(digest)):
        part = "heldout" if found in held else "train" if held else "unknown"
        if learned is not None and found[:DIGITS] in learned.left_out:
            part = "near copy"
        hashes = (learned.train_hash, learned.split_hash) if learned is not None else (None, None)
        rows.append(Holder(name, part, found, *hashes))
    return rows


def _stages(head: RunHead, store: StageStore) -> list[CommittedStage]:
    """Every committed stage of every version, each once, oldest first."""
    keys = [stage.key for version in head.versions for stage in version.stages]
    return [store.get(key) for key in dict.fromkeys([*keys, *head.stages])]
