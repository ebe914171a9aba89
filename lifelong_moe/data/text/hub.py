"""A dataset of the Hugging Face hub, at a fixed commit, or from its local cache when offline."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.formats.limits import DOCUMENT_BYTES, MAX_LINE_BYTES, Portion, Quota
from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.text.jsonl import document_from
from lifelong_moe.errors import DataError, ResourceError, TryAgainError, disk_is_full
from lifelong_moe.redaction import shortened

_MAX_REASON_CHARS = 300


def hub_documents(config: SourceConfig, quota: Quota | None = None, *, asks: bool = True) -> Iterator[Document]:
    """Download (or find in the cache) one split, and read its documents one after the other.

    The hub's library keeps what it downloads, so a download that ended early goes on, and maps rows from disk: memory
    does not grow with them. Its streaming mode would keep nothing, and text is needed more than once.

    Args:
        config: ``hf``, ``name``, ``split``, ``revision``, ``text_field``, ``source_field``.
        quota: Limits of what is read; None for those of a distribution.
        asks: Whether the hub may be asked; otherwise only its cache is read, and nothing is sent.

    Raises:
        DataError: The dataset cannot be had (unknown, gated, or not in the cache while offline); while documents are
            taken: a row has no usable text, or there is more than may be read.
        ResourceError: The disk is full.
        TryAgainError: The hub cannot be reached, or asks to come back later.
    """
    # A bar shows remote names, and redraws its line by control characters that our streams do not obey.
    for switch in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(switch, "1")
    # Here, since importing it takes seconds and only distributions of the hub need it.
    import datasets

    place = f"hf={config.hf}" + (f"/{config.name}" if config.name else "") + f"@{(config.revision or '')[:8]}"
    asked = Asked(place, f"split {config.split}", "datasets", asks, "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE")
    with failures_told(asked, lambda: datasets.config.HF_HUB_OFFLINE), nullcontext() if asks else _offline():
        rows = datasets.load_dataset(config.hf, config.name, split=config.split, revision=config.revision)
    names = rows.column_names
    if config.text_field not in names:
        raise DataError(f'{place}: there is no field "{config.text_field}"; fields: {", ".join(names[:8])}.')
    read = (config.text_field, config.source_field, config.answer_field)
    # Other columns, such as images, would be decoded for each row.
    rows = rows.select_columns([name for name in read if name in names])
    return _documents(rows, place, config, quota or Quota())


def _documents(
    rows: Iterable[Mapping[str, object]], place: str, config: SourceConfig, quota: Quota
) -> Iterator[Document]:
    portion = Portion(Path(place), 0, quota)
    for number, row in enumerate(rows, start=1):
        where = f"{place}:{number}"
        lengths = [len(value) for value in row.values() if isinstance(value, str)]
        if any(length > MAX_LINE_BYTES for length in lengths):
            raise DataError(f"{where}: text is longer than {MAX_LINE_BYTES >> 20} MiB.")
        portion.hold(sum(lengths) + DOCUMENT_BYTES)
        yield document_from(row, where, config.text_field, config.source_field, config.answer_field)


@dataclass(frozen=True)
class Asked:
    """What was asked of the hub, in words of messages."""

    place: str
    """What the configuration says."""
    what: str
    """The part of it that was wanted."""
    kind: str
    """Of things of its kind in a cache."""
    asks: bool
    """Whether the hub may be asked."""
    switch: str
    """The variable that forbids to."""


@contextmanager
def failures_told(asked: Asked, is_offline: Callable[[], bool]) -> Iterator[None]:
    """Turn what the hub's libraries raise into one line.

    Raises:
        DataError: It cannot be had: unknown, gated, or not in the cache where the hub is not asked.
        ResourceError: The disk is full.
        TryAgainError: The hub cannot be reached, or asks to come back later.
    """
    place, what = asked.place, asked.what
    try:
        yield
    except Exception as error:  # the hub's errors share no base class; each is the user's to read
        reason = shortened(" ".join(f"{type(error).__name__}: {error}".split()), _MAX_REASON_CHARS)
        if any(disk_is_full(cause) for cause in _causes(error)):
            raise ResourceError(f"{place}: no space left in the cache of {asked.kind}: {reason}") from error
        passes = any(_passes(cause) for cause in _causes(error))
        # Of a model and not of a dataset, the library says what is not in its cache in a class of its own.
        if not asked.asks and (passes or type(error).__name__ == "LocalEntryNotFoundError"):
            raise DataError(
                f"{place}: {what} is not in the cache of {asked.kind}; a store's {asked.kind} are not fetched.",
                is_missing=True,
            ) from error
        if passes and is_offline():  # which no time changes
            raise DataError(
                f"{place}: {what} is not in the cache, and {asked.switch} forbids to fetch it. Unset that for "
                f"lifelong-moe prepare.",
                is_missing=True,
            ) from error
        if passes:
            raise TryAgainError(f"{place}: the hub cannot serve it now: {reason}") from error
        raise DataError(f"{place}: cannot be loaded, {what}: {reason}", is_missing=True) from error


@contextmanager
def _offline() -> Iterator[None]:
    """Let the libraries of the hub send nothing, as HF_HUB_OFFLINE does for a process that has not imported them."""
    import datasets
    from huggingface_hub import constants

    # Each has its own copy of the variable, which it looks at before each request.
    places: tuple[Any, ...] = (constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, was in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = was


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and the chain of errors that caused it."""
    while error is not None:
        yield error
        # Libraries wrap the network's error in their own, sometimes without `from`.
        error = error.__cause__ or error.__context__


def _passes(error: BaseException) -> bool:
    """Whether an error is temporary: caused by the network or the hub's load, not by the request."""
    # By attribute: requests, httpx and the hub each have an exception class of their own with a response.
    status = getattr(getattr(error, "response", None), "status_code", 0)
    # By name: each of the hub's clients has a class for what the network does.
    names = {kind.__name__ for kind in type(error).__mro__}
    is_network = isinstance(error, ConnectionError | TimeoutError) or bool(names & {"TransportError"})
    return is_network or status in (408, 429) or status >= 500
