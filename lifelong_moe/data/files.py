"""A user's own files: JSONL, plain text and Parquet, named by a path or glob."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from pathlib import Path

from lifelong_moe.data.config import SourceConfig
from lifelong_moe.data.documents import Document
from lifelong_moe.data.jsonl import document_from, own_unit, read_jsonl
from lifelong_moe.data.streams import MAX_TEXT_FILE_BYTES, check_text, decode, open_bytes, require_regular
from lifelong_moe.errors import DataError

READABLE = ".jsonl, .jsonl.gz, .txt, .txt.gz and .parquet"
_NEVER_LOADED = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".npy", ".npz", ".joblib", ".faiss")
_PARQUET_ROWS = 1024


def read_documents(pattern: str, config: SourceConfig) -> list[Document]:
    """Read all documents of the files that match.

    Args:
        pattern: Path or glob relative to the current directory; ``**`` crosses folders.
        config: ``text_field`` and ``source_field``.

    Raises:
        DataError: Nothing matches, a file is of a kind that is not read, or ``file:line: reason``.
    """
    readers = [(path, _reader(path)) for path in matching_files(pattern)]
    documents = [document for path, reader in readers for document in reader(path, config)]
    if not documents:
        raise DataError(f"files={pattern}: there are no documents in its {len(readers)} file(s).")
    return documents


def matching_files(pattern: str) -> list[Path]:
    """Return what a path or glob names, in order of name. Folders that a glob also matches are passed over.

    Raises:
        DataError: Nothing matches, or only folders do.
    """
    if Path(pattern).exists():  # also a name that holds a glob's characters
        found = [Path(pattern)]
    else:
        found = sorted({Path(name) for name in glob.glob(pattern, recursive=True)})
    if not found:
        raise DataError(f"files={pattern}: no such file, and nothing matches it under {Path.cwd()}.")
    files = [path for path in found if not path.is_dir()]
    if not files:
        raise DataError(f"files={pattern}: is a directory; name its files, e.g. {found[0] / '**' / '*.jsonl'}.")
    return files


def _reader(path: Path) -> Callable[[Path, SourceConfig], Iterator[Document]]:
    """Choose by extension, before anything is opened."""
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _jsonl_documents
    if name.endswith((".txt", ".txt.gz")):
        return _text_documents
    if name.endswith(".parquet"):
        return _parquet_documents
    if name.endswith(_NEVER_LOADED):
        raise DataError(f"{path}: files of this kind can run code when loaded and are never read; use {READABLE}.")
    raise DataError(f"{path}: unknown kind of file; {READABLE} are read.")


def _jsonl_documents(path: Path, config: SourceConfig) -> Iterator[Document]:
    return read_jsonl(path, config.text_field, config.source_field)


def _text_documents(path: Path, config: SourceConfig) -> Iterator[Document]:
    """Yield a text file as one document, which is its own source unit."""
    with open_bytes(path) as stream:
        data = stream.read(MAX_TEXT_FILE_BYTES + 1)
    if len(data) > MAX_TEXT_FILE_BYTES:
        raise DataError(f"{path}: one document of more than {MAX_TEXT_FILE_BYTES >> 20} MiB; cut it, or use .jsonl.")
    text = check_text(decode(data, str(path)), str(path))
    yield Document(text, own_unit(text), str(path))


def _parquet_documents(path: Path, config: SourceConfig) -> Iterator[Document]:
    """Yield a Parquet file's rows; ``file:line`` is ``file:row`` from 1."""
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    require_regular(path)
    try:
        table = parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if config.text_field not in names:
            raise DataError(f'{path}: there is no column "{config.text_field}"; columns: {", ".join(names[:8])}.')
        columns = [name for name in (config.text_field, config.source_field) if name in names]
        row_number = 0
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
            for row in batch.to_pylist():
                row_number += 1
                yield document_from(row, f"{path}:{row_number}", config.text_field, config.source_field)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())[:300]}") from error
