"""A dataset of the Hugging Face hub, at a fixed commit, or from its local cache when offline."""

from __future__ import annotations

from lifelong_moe.data.config import SourceConfig
from lifelong_moe.data.documents import Document
from lifelong_moe.data.jsonl import document_from
from lifelong_moe.errors import DataError, TryAgainError

_MAX_REASON_CHARS = 300


def hub_documents(config: SourceConfig) -> list[Document]:
    """Download (or find in the cache) one split and read its documents.

    Args:
        config: ``hf``, ``name``, ``split``, ``revision``, ``text_field``, ``source_field``.

    Raises:
        DataError: The dataset cannot be had (unknown, gated) or a row has no usable text.
        TryAgainError: The hub cannot be reached, or asks to come back later.
    """
    import datasets

    place = f"hf={config.hf}" + (f"/{config.name}" if config.name else "") + f"@{(config.revision or '')[:8]}"
    try:
        rows = datasets.load_dataset(config.hf, config.name, split=config.split, revision=config.revision)
    except Exception as error:  # the hub's errors share no base class; each is the user's to read
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_REASON_CHARS]
        if _passes(error):
            raise TryAgainError(f"{place}: the hub cannot serve it now: {reason}") from error
        raise DataError(f"{place}: cannot be loaded, split {config.split}: {reason}") from error
    names = rows.column_names
    if config.text_field not in names:
        raise DataError(f'{place}: there is no field "{config.text_field}"; fields: {", ".join(names[:8])}.')
    read = (config.text_field, config.source_field, config.answer_field)
    rows = rows.select_columns([name for name in read if name in names])
    return [
        document_from(row, f"{place}:{number}", config.text_field, config.source_field, config.answer_field)
        for number, row in enumerate(rows, start=1)
    ]


def _passes(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is of the network or the hub's load and not of what was asked for."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if isinstance(error, ConnectionError | TimeoutError) or status in (408, 429) or status >= 500:
            return True
        error = error.__cause__ or error.__context__
    return False
