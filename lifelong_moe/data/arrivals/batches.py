"""Store the batches of documents that retraining examined, so that training data can be replayed and traced.

``batches/<hash16>/`` holds ``documents.jsonl`` (``text``, ``source``), which a configuration names like any file, and
``manifest.json``. The directory appears by rename, so it is whole or absent, and its text never changes: stages learned
from it. Text may be removed (:meth:`BatchStore.remove_text`); ``removed.json`` then says which documents there were.
The hash is over texts alone. The same texts with other sources, which are split otherwise, are another copy of the
batch, ``batches/<hash16>-<sources8>/``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lifelong_moe.data.formats.limits import Portion, Quota
from lifelong_moe.data.formats.streams import OpenFile
from lifelong_moe.data.text.documents import Document, documents_hash, hash_of_hashes, normalized_hash
from lifelong_moe.data.text.jsonl import read_jsonl
from lifelong_moe.data.text.kept import document_rows
from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.directories import new_directory
from lifelong_moe.storage.files import sync, write_atomic
from lifelong_moe.storage.grammars import Sha256
from lifelong_moe.storage.keys import SHORT, canonical_json, file_sha256, text_sha256
from lifelong_moe.storage.modes import SHARED, as_private_as
from lifelong_moe.storage.opening import open_regular
from lifelong_moe.storage.plain import from_plain, require_same
from lifelong_moe.storage.stored import read_stored

DOCUMENTS, MANIFEST, REMOVED = "documents.jsonl", "manifest.json", "removed.json"
SOURCES = 8
COPY = re.compile(r"[0-9a-f]{16}(-[0-9a-f]{8})?")
"""Hexadecimal digits that tell the copies of a batch apart."""


@dataclass(frozen=True)
class BatchManifest:
    """The content of a batch's ``manifest.json``."""

    hash: Sha256
    """Over texts alone."""
    sha256: Sha256
    """Of the file of documents."""
    documents: tuple[Sha256, ...]
    bytes: int
    """Of all texts."""
    files: tuple[Mapping[str, Any], ...]
    """What they were read from."""


@dataclass(frozen=True)
class RemovedDocument:
    """What a removed document is known by."""

    hash: Sha256
    normalized: Sha256
    source: str


@dataclass(frozen=True)
class _Removed:
    rows: tuple[RemovedDocument, ...]


class BatchStore:
    """The batches under ``mlruns/batches/``."""

    def __init__(self, root: Path) -> None:
        self.root = root / "batches"

    def path(self, batch: str, sources: str | None = None) -> Path:
        """File of a batch's documents, with the sources of one of its copies; see :meth:`sources`."""
        return self.root / (batch[:SHORT] if sources is None else f"{batch[:SHORT]}-{sources}") / DOCUMENTS

    def sources(self, documents: Sequence[Document]) -> str | None:
        """The copy of a batch that has these sources: None for the first (or if none is stored yet), else its digits.

        Raises:
            CorruptError: If the first copy is damaged.
        """
        return self.copy_with({document.hash: document.source for document in documents})

    def copy_with(self, given: Mapping[str, str]) -> str | None:
        """:meth:`sources` of documents of which only hash and source are known."""
        batch = hash_of_hashes(given)
        if not self.path(batch).parent.exists():
            return None
        # Compared as a set: a batch is its documents, whatever order they arrived in.
        if set(given.items()) == self.identities(batch):
            return None
        return text_sha256(canonical_json(given))[:SOURCES]

    def add(self, documents: Sequence[Document], files: Sequence[dict[str, Any]], mode: int = SHARED) -> str:
        """Store a batch. A stored batch with the same sources is unchanged, except that removed text is restored.

        Args:
            documents: In any order; they are written in order of their hash.
            files: What they were read from.
            mode: Permissions of the files of the batch, which are as private as those.

        Returns:
            The batch's hash.
        """
        batch, sources = documents_hash(documents), self.sources(documents)
        path = self.path(batch, sources)
        # Text that was removed may arrive again; the manifest is still there and lists the same bytes,
        # because rows are canonical JSON in order of hash.
        if not self.has_text(batch, sources):
            write_atomic(path, _rows(documents), mode)
        if path.parent.exists():
            self.manifest(batch, sources)
            return batch
        with new_directory(path.parent, mode) as work:
            _write(work, batch, documents, files)
        return batch

    def manifest(self, batch: str, sources: str | None = None) -> BatchManifest:
        """Return a batch's manifest after verifying its file.

        Raises:
            CorruptError: If it is absent or damaged.
        """
        path = self.path(batch, sources)
        manifest = read_manifest(path.parent / MANIFEST)
        with self._verified(path, manifest.sha256):
            return manifest

    def documents(self, batch: str, sources: str | None = None) -> list[Document]:
        """All documents of a batch, verified; see :meth:`has_text`."""
        path = self.path(batch, sources)
        with self._verified(path, read_manifest(path.parent / MANIFEST).sha256) as file:
            return list(read_jsonl(file, "text", "source"))

    @contextmanager
    def _verified(self, path: Path, listed: str) -> Iterator[OpenFile]:
        """A file of documents, opened once: what was hashed is what will be read, though a batch may be replayed long
        after it was written."""
        try:
            data = open_regular(path, follow=False)
        except OSError as error:
            found = "missing" if isinstance(error, FileNotFoundError) else f"unreadable: {error.strerror}"
            raise CorruptError(f"{path}: SHA-256 is {found}, but the manifest says {listed}.") from None
        with data:
            if (digest := hashlib.file_digest(data, "sha256").hexdigest()) != listed:
                raise CorruptError(f"{path}: SHA-256 is {digest}, but the manifest says {listed}.")
            size = data.seek(0, 2)
            data.seek(0)
            # It is text that a tick has read within its limits before.
            yield OpenFile(path, data, Portion(path, size, Quota()))

    def has_text(self, batch: str, sources: str | None = None) -> bool:
        """False only if the text was removed on purpose; missing without a record of removal is damage."""
        path = self.path(batch, sources)
        return path.exists() or not path.with_name(REMOVED).is_file()

    def identities(self, batch: str, sources: str | None = None) -> set[tuple[str, str]]:
        """Hash and source of each document of a batch, whose text may have been removed."""
        if self.has_text(batch, sources):
            return {(document.hash, document.source) for document in self.documents(batch, sources)}
        return {(row.hash, row.source) for row in self._removed(batch, sources)}

    def normalized(self, batch: str) -> set[str]:
        """``normalized_hash`` of each document of a batch whose text was removed."""
        return {row.normalized for row in self._removed(batch, None)}

    def copies(self, batch: str) -> list[Path]:
        """Files of a batch's documents that are there, whatever sources they name."""
        found = sorted(self.root.glob(f"{batch[:SHORT]}*/{DOCUMENTS}"))
        return [path for path in found if COPY.fullmatch(path.parent.name) and path.is_file()]

    def remove_text(self, batch: str) -> int:
        """Remove the text of a batch in all its copies, but not what its documents are known by; returns the bytes.

        Raises:
            CorruptError: If a file is damaged, because its hashes would not be those of the text that was learned.
        """
        freed = 0
        for path in self.copies(batch):
            state = path.stat()
            freed += state.st_size
            found = self.documents(batch, path.parent.name[SHORT + 1 :] or None)
            # The normalized hash cannot be computed once the text is gone; it recognizes a document that returns.
            rows = [RemovedDocument(d.hash, normalized_hash(d.text), d.source) for d in found]
            # Written first: it takes effect once the text is gone, so a kill in between loses nothing.
            write_atomic(path.with_name(REMOVED), canonical_json(list(map(asdict, rows))), as_private_as(state.st_mode))
            path.unlink()
            # Else a power failure may bring the removed text back.
            sync(path.parent)
        return freed

    def _removed(self, batch: str, sources: str | None) -> tuple[RemovedDocument, ...]:
        path = self.path(batch, sources).with_name(REMOVED)
        try:
            return read_stored(path, lambda rows: from_plain(_Removed, {"rows": rows}).rows)
        except FileNotFoundError:
            raise CorruptError(f"{path}: missing.") from None

    def holding(self, document_hash: str) -> list[str]:
        """Hashes of the batches that hold a document, by the hash of its text or the beginning of it."""
        # Manifests keep the hashes of documents, so a batch without text is found too.
        manifests = [read_manifest(path) for path in sorted(self.root.glob(f"*/{MANIFEST}"))]
        # Copies of a batch with other sources have the same hash, which is listed once.
        found = (one.hash for one in manifests if any(digest.startswith(document_hash) for digest in one.documents))
        return list(dict.fromkeys(found))


def read_manifest(path: Path) -> BatchManifest:
    """Read a batch's manifest; its file of documents may be gone.

    Raises:
        CorruptError: If it is absent or damaged.
    """
    try:
        return read_stored(path, partial(_of_its_folder, path.parent.name))
    except FileNotFoundError:
        raise CorruptError(f"{path}: missing.") from None


def _of_its_folder(folder: str, data: Any) -> BatchManifest:
    manifest = from_plain(BatchManifest, data)
    # What a batch is known by is made of what its documents are known by.
    require_same("hash", manifest.hash, hash_of_hashes(manifest.documents))
    require_same("hash", manifest.hash[:SHORT], folder.partition("-")[0])
    return manifest


def _write(work: Path, batch: str, documents: Sequence[Document], files: Sequence[dict[str, Any]]) -> None:
    documents = sorted(documents, key=lambda document: document.hash)
    (work / DOCUMENTS).write_bytes(_rows(documents))
    manifest = {
        "hash": batch,
        "sha256": file_sha256(work / DOCUMENTS),
        "documents": [document.hash for document in documents],
        "bytes": sum(document.num_bytes for document in documents),
        "files": list(files),
    }
    (work / MANIFEST).write_text(canonical_json(manifest), encoding="utf-8")


def _rows(documents: Sequence[Document]) -> bytes:
    """The file of documents: a JSON object each, in order of their hash."""
    return b"".join(document_rows(sorted(documents, key=lambda document: document.hash)))
