"""`lifelong-moe lineage RUN --expert …` and `--document …`: the history of an expert, or of a document."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from lifelong_moe.config.load import build_config
from lifelong_moe.config.references import stored_config
from lifelong_moe.config.retraining.operation import InboxConfig
from lifelong_moe.data.arrivals.batches import BatchStore
from lifelong_moe.data.tokens.records import DIGITS, HeldoutStore
from lifelong_moe.data.tokens.texts import read_texts
from lifelong_moe.errors import ConfigError, LifelongError
from lifelong_moe.storage.keys import SHORT
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import require_head
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.store.trace import readers, trace_expert
from pipelines.shared.novelty import batch_source
from pipelines.shared.places import CACHE, ROOT
from pipelines.shared.remembering import remembered

# 32 bits: among a million documents, a chance of 1 in 4,000 that another one matches.
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
    """Both identify the distribution's training text; None if no record of it is left."""

    def to_json(self) -> Mapping[str, str]:
        """Plain JSON data, without unknown fields."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def expert(run: str, name: str, console: Console) -> Mapping[str, Any]:
    """Show which stage created an expert, from what text, and which stages hold its tensors."""
    head, store = require_head(ROOT, run), StageStore(ROOT)
    if not head.stages:
        raise ConfigError(f"run {run} has no committed stage yet.")
    found = trace_expert(store.chain(head.stages[-1]), store.holders, name)
    born = found.born
    # No text that is known made a checkpoint's experts.
    texts = ", ".join(f"{name} {digest[:12]}" for name, digest in born.data.items()) or "a checkpoint"
    console.print(
        f"{name}: created by stage {born.stage} ({born.key[:SHORT]}) from {texts}; initialized: {born.began}",
    )
    for row in found.stages:
        console.print(f"· {row.stage}: {row.tensors}, held by {row.held_by[:SHORT]}")
    return dataclasses.asdict(found)


def document(run: str, digest: str, console: Console) -> Mapping[str, Any]:
    """Show which distributions hold a document, which stages read them, and which experts those trained.

    Args:
        run: A run.
        digest: SHA-256 of the document's text, or at least its first 8 digits.
        console: Where people read.

    Raises:
        ConfigError: If the digits are too few, or no text of the run holds such a document.
    """
    digest = digest.lower()
    if len(digest) < LEAST_DIGITS or not set(digest) <= set("0123456789abcdef"):
        raise ConfigError(f"--document={digest}: give at least {LEAST_DIGITS} hexadecimal digits of its SHA-256.")
    head, store = require_head(ROOT, run), StageStore(ROOT)
    holders, gone = _holders(head, digest)
    for name, error in gone.items():
        console.print(f"{name}: only held-out documents could be searched, for its text is not read: {error}")
    if not holders:
        raise ConfigError(f"--document={digest}: no text that run {run} reads holds such a document.")
    # A stage that reads the distribution did not train on a document which is a near copy of held-out text.
    trained, left_out = (
        {row.split_hash for row in holders if row.split_hash and row.part == part} for part in ("train", "near copy")
    )
    found = readers(_stages(head, store), store.holders, trained, left_out)
    for holder in holders:
        console.print(f"{holder.document[:SHORT]}: {holder.distribution}, {holder.part}")
    for one in found:
        console.print(f"· stage {one.stage} {one.role} {one.distribution}; it trained {one.experts}")
    if not found:
        console.print("· no stage was trained on it")
    held_by, stages = [holder.to_json() for holder in holders], [dataclasses.asdict(one) for one in found]
    return {"document": digest, "held_by": held_by, "stages": stages}


def _holders(head: RunHead, digest: str) -> tuple[list[Holder], dict[str, LifelongError]]:
    """Search the text of the run's distributions and batches.

    Returns:
        Where the document was found, and why text of other distributions was not read.
    """
    config, batches = build_config(stored_config(head.config), is_stored=True), BatchStore(ROOT)
    sources = {name: config.distributions[name] for name in config.evaluated}
    found: list[Holder] = []
    for batch in batches.holding(digest):
        if (settled := head.batches.get(batch)) is None:
            continue  # all runs share the store of batches; this run has not decided about this one
        if not batches.has_text(batch, settled.sources):
            # Hashes outlive removed text, so this much can still be told.
            found += _removed_holders(head, settled.name, batches.identities(batch, settled.sources), digest)
        else:
            # What the first versions did not record is the default, as where the stage is planned anew.
            share = settled.heldout_fraction
            split = InboxConfig.heldout_fraction if share is None else share, settled.heldout_sources
            sources[settled.name] = batch_source(str(batches.path(batch, settled.sources)), *split)
    known = remembered(head, None)
    texts = read_texts(sources, [], CACHE, known)
    texts.remember()
    for name, heldout in texts.heldout.items():
        corpus = texts.corpora.get(name)
        parts = {"heldout": heldout}
        if corpus is not None:
            parts = {"train": corpus.train, **parts, "near copy": corpus.near_copies}
        # Where only held-out text is left, the record has the hashes.
        of = corpus or known.records[name]
        for part, documents in parts.items():
            for held in documents:
                if held.hash.startswith(digest):
                    found.append(Holder(name, part, held.hash, of.train_hash, of.split_hash))
    return found, texts.gone


def _removed_holders(head: RunHead, name: str, identities: set[tuple[str, str]], digest: str) -> list[Holder]:
    """Where a batch whose text was removed held the document.

    ``part`` is ``unknown`` if its held-out documents were not kept: then nothing tells which part it fell into.
    """
    learned = head.texts.get(name)
    held = set()
    if learned is not None and learned.kept is not None:
        held = {document.hash for document in HeldoutStore(ROOT).documents(learned.kept)}
    rows = []
    for found in sorted(hashed for hashed, _ in identities if hashed.startswith(digest)):
        part = "heldout" if found in held else "train" if held else "unknown"
        # The record keeps only this many digits of each hash.
        if learned is not None and found[:DIGITS] in learned.left_out:
            part = "near copy"
        hashes = (learned.train_hash, learned.split_hash) if learned is not None else (None, None)
        rows.append(Holder(name, part, found, *hashes))
    return rows


def _stages(head: RunHead, store: StageStore) -> list[CommittedStage]:
    """Every committed stage of every version, each once, oldest first."""
    # The head's own stages too: before the first tick there are no versions.
    keys = [stage.key for version in head.versions for stage in version.stages]
    return [store.get(key) for key in dict.fromkeys([*keys, *head.stages])]
