"""Documents of a Parquet file, row by row, within the limits that hold for JSONL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lifelong_moe.data.formats.limits import MAX_LINE_BYTES, Portion, Quota
from lifelong_moe.data.formats.streams import OpenFile
from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.text.jsonl import document_from
from lifelong_moe.errors import DataError
from lifelong_moe.redaction import shortened

_ROWS = 64
"""Rows unpacked at a time: a dictionary may repeat one long text in each."""


def read_parquet(
    file: OpenFile, text_field: str, source_field: str, answer_field: str | None = None
) -> Iterator[Document]:
    """Yield the documents of a Parquet file; ``file:line`` is ``file:row``, from 1.

    Args:
        file: The file.
        text_field: Column with the text; required.
        source_field: Column with the source unit, if present.
        answer_field: Column with the answer, where the text is a prompt.

    Raises:
        DataError: ``file:row: reason``, or ``file: reason`` if it is no Parquet file or unpacks to far more than text
            ever does.
    """
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    path = file.path
    fields = [field for field in (text_field, source_field, answer_field) if field is not None]
    try:
        metadata = parquet.read_metadata(file.data)
        columns = _columns(file, metadata, fields)
        # Dictionaries are kept as such: one may repeat a long text in each row.
        with parquet.ParquetFile(file.data, metadata=metadata, read_dictionary=columns) as table:
            for number, row in enumerate(_rows(file, table, columns), start=1):
                yield document_from(row, f"{path}:{number}", text_field, source_field, answer_field)
    except (pyarrow.ArrowException, OSError) as error:
        reason = shortened(" ".join(str(error).split()), 300)
        raise DataError(f"{path}: not a readable Parquet file: {reason}") from error


def _columns(file: OpenFile, metadata: Any, fields: list[str]) -> list[str]:
    """The columns to read, each there once, of text and of a size that text has; the first field must be there."""
    path, schema = file.path, metadata.schema.to_arrow_schema()
    names = schema.names
    if fields[0] not in names:
        raise DataError(f'{path}: there is no column "{fields[0]}"; columns: {", ".join(names[:8])}.')
    columns = [name for name in fields if name in names]
    for name in columns:
        if names.count(name) > 1:
            raise DataError(f'{path}: column "{name}" occurs twice; one would silently win.')
        # One row may hold a list of a billion values, whose size nothing states.
        if not _is_text(schema.field(name).type):
            raise DataError(f'{path}: column "{name}" is of {str(schema.field(name).type)[:80]}, not of strings.')
    # Counted apart, since these bytes are not read yet.
    stated = Portion(path, file.portion.packed_bytes, Quota())
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            if column.path_in_schema in columns:
                # The footer states sizes, so most bombs are rejected before anything is unpacked.
                stated.take(max(0, column.total_uncompressed_size))
    return columns


def _is_text(kind: Any) -> bool:
    """Whether an Arrow type is one of strings, each, once or not at all; no list or struct is."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return any(
        matches(kind) for matches in (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    )


def _rows(file: OpenFile, table: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    number, path = 0, file.path
    for batch in table.iter_batches(batch_size=_ROWS, columns=columns):
        for index in range(batch.num_rows):
            number += 1
            try:
                # One value at a time, so that an error names its row.
                row = {name: batch.column(name)[index].as_py() for name in columns}
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: invalid UTF-8 at byte {error.start} of a text.") from error
            lengths = [len(value) for value in row.values() if isinstance(value, str)]
            if any(length > MAX_LINE_BYTES for length in lengths):
                raise DataError(f"{path}:{number}: text is longer than {MAX_LINE_BYTES >> 20} MiB; cut the document.")
            # Again while reading: the footer may lie, and a dictionary's values repeat in memory.
            file.portion.take(sum(lengths))
            file.portion.hold()
            yield row
