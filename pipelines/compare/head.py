"""The head of a comparison, ``mlruns/comparisons/<name>/head.json``: what its files and MLflow already show."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from lifelong_moe.errors import LockedError
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.grammars import Key, Name, RunId
from lifelong_moe.storage.locks import locked_when_free
from lifelong_moe.storage.plain import from_plain
from lifelong_moe.storage.stored import read_stored

Logged = Mapping[str, str | float]


@dataclass
class ComparisonMlflow:
    """What MLflow was told of a comparison."""

    run: RunId | None = None
    """Id of the parent run."""
    content: Key | None = None
    """Key of the comparison that the parent run shows."""
    logged: dict[Name, Logged] = field(default_factory=dict)
    """By name of an arm's run: its MLflow ``id``, its ``arm``, and the numbers logged there."""
    arms: dict[Name, Logged] = field(default_factory=dict)
    """By name of an arm: the MLflow ``id`` of the run with its means over seeds, and the numbers logged there."""
    own: Logged = field(default_factory=dict)
    """The ``id`` of the parent run, and the numbers logged there."""


@dataclass
class ComparisonHead:
    """What is recorded of a comparison; changed under a lock."""

    content: Key | None = None
    """Key of the comparison that the files show."""
    failed: dict[Name, str] = field(default_factory=dict)
    """Why a run failed, by its name."""
    mlflow: ComparisonMlflow = field(default_factory=ComparisonMlflow)


@contextmanager
def head_to_change(folder: Path) -> Iterator[ComparisonHead]:
    """Lock the head, yield it, and write it when the block ends without an error.

    Args:
        folder: Of the comparison.

    Raises:
        CorruptError: If the file is damaged.
        LockedError: If another process holds the lock for ``WAIT_SECONDS``.
    """
    path = folder / "head.json"
    with ExitStack() as stack:
        # A run's lock is refused at once; this one is held only while figures are drawn, so wait for it.
        try:
            stack.enter_context(locked_when_free(folder / ".lock"))
        except TimeoutError as error:
            raise LockedError(f"the comparison is being recorded: {error}; try again later.") from None
        head = _read(path)
        yield head
        write_atomic(path, json.dumps(asdict(head), indent=1, ensure_ascii=False))


def _read(path: Path) -> ComparisonHead:
    try:
        return read_stored(path, partial(from_plain, ComparisonHead))
    except FileNotFoundError:
        return ComparisonHead()
