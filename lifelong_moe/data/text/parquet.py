"""Documents of a Parquet file, row by row, within the limits that hold for JSONL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lifelong_moe.data.text.compression import ALLOWANCE_BYTES, MAX_RATIO
from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.text.jsonl import document_from
from lifelong_moe.data.text.streams import MAX_LINE_BYTES, require_regular
from lifelong_moe.errors import DataError

_ROWS = 64
"""Rows unpacked at a time: a dictionary may repeat one long text in each."""


def read_parquet(path: Path, text_field: str, source_field: str, answer_field: str | None = None) -> Iterator[Document]:
    """Yield the documents of a Parquet file; ``file:line`` is ``file:row``, from 1.

    Args:
        path: The file.
        text_field: Column with the text; required.
        source_field: Column with the source unit, if present.
        answer_field: Column with the answer, where the text is a prompt.

    Raises:
        DataError: ``file:row: reason``, or ``file: reason`` if it is no Parquet file or unpacks to far more than text
            ever does.
    """
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    require_regular(path)
    try:
        with parquet.ParquetFile(path) as table:
            columns = _columns(path, table, text_field, source_field, answer_field)
            for number, row in enumerate(_rows(path, table, columns), start=1):
                yield document_from(row, f"{path}:{number}", text_field, source_field, answer_field)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())[:300]}") from error


def _columns(path: Path, table: Any, text_field: str, source_field: str, answer_field: str | None) -> list[str]:
    """The columns to read, each there once and of a size that text has."""
    names = table.schema_arrow.names
    if text_field not in names:
        raise DataError(f'{path}: there is no column "{text_field}"; columns: {", ".join(names[:8])}.')
    columns = [name for name in (text_field, source_field, answer_field or "") if name in names]
    for name in columns:
        if names.count(name) > 1:
            raise DataError(f'{path}: column "{name}" occurs twice; one would silently win.')
    for group in range(table.metadata.num_row_groups):
        for index in range(table.metadata.num_columns):
            column = table.metadata.row_group(group).column(index)
            if column.path_in_schema in columns:
                # The footer states sizes, so most bombs are rejected before anything is unpacked.
                _refuse_bomb(path, column.total_uncompressed_size)
    return columns


def _rows(path: Path, table: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    number = num_bytes = 0
    for batch in table.iter_batches(batch_size=_ROWS, columns=columns):
        num_bytes += batch.nbytes
        # Again while reading: the footer may lie, and a dictionary's values repeat in memory.
        _refuse_bomb(path, num_bytes)
        for index in range(batch.num_rows):
            number += 1
            try:
                # One value at a time, so that an error names its row.
                row = {name: batch.column(name)[index].as_py() for name in columns}
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: invalid UTF-8 at byte {error.start} of a text.") from error
            if any(isinstance(value, str) and len(value) > MAX_LINE_BYTES for value in row.values()):
                raise DataError(f"{path}:{number}: text is longer than {MAX_LINE_BYTES >> 20} MiB; cut the document.")
            yield row


def _refuse_bomb(path: Path, num_bytes: int) -> None:
    if num_bytes > ALLOWANCE_BYTES and num_bytes > MAX_RATIO * path.stat().st_size:
        raise DataError(f"{path}: unpacks to more than {MAX_RATIO} times its size, which no text does.")
