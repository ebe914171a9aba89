"""`lifelong-moe prepare`: fetch and tokenize what a run reads. Afterwards training touches no network."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from pipelines import render
from pipelines.workspace import prepare as prepare_run


def prepare(config_path: str, overrides: list[str], console: Console) -> dict[str, Any]:
    """Fill the cache; returns tokens and fingerprints by distribution."""
    with console.status("reading and tokenizing the distributions"):
        prepared = prepare_run(config_path, overrides)
    render.data_table(console, prepared)
    corpora = prepared.data.corpora
    return {
        "run": prepared.config.run,
        "tokenizer": prepared.data.tokenizer.hash,
        "distributions": {
            name: {
                "train_tokens": corpus.train.num_tokens,
                "heldout_tokens": corpus.heldout.num_tokens,
                "duplicates": corpus.duplicates,
                "near_copies": corpus.near_copies,
                "train_hash": corpus.train_hash,
                "heldout_hash": corpus.heldout_hash,
            }
            for name, corpus in corpora.items()
        },
    }
