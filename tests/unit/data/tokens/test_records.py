"""What is remembered of text that may be gone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.tokens.records import HeldoutStore
from lifelong_moe.errors import CorruptError


def test_held_out_documents_come_back_as_they_were(tmp_path: Path) -> None:
    """Also those that hold line ends of every kind; they are named by the hash of their file."""
    documents = [Document("a\nb\u2028c\r\n\x1e\u00e9", "s"), Document("second", "sha256:x")]
    store = HeldoutStore(tmp_path)
    address = store.add(documents)
    assert store.documents(address) == documents
    assert hashlib.sha256(store.path(address).read_bytes()).hexdigest() == address
    assert store.add(documents) == address != store.add([Document("second", "y")])  # another source, another set
    store.path(address).write_bytes(store.path(address).read_bytes()[:-1])
    with pytest.raises(CorruptError, match=f"{address}.jsonl: SHA-256 is"):
        store.documents(address)
    assert store.add(documents) == address and store.documents(address) == documents  # written anew
