"""Sizes of a first model, by rules, from the amount of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SMALL_BYTES = 1_000_000
"""Training text of all folders from which on the model is the one that README's figures are of."""
BYTES_PER_TOKEN = 3
"""About what a token of a vocabulary of some thousand entries stands for; of a small vocabulary it is less."""
PASSES = 4
"""Most passes over a folder's text: up to four are worth nearly as much as new text (arXiv:2305.16264)."""
MOST_TOKENS = 1_000_000
"""Most training tokens of a stage: some minutes on two processor cores."""
LEAST_STEPS = 20
"""Fewest steps of a stage, however little text there is."""
MOST_CLUSTERS = 8
"""Clusters of text by which a generation's text is recognized, and the fewest documents of a stage."""


@dataclass(frozen=True, kw_only=True)
class FolderText:
    """What is known of a folder's text."""

    name: str
    """Of its distribution."""
    pattern: str
    """Glob of its files."""
    train_bytes: int
    documents: int
    """For training."""
    other_encodings: int = 0
    """Files that were left out, since they are not UTF-8."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is chosen."""

    is_small: bool
    vocabulary: int
    layers: int
    width: int
    experts: int
    context: int
    batch_tokens: int
    clusters: int
    tokens: tuple[int, ...]
    """Of each stage."""


def sizes_for(folders: Sequence[FolderText]) -> Sizes:
    """Choose sizes for a stream of folders, each a stage."""
    is_small = sum(folder.train_bytes for folder in folders) < SMALL_BYTES
    # From too little text a large vocabulary learns whole sentences by heart. The first folder's text makes it.
    vocabulary = min(4096, max(512, 1 << (folders[0].train_bytes // 250).bit_length()))
    context, batch_tokens = (128, 1024) if is_small else (256, 2048)
    return Sizes(
        is_small=is_small,
        vocabulary=vocabulary,
        layers=2 if is_small else 4,
        width=64 if is_small else 128,
        experts=4 if is_small else 8,
        context=context,
        batch_tokens=batch_tokens,
        clusters=min(MOST_CLUSTERS, *(folder.documents for folder in folders)),
        tokens=tuple(_tokens(folder, batch_tokens) for folder in folders),
    )


def _tokens(folder: FolderText, batch_tokens: int) -> int:
    """Training tokens of a stage, in whole steps."""
    wanted = min(PASSES * folder.train_bytes // BYTES_PER_TOKEN, MOST_TOKENS)
    return max(LEAST_STEPS, wanted // batch_tokens) * batch_tokens
