"""Kept batches: named by their documents, whole or absent, verified, and found again by document."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lifelong_moe.data.arrivals.batches import BatchStore
from lifelong_moe.data.text.documents import Document, documents_hash, normalized_hash
from lifelong_moe.errors import CorruptError

DOCUMENTS = [Document("eine Zeile\nzwei", "a"), Document("x\u2028y", "b"), Document("third", "b")]
FILES = [{"name": "a.jsonl", "bytes": 3, "sha256": "0" * 64}]


def test_a_batch_is_named_by_its_documents_in_any_order(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    batch = store.add(DOCUMENTS, FILES)
    assert batch == documents_hash(DOCUMENTS) == store.add(DOCUMENTS[::-1], [])
    assert store.path(batch) == tmp_path / "batches" / batch[:16] / "documents.jsonl"
    assert store.documents(batch) == sorted(DOCUMENTS, key=lambda document: document.hash)
    manifest = store.manifest(batch)
    assert list(manifest.files) == FILES  # of whoever was first
    assert manifest.bytes == sum(document.num_bytes for document in DOCUMENTS)
    assert [path.name for path in (tmp_path / "batches").iterdir()] == [batch[:16]]


def test_corrected_sources_are_another_copy_of_the_same_batch(tmp_path: Path) -> None:
    store, corrected = BatchStore(tmp_path), [Document(document.text, "x") for document in DOCUMENTS]
    assert store.sources(corrected) is None  # nothing is kept yet
    batch = store.add(DOCUMENTS, FILES)
    before = store.path(batch).read_bytes()
    copy = store.sources(corrected)
    assert copy is not None and store.sources(DOCUMENTS) is None and store.sources(corrected[::-1]) == copy
    assert store.add(corrected, []) == batch == store.add(corrected, FILES)
    assert store.path(batch, copy).parent.name == f"{batch[:16]}-{copy}"
    assert {document.source for document in store.documents(batch, copy)} == {"x"}
    assert (store.path(batch).read_bytes(), len(list(store.root.iterdir()))) == (before, 2)
    assert store.holding(DOCUMENTS[0].hash) == [batch]
    elsewhere = [Document(document.text, "y") for document in DOCUMENTS]
    assert store.sources(elsewhere) not in (None, copy)


def test_documents_are_found_by_the_beginning_of_their_hash(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    assert store.holding(DOCUMENTS[0].hash) == []
    first, second = store.add(DOCUMENTS[:2], FILES), store.add(DOCUMENTS[1:], FILES)
    assert store.holding(DOCUMENTS[0].hash) == [first]
    assert set(store.holding(DOCUMENTS[1].hash[:10])) == {first, second}


def test_damage_is_noticed(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    batch = store.add(DOCUMENTS, FILES)
    path = store.path(batch)
    data = bytearray(path.read_bytes())
    data[12] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"documents\.jsonl: SHA-256 is [0-9a-f]{64}, but the manifest says"):
        store.documents(batch)
    with pytest.raises(CorruptError):
        store.add(DOCUMENTS, FILES)
    path.unlink()
    with pytest.raises(CorruptError, match="SHA-256 is missing"):
        store.documents(batch)
    (path.parent / "manifest.json").write_text("{")
    with pytest.raises(CorruptError, match=r"manifest\.json: not JSON"):
        store.manifest(batch)


def test_a_crash_while_writing_leaves_no_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BatchStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError("power is out")))
        with pytest.raises(OSError, match="power"):
            store.add(DOCUMENTS, FILES)
    assert list((tmp_path / "batches").iterdir()) == []
    assert json.loads((store.path(store.add(DOCUMENTS, FILES)).parent / "manifest.json").read_text())["hash"]


def test_removed_text_is_known_by_its_documents_and_may_come_again(tmp_path: Path) -> None:
    store, corrected = BatchStore(tmp_path), [Document(document.text, "x") for document in DOCUMENTS]
    batch = store.add(DOCUMENTS, FILES)
    store.add(corrected, [])
    copy = store.sources(corrected)
    files, known = [store.path(batch), store.path(batch, copy)], store.identities(batch)
    before = files[0].read_bytes()
    assert set(store.copies(batch)) == set(files) and store.has_text(batch) and store.has_text(batch, copy)
    assert store.remove_text(batch) == len(before) + len(canonical(corrected).encode())
    left = b"".join(path.read_bytes() for path in store.root.rglob("*") if path.is_file())
    assert not any(document.text.split("\n")[0].encode() in left for document in DOCUMENTS)
    assert (store.copies(batch), store.has_text(batch), store.remove_text(batch)) == ([], False, 0)
    assert store.identities(batch) == known == {(d.hash, d.source) for d in DOCUMENTS}
    assert store.normalized(batch) == {normalized_hash(document.text) for document in DOCUMENTS}
    assert store.holding(DOCUMENTS[0].hash) == [batch]
    assert store.sources(DOCUMENTS) is None and store.sources(corrected) == copy
    with pytest.raises(CorruptError, match="SHA-256 is missing"):
        store.documents(batch)
    assert store.add(DOCUMENTS[::-1], []) == batch and files[0].read_bytes() == before
    assert store.has_text(batch) and not store.has_text(batch, copy) and not files[1].exists()
    assert list(store.manifest(batch).files) == FILES


def test_text_stays_until_its_documents_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BatchStore(tmp_path)
    batch = store.add(DOCUMENTS, FILES)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError("power is out")))
        with pytest.raises(OSError, match="power"):
            store.remove_text(batch)
    assert store.has_text(batch) and len(store.documents(batch)) == len(DOCUMENTS)
    assert store.remove_text(batch) > 0
    (store.path(batch).parent / "removed.json").write_text("{")
    with pytest.raises(CorruptError, match=r"removed\.json: not JSON"):
        store.identities(batch)


def test_damaged_text_is_not_noted_as_what_was_there(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    batch = store.add(DOCUMENTS, FILES)
    store.add([Document(document.text, "x") for document in DOCUMENTS], FILES)
    for path in store.copies(batch):
        whole = path.read_bytes()
        path.write_bytes(whole.split(b"\n")[0] + b"\n")
        with pytest.raises(CorruptError, match="SHA-256"):
            store.remove_text(batch)
        assert path.exists()
        path.write_bytes(whole)
        store.add(DOCUMENTS, FILES)
    assert store.remove_text(batch) > 0 and len(store.identities(batch)) == len(DOCUMENTS)


def canonical(documents: list[Document]) -> str:
    """The file of a batch, in whatever order."""
    rows = [{"source": d.source, "text": d.text} for d in documents]
    return "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)


def test_folders_have_names_of_sixteen_and_eight_digits(tmp_path: Path) -> None:
    """Earlier versions named them so, and heads refer to copies by these eight."""
    store, documents = BatchStore(tmp_path), [Document(f"text {i}", "one") for i in range(3)]
    batch = store.add(documents, [])
    copy = store.sources([Document(f"text {i}", f"site {i}") for i in range(3)])
    assert copy is not None and len(copy) == 8
    assert store.path(batch).parent.name == batch[:16] and store.path(batch, copy).parent.name == f"{batch[:16]}-{copy}"
