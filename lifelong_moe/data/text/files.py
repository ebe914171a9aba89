"""A user's own files: JSONL, plain text and Parquet, named by a path or glob."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.text.compression import COMPRESSED
from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.text.jsonl import own_unit, read_jsonl
from lifelong_moe.data.text.limits import MAX_TEXT_FILE_BYTES, Quota
from lifelong_moe.data.text.parquet import read_parquet
from lifelong_moe.data.text.streams import OpenFile, check_text, decode, open_file, read_whole, refuse_pickled
from lifelong_moe.errors import DataError
from lifelong_moe.storage.modes import SHARED, as_private_as

READABLE = ".jsonl and .txt (both also .gz or .zst) and .parquet"
Reader = Callable[[OpenFile, SourceConfig], Iterator[Document]]


def read_documents(pattern: str, config: SourceConfig) -> list[Document]:
    """Read all documents of the files that match.

    Args:
        pattern: Path or glob relative to the current directory; ``**`` crosses folders.
        config: ``text_field`` and ``source_field``.

    Raises:
        DataError: Nothing matches, a file is of a kind that is not read, or ``file:line: reason``.
    """
    # Every file's kind is checked before the first is read, which may take minutes.
    readers = [(path, reader_of(path)) for path in matching_files(pattern)]
    # One quota for all of them: many small files are as much as a large one.
    documents: list[Document] = []
    quota = Quota()
    for path, reader in readers:
        with open_file(path, quota) as file:
            documents += reader(file, config)
    if not documents:
        raise DataError(f"files={pattern}: there are no documents in its {len(readers)} file(s).")
    return documents


def matching_files(pattern: str) -> list[Path]:
    """Return what a path or glob names, in order of name. Folders that a glob also matches are passed over.

    Raises:
        DataError: Nothing matches, or only folders do.
    """
    try:
        # First as a plain path: a file's own name may hold `[` or `*`.
        if Path(pattern).exists():
            found = [Path(pattern)]
        else:
            # `**` can yield one path twice, and glob's order is the file system's.
            found = sorted({Path(name) for name in glob.glob(pattern, recursive=True)})
    # Too long a name, or one that holds NUL.
    except (OSError, ValueError) as error:
        raise DataError(f"files={pattern}: {error}.") from None
    if not found:
        reason = f"files={pattern}: no such file, and nothing matches it under {Path.cwd()}."
        raise DataError(reason, is_missing=True)
    files = [path for path in found if not path.is_dir()]
    if not files:
        raise DataError(f"files={pattern}: is a directory; name its files, e.g. {found[0] / '**' / '*.jsonl'}.")
    return files


def mode_of(pattern: str) -> int:
    """Permissions of copies of text of the files that match: as private as each of them.

    Raises:
        DataError: Nothing matches.
    """
    mode = SHARED
    for path in matching_files(pattern):
        # A file that has gone meanwhile is no one's text; whoever reads it says so.
        with suppress(OSError):
            mode &= as_private_as(path.stat().st_mode)
    return mode


def reader_of(path: Path) -> Reader:
    """Choose how a file is read by its extension, before anything is opened.

    Raises:
        DataError: Its kind is unknown, or can run code when loaded.
    """
    packed = path.suffix.lower() in COMPRESSED
    kind = (path.with_suffix("") if packed else path).suffix.lower()
    if kind == ".jsonl":
        return _jsonl_documents
    if kind == ".txt":
        return _text_documents
    if kind == ".parquet" and not packed:
        return _parquet_documents
    refuse_pickled(path)
    raise DataError(f"{path}: unknown kind of file; {READABLE} are read.")


def _jsonl_documents(file: OpenFile, config: SourceConfig) -> Iterator[Document]:
    return read_jsonl(file, config.text_field, config.source_field, config.answer_field)


def _text_documents(file: OpenFile, config: SourceConfig) -> Iterator[Document]:
    """Yield a text file as one document, which is its own source unit."""
    path = file.path
    if (data := read_whole(file, MAX_TEXT_FILE_BYTES)) is None:
        raise DataError(f"{path}: one document of more than {MAX_TEXT_FILE_BYTES >> 20} MiB; cut it, or use .jsonl.")
    text = check_text(decode(data, str(path)), str(path))
    yield Document(text, own_unit(text), str(path))


def _parquet_documents(file: OpenFile, config: SourceConfig) -> Iterator[Document]:
    return read_parquet(file, config.text_field, config.source_field, config.answer_field)
