"""Batches of documents that retraining looked at, kept for good: what was trained on can be replayed and traced.

``batches/<hash16>/`` holds ``documents.jsonl`` (``text``, ``source``), which a configuration names like any file, and
``manifest.json``. The directory appears by rename, so it is whole or absent, and never changes: stages learned from it.
The hash is over texts alone. The same texts with other sources, which are split otherwise, are another copy of the
batch, ``batches/<hash16>-<sources8>/``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lifelong_moe.data.documents import Document, documents_hash
from lifelong_moe.data.jsonl import read_jsonl
from lifelong_moe.data.storage import canonical_json, file_sha256, sync, temporary, text_sha256
from lifelong_moe.errors import CorruptError

DOCUMENTS, MANIFEST = "documents.jsonl", "manifest.json"
SHORT, SOURCES = 16, 8


class BatchStore:
    """The batches under ``mlruns/batches/``."""

    def __init__(self, root: Path) -> None:
        self.root = root / "batches"

    def path(self, batch: str, sources: str | None = None) -> Path:
        """File of a batch's documents, with the sources of one of its copies; see :meth:`sources`."""
        return self.root / (batch[:SHORT] if sources is None else f"{batch[:SHORT]}-{sources}") / DOCUMENTS

    def sources(self, documents: Sequence[Document]) -> str | None:
        """Which copy of a batch says these sources: None for the first, also if none is kept yet, else its digits.

        Raises:
            CorruptError: If the first copy is damaged.
        """
        batch, given = documents_hash(documents), {document.hash: document.source for document in documents}
        if not self.path(batch).parent.exists():
            return None
        if given == {document.hash: document.source for document in self.documents(batch)}:
            return None
        return text_sha256(canonical_json(given))[:SOURCES]

    def add(self, documents: Sequence[Document], files: Sequence[dict[str, Any]]) -> str:
        """Keep a batch; one that is there already with the same sources stays as it is.

        Args:
            documents: In any order; they are written in order of their hash.
            files: What they were read from.

        Returns:
            The batch's hash.
        """
        batch, sources = documents_hash(documents), self.sources(documents)
        if self.path(batch, sources).parent.exists():
            self.manifest(batch, sources)
            return batch
        self.root.mkdir(parents=True, exist_ok=True)
        with temporary(self.root) as work:
            _write(work, batch, sorted(documents, key=lambda document: document.hash), files)
            try:
                os.rename(work, self.path(batch, sources).parent)
            except OSError:
                if not self.path(batch, sources).exists():  # else another process was first
                    raise
        sync(self.root)
        return batch

    def manifest(self, batch: str, sources: str | None = None) -> dict[str, Any]:
        """What is known of a batch, whose file is verified.

        Raises:
            CorruptError: If it is absent or damaged.
        """
        path = self.path(batch, sources)
        try:
            manifest: dict[str, Any] = json.loads((path.parent / MANIFEST).read_text(encoding="utf-8"))
            listed = manifest["sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptError(f"{path.parent / MANIFEST}: unreadable ({type(error).__name__}).") from None
        if not path.is_file() or (found := file_sha256(path)) != listed:
            found = found if path.is_file() else "missing"
            raise CorruptError(f"{path}: SHA-256 is {found}, but the manifest says {listed}.")
        return manifest

    def documents(self, batch: str, sources: str | None = None) -> list[Document]:
        """All documents of a batch, verified."""
        self.manifest(batch, sources)
        return list(read_jsonl(self.path(batch, sources), "text", "source"))

    def holding(self, document_hash: str) -> list[str]:
        """Hashes of the batches that hold a document, by the hash of its text or the beginning of it."""
        manifests = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.root.glob(f"*/{MANIFEST}"))]
        found = (m["hash"] for m in manifests if any(h.startswith(document_hash) for h in m["documents"]))
        return list(dict.fromkeys(found))


def _write(work: Path, batch: str, documents: Sequence[Document], files: Sequence[dict[str, Any]]) -> None:
    rows = [canonical_json({"text": document.text, "source": document.source}) for document in documents]
    (work / DOCUMENTS).write_bytes("".join(row + "\n" for row in rows).encode())
    manifest = {
        "hash": batch,
        "sha256": file_sha256(work / DOCUMENTS),
        "documents": [document.hash for document in documents],
        "bytes": sum(document.num_bytes for document in documents),
        "files": list(files),
    }
    (work / MANIFEST).write_text(canonical_json(manifest), encoding="utf-8")
    for name in (DOCUMENTS, MANIFEST):
        sync(work / name)
    sync(work)
