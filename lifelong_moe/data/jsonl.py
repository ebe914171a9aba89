"""A strict JSONL reader: whatever is wrong is one ``file:line: reason``, found in bounded time and memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lifelong_moe.data.documents import Document
from lifelong_moe.data.storage import text_sha256
from lifelong_moe.data.streams import MAX_LINE_BYTES, check_text, decode, open_bytes
from lifelong_moe.errors import DataError

_MAX_DIGITS = 1000
"""Longer integers are quadratic to read, and no document needs one."""


if TYPE_CHECKING:
    from lifelong_moe.data.streams import ByteStream


class _RefusedError(ValueError):
    """Valid for Python's reader, but not for ours; holds the reason."""


def read_jsonl(path: Path, text_field: str, source_field: str) -> Iterator[Document]:
    """Yield the documents of a ``.jsonl`` or ``.jsonl.gz`` file, one JSON object a line.

    Args:
        path: The file.
        text_field: Field with the text; required.
        source_field: Field with the source unit; where it is absent, a document is its own unit.

    Raises:
        DataError: ``file:line: reason``.
    """
    with open_bytes(path) as stream:
        for number, line in _lines(stream, path):
            where = f"{path}:{number}"
            yield document_from(_parse(line, where), where, text_field, source_field)


def document_from(row: dict[str, Any], where: str, text_field: str, source_field: str) -> Document:
    """Turn one record (of JSONL, Parquet or a Hugging Face dataset) into a document.

    Args:
        row: Field names and values.
        where: ``file:line``, for messages and as the document's origin.
        text_field: Field with the text.
        source_field: Field with the source unit; absent or null makes the document its own unit.

    Raises:
        DataError: The text is missing or unusable, or the source is not a string.
    """
    if text_field not in row:
        fields = ", ".join(sorted(row)[:8]) or "none"
        raise DataError(f'{where}: there is no field "{text_field}"; fields: {fields}. Set text_field.')
    text = check_text(row[text_field], where, text_field)
    source = row.get(source_field)
    return Document(text, own_unit(text) if source is None else check_text(source, where, source_field), where)


def own_unit(text: str) -> str:
    """Return the source unit of a document that names none: itself. No file name: renaming must change nothing."""
    return f"sha256:{text_sha256(text)}"


def _lines(stream: ByteStream, path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line). Only a newline ends a line: U+2028 may stand within one.

    One empty line at the end of the file is passed over; any other is an error.
    """
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"{path}:{number}: line is longer than {MAX_LINE_BYTES >> 20} MiB; cut the document.")
        if not line.strip():
            if stream.peek(1):
                raise DataError(f"{path}:{number}: line is empty; each line must be one JSON object.")
            return
        yield number, line


def _parse(line: bytes, where: str) -> dict[str, Any]:
    text = decode(line.rstrip(b"\r\n"), where)
    try:
        row = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: malformed JSON at column {error.colno}: {error.msg.removesuffix(' at')}.") from error
    except RecursionError as error:
        raise DataError(f"{where}: JSON is nested too deeply.") from error
    except _RefusedError as error:
        raise DataError(f"{where}: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: each line must be one JSON object; got a {type(row).__name__}.")
    return row


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _RefusedError(f"key {twice[:80]!a} occurs twice; the last would silently win.")
    return row


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _RefusedError(f"integer of {len(digits)} digits; at most {_MAX_DIGITS} are read.")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _RefusedError(f"number {digits[:40]} is not finite.")
    return value


def _constant(name: str) -> float:
    raise _RefusedError(f"{name} is not JSON.")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_without_duplicates, parse_int=_integer, parse_float=_number, parse_constant=_constant
)
