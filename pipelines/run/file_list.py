"""What became of each of the user's own files: a count on the terminal, and a list in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import reduce
from operator import and_
from pathlib import Path

from rich.console import Console

from lifelong_moe.data.formats.outcomes import FileOutcome, Outcome, counted, sentence
from lifelong_moe.redaction import redact
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.opening import open_regular
from lifelong_moe.storage.plain_files import corrupt_if_irregular
from pipelines.run import render
from pipelines.shared.workspace import CACHE, Prepared

NAMED = 3
"""Most files of a kind that are named on the terminal."""


def show_data(console: Console, prepared: Prepared, folder: Path | None = None) -> dict[str, dict[str, int]]:
    """Print the distributions, and what became of their files; returns the numbers by distribution.

    Args:
        console: Where people read.
        prepared: The run and its data.
        folder: Where the list is written, ``files.json``. None: in the cache, for a run that is not started.
    """
    render.data_table(console, prepared)
    found = prepared.data.files
    for name, files in found.items():
        console.print(f"{name}: {sentence(files)}")
        for line in _left_out(name, files):
            console.print(line, style="yellow")
    if found:
        # `plan` and `prepare` leave the store as it is.
        path = CACHE / "files" / f"{prepared.config.run}.json" if folder is None else folder / "files.json"
        listed = {name: [asdict(file) for file in files] for name, files in found.items()}
        # Names tell of the text: those may read the list who may read all of the files.
        mode = reduce(and_, map(prepared.data.mode, found))
        # A place may come from a variable of the user's.
        _write(path, redact(json.dumps(listed, indent=1)).encode(), mode)
        console.print(f"What became of each file: {path}")
    return {name: counted(files) for name, files in found.items()}


def _left_out(name: str, files: Sequence[FileOutcome]) -> list[str]:
    """One line for each kind of files that the user may want to do something about."""
    remedies = {
        Outcome.other_encoding: f"left out; distributions.{name}.encoding=cp1252, or another, reads them",
        Outcome.unknown: "left out",
        Outcome.binary: "left out",
        Outcome.too_long: "left out; cut them into pieces",
        Outcome.duplicate: "left out; other files have the same text",
    }
    lines = []
    for outcome, remedy in remedies.items():
        if those := [file.file for file in files if file.outcome == outcome]:
            more = f" and {len(those) - NAMED:,} more" if len(those) > NAMED else ""
            lines.append(f"{name}: {outcome}: {', '.join(those[:NAMED])}{more}: {remedy}")
    return lines


def _write(path: Path, text: bytes, mode: int) -> None:
    # A run that has nothing to do writes nothing.
    with suppress(FileNotFoundError), corrupt_if_irregular(path), open_regular(path, follow=False) as file:
        if file.read(len(text) + 1) == text:
            return
    write_atomic(path, text, mode)
