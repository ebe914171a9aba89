"""`lifelong-moe prepare`: fetch and tokenize what a run reads. Afterwards training touches no network."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from lifelong_moe.config.load import LoadedConfig
from lifelong_moe.data.formats.progress import telling
from lifelong_moe.data.text.manifest import forget
from pipelines.run.file_list import show_data
from pipelines.shared.places import CACHE, remove_abandoned
from pipelines.shared.workspace import prepare as prepare_run


def prepare(loaded: LoadedConfig, console: Console, *, verify: bool = False) -> dict[str, Any]:
    """Fill the cache; returns tokens and fingerprints by distribution.

    Args:
        loaded: The configuration.
        console: Where people read.
        verify: Read again what is known of files that nothing has touched, and of tokens.
    """
    remove_abandoned()
    if verify:
        forget(CACHE)
    with console.status("reading and tokenizing the distributions") as status, telling(status.update):
        prepared = prepare_run(loaded)
    files = show_data(console, prepared)
    return {
        "run": prepared.config.run,
        "tokenizer": prepared.data.tokenizer.hash,
        "distributions": {
            name: {
                "train_tokens": record.tokens,
                "heldout_tokens": record.heldout_tokens,
                "duplicates": record.duplicates,
                "near_copies": len(record.left_out),
                "train_hash": record.train_hash,
                "heldout_hash": record.heldout_hash,
                "text_is_there": name in prepared.data.corpora,
                "files": files.get(name, {}),
            }
            for name, record in prepared.data.records.items()
        },
    }
