"""Read JSONL strictly, in bounded time and memory; every error is one ``file:line: reason``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from lifelong_moe.data.formats.limits import MAX_LINE_BYTES
from lifelong_moe.data.formats.streams import OpenFile, check_text, decode, unpacked
from lifelong_moe.data.formats.strict_json import parse_object
from lifelong_moe.data.text.documents import Document
from lifelong_moe.errors import DataError
from lifelong_moe.storage.keys import text_sha256

SEPARATOR = "\x1e"
"""Stands between prompt and answer: the record separator, a byte that every byte-level tokenizer has."""


def read_jsonl(
    file: OpenFile, text_field: str, source_field: str, answer_field: str | None = None
) -> Iterator[Document]:
    """Yield the documents of a ``.jsonl`` file, also compressed, one JSON object a line.

    Args:
        file: The file.
        text_field: Field with the text; required.
        source_field: Field with the source unit; where it is absent, a document is its own unit.
        answer_field: Field with the answer, where the text is a prompt.

    Raises:
        DataError: ``file:line: reason``; but lines of ``file.bad_lines``, where it takes them, are passed over.
    """
    path, stream = file.path, unpacked(file)
    # Bounded, else one endless line would fill memory before its length is known.
    for number, line in enumerate(iter(partial(stream.readline, MAX_LINE_BYTES + 1), b""), 1):
        where = f"{path}:{number}"
        # Only a newline ends a line: U+2028 may stand within one. An empty line is normal at the very end alone;
        # elsewhere it suggests a damaged file.
        if not line.strip() and not stream.peek(1):
            return
        try:
            _require_content(line, where)
            row = parse_object(decode(line.rstrip(b"\r\n"), where), path, number)
            document = document_from(row, where, text_field, source_field, answer_field)
        except DataError as error:
            if file.bad_lines is None:
                raise
            file.bad_lines.put(str(path), number, error, line)
            while not line.endswith(b"\n") and (line := stream.readline(MAX_LINE_BYTES)):
                pass  # the rest of one that is too long
            continue
        file.portion.hold()
        yield document


def known_jsonl(
    file: OpenFile, text_field: str, source_field: str, answer_field: str | None = None
) -> Iterator[Document]:
    """:func:`read_jsonl` of a file that it has read before, in half the time; the caller compares the texts' hashes.

    Raises:
        AttributeError, KeyError, RecursionError, TypeError, ValueError: If the file is another one.
    """
    stream = unpacked(file)
    for number, line in enumerate(iter(partial(stream.readline, MAX_LINE_BYTES + 1), b""), 1):
        if not line.strip():
            return
        row = json.loads(line)
        text = row[text_field] if answer_field is None else f"{row[text_field]}{SEPARATOR}{row[answer_field]}"
        source = row.get(source_field)
        yield Document(text, own_unit(text) if source is None else source, f"{file.path}:{number}")


def document_from(
    row: Mapping[str, Any], where: str, text_field: str, source_field: str, answer_field: str | None = None
) -> Document:
    """Turn one record (of JSONL, Parquet or a Hugging Face dataset) into a document.

    Args:
        row: Field names and values.
        where: ``file:line``, for messages and as the document's origin.
        text_field: Field with the text.
        source_field: Field with the source unit; absent or null makes the document its own unit.
        answer_field: Field with the answer, where the text is a prompt; it comes after a separator.

    Raises:
        DataError: The text is missing or unusable, or the source is not a string.
    """
    if text_field not in row:
        fields = ", ".join(sorted(row)[:8]) or "none"
        raise DataError(f'{where}: there is no field "{text_field}"; fields: {fields}. Set text_field.')
    text = check_text(row[text_field], where, text_field)
    if answer_field is not None:
        if answer_field not in row:
            raise DataError(f'{where}: there is no field "{answer_field}", which is to hold the answer.')
        answer = check_text(row[answer_field], where, answer_field)
        # Answers are scored from the first separator on, so one within the prompt would move the border.
        if SEPARATOR in text + answer:
            raise DataError(f"{where}: U+001E stands between prompt and answer and must be in neither.")
        text = f"{text}{SEPARATOR}{answer}"
    source = row.get(source_field)
    return Document(text, own_unit(text) if source is None else check_text(source, where, source_field), where)


def own_unit(text: str) -> str:
    """Return the source unit of a document that names none: itself. No file name: renaming must change nothing."""
    return own_unit_of(text_sha256(text))


def own_unit_of(digest: str) -> str:
    """:func:`own_unit` of the text with this SHA-256."""
    return f"sha256:{digest}"


def _require_content(line: bytes, where: str) -> None:
    if len(line) > MAX_LINE_BYTES:
        raise DataError(f"{where}: line is longer than {MAX_LINE_BYTES >> 20} MiB; cut the document.")
    if not line.strip():
        raise DataError(f"{where}: line is empty; each line must be one JSON object.")
