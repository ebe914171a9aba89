"""A configuration as a file for people, each line with its reason."""

from __future__ import annotations

import json
from collections.abc import Sequence

import yaml

from lifelong_moe.config.initial.sizes import (
    BYTES_PER_TOKEN,
    MOST_CLUSTERS,
    MOST_TOKENS,
    PASSES,
    SMALL_BYTES,
    FolderText,
    Sizes,
)

MIN_CHARS = 20
"""Of a file that is text enough to learn from."""
HELD_OUT, LEAST_HELD_OUT = 0.1, 5
"""Share of the files on which nothing is trained, and the fewest: retraining's gate needs five sources."""


def config_text(run: str, folders: Sequence[FolderText], sizes: Sizes) -> str:
    """The YAML of a run that learns one folder after the other.

    Args:
        run: Its name.
        folders: In the order in which they are learned.
        sizes: As :func:`~lifelong_moe.config.initial.sizes.sizes_for` chose them.
    """
    total = sum(folder.train_bytes for folder in folders)
    why = (
        f"That is less than {SMALL_BYTES / 1e6:g} MB: a small model, which learns in a minute or two."
        if sizes.is_small
        else "The model that README's figures are of; a wider one learns more of much text, and takes longer."
    )
    lines = [
        "# Learns one folder of text after the other, and keeps what it learned of the earlier ones.",
        "# Any key can be changed here or on the command line; docs/configuration.md explains all of them.",
        f"run: {_scalar(run)}             # results are below mlruns/runs/{run}/",
        "",
        "# The recommended method, in one word: each later folder adds experts and low-rank changes of its own, a",
        "# generation. Older ones stay as they are, all of them predict together, and no old text has to be kept.",
        "method: lifelong",
        "",
        f"# Of each folder {HELD_OUT:.0%} of the files are held out, at least {LEAST_HELD_OUT} where there are ten:",
        "# nothing is trained on them, and losses are measured there.",
        f"# Files of fewer than {MIN_CHARS} characters are left out.",
        "distributions:",
        *(line for folder in folders for line in _distribution(folder)),
        "",
        "# Pieces of words that become tokens; learned from the first folder's training text, then fixed for good.",
        f"tokenizer: {{vocab_size: {sizes.vocabulary}}}",
        "",
        f"# {total / 1e6:.2f} MB of training text. {why}",
        f"model: {{layers: {sizes.layers}, width: {sizes.width}, heads: 4, kv_heads: 2, "
        f"expert_width: {2 * sizes.width}, experts: {sizes.experts}, context: {sizes.context}}}",
        *_routing(sizes),
        "",
        "stage_defaults:",
        "  # Later stages learn at twice this rate, since only what they add is trained.",
        f"  optim: {{lr: 2.0e-3, schedule: cosine, warmup_fraction: 0.05, batch_tokens: {sizes.batch_tokens}}}",
        "",
        f"# Tokens to train on: {PASSES} passes over a folder's text, at about {BYTES_PER_TOKEN} bytes a token,",
        f"# since more of them teach little new; at most {MOST_TOKENS:,}, some minutes on two processor cores.",
        "# Raise it where there is more text.",
        "stages:",
        *(f"  - {{data: {_scalar(one.name)}, tokens: {n:_}}}" for one, n in zip(folders, sizes.tokens, strict=True)),
        "",
        "# On a GPU products are in bfloat16, and what trains stays in float32, as everything does on a CPU.",
        "trainer: {precision: auto}",
        "",
        "evaluate: {tokens: 20_000}       # held-out tokens of each folder, after each stage",
    ]
    return "\n".join(lines) + "\n"


def _scalar(name: str) -> str:
    """A name as YAML, which would take `on`, `null` and `2024` for something else."""
    return name if yaml.safe_load(name) == name else json.dumps(name)


def _routing(sizes: Sizes) -> list[str]:
    lines = ["", "# Which generation a text is of is decided anew every four tokens, from what precedes them."]
    if sizes.clusters == MOST_CLUSTERS:
        return [*lines, "routing: {chunk_tokens: 4}"]
    return [
        *lines,
        f"# A generation recognizes its text by {MOST_CLUSTERS} clusters of documents, or by as many as a folder has.",
        f"routing: {{chunk_tokens: 4, clusters: {sizes.clusters}}}",
    ]


def _distribution(folder: FolderText) -> list[str]:
    lines = [
        f"  # {folder.train_bytes / 1e6:.2f} MB to train on, in {folder.documents:,} documents.",
        f"  {_scalar(folder.name)}:",
        # A string of JSON is one of YAML, whatever a folder is called.
        f"    files: {json.dumps(folder.pattern, ensure_ascii=False)}",
    ]
    if folder.other_encodings:
        lines.append(f"    # encoding: cp1252      # would read those that are not UTF-8: {folder.other_encodings:,}")
    held_out = [f"    heldout_fraction: {HELD_OUT}", f"    heldout_sources: {LEAST_HELD_OUT}"]
    return [*lines, f"    min_chars: {MIN_CHARS}", *held_out]
