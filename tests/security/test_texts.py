"""Files of text that others wrote: what they hold is known before memory is taken for it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.text import builtin, kept
from lifelong_moe.data.text.builtin import builtin_documents
from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.text.files import read_documents
from lifelong_moe.data.tokens.records import HeldoutStore
from lifelong_moe.errors import CorruptError, DataError
from lifelong_moe.storage import verified
from lifelong_moe.storage.directories import write_directory

BOMB = 1_000
"""Values in one row; with two billion, a file of 639 bytes would take 40 GB."""


def _nested(kind: str) -> pyarrow.Array:
    zeros, ends = pyarrow.array(np.zeros(BOMB, np.int8)), [0, BOMB]
    if kind == "list":
        return pyarrow.ListArray.from_arrays(pyarrow.array(ends, pyarrow.int32()), zeros)
    inner = pyarrow.LargeListArray.from_arrays(pyarrow.array(ends, pyarrow.int64()), zeros)
    return pyarrow.StructArray.from_arrays([inner], ["inner"])


@pytest.mark.parametrize("field", ["text", "source", "answer"])
@pytest.mark.parametrize("kind", ["list", "struct"])
def test_a_parquet_column_that_is_not_of_strings_is_not_read(field: str, kind: str, tmp_path: Path) -> None:
    columns = {name: pyarrow.array(["one"]) for name in ("text", "source", "answer")}
    path = tmp_path / "bomb.parquet"
    parquet.write_table(pyarrow.table(columns | {field: _nested(kind)}), path, compression="zstd")
    with pytest.raises(DataError, match=rf'bomb\.parquet: column "{field}" is of (large_)?{kind}<.*, not of strings'):
        read_documents(str(path), SourceConfig(files="unused", answer_field="answer"))


@pytest.mark.parametrize(
    "kind",
    [pyarrow.int64(), pyarrow.binary(), pyarrow.timestamp("s"), pyarrow.dictionary(pyarrow.int8(), pyarrow.binary())],
)
def test_nor_is_one_of_other_values(kind: pyarrow.DataType, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.nulls(2, kind)}), path)
    with pytest.raises(DataError, match=r'a\.parquet: column "text" is of .*, not of strings'):
        read_documents(str(path), SourceConfig(files="unused"))


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())]
)
def test_every_kind_of_strings_is(kind: pyarrow.DataType, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {"text": pyarrow.array(["one", "two"], kind), "source": pyarrow.nulls(2)}
    parquet.write_table(pyarrow.table(columns), path)
    found = read_documents(str(path), SourceConfig(files="unused"))
    assert [document.text for document in found] == ["one", "two"]


HARMFUL = {
    "an object": b"{}",
    "a list": b"[]",
    "a number as text": b'{"source":"x","text":1}',
    "half a character": b'{"source":"x","text":"\\ud800 abc"}',
    "no JSON": b"nope",
    "no text": b"\xff",
    "nested deeply": b"[" * 100_000,
    "an empty line": b"",
}


@pytest.mark.parametrize("kind", HARMFUL)
def test_builtin_text_of_a_cache_is_what_is_expected_or_made_again(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's cache may well have the right hash."""
    made = [Document("text\u2028here", "a")]
    monkeypatch.setitem(builtin._EXTRACT, "python_code", lambda: iter(made))
    builtin_documents("python_code", tmp_path)
    (path,) = tmp_path.glob("builtin/python_code-*.jsonl")
    monkeypatch.setitem(builtin._EXTRACT, "python_code", lambda: pytest.fail("extracted again"))
    assert builtin_documents("python_code", tmp_path) == made
    monkeypatch.setitem(builtin._EXTRACT, "python_code", lambda: iter(made))
    good, body = path.read_bytes(), HARMFUL[kind] + b"\n"
    path.write_bytes(json.dumps({"sha256": hashlib.sha256(body).hexdigest()}).encode() + b"\n" + body)
    assert builtin_documents("python_code", tmp_path) == made
    assert path.read_bytes() == good
    for head in (b"[]", b'{"sha256": 1}', b"", b"{" * 1_000_000):
        path.write_bytes(head + b"\n" + body)
        assert builtin_documents("python_code", tmp_path) == made


@pytest.mark.parametrize("kind", HARMFUL)
def test_held_out_text_is_what_is_expected_or_damage(kind: str, tmp_path: Path) -> None:
    store, body = HeldoutStore(tmp_path), HARMFUL[kind] + b"\n"
    address = hashlib.sha256(body).hexdigest()
    store.root.mkdir()
    store.path(address).write_bytes(body)
    with pytest.raises(CorruptError, match=rf"{address}\.jsonl: "):
        store.documents(address)


def test_a_sparse_file_of_text_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_MOST_LINE_BYTES", 1 << 20)
    store, size = HeldoutStore(tmp_path), 4 << 20
    address = hashlib.sha256(bytes(size)).hexdigest()
    store.root.mkdir()
    with store.path(address).open("wb") as file:
        file.truncate(size)
    with pytest.raises(CorruptError, match="a document of more than 1 MiB"):
        store.documents(address)
    # Of another hash, however long, it is not held at all.
    with store.path("0" * 64).open("wb") as file:
        file.truncate(size)
    with pytest.raises(CorruptError, match=f"SHA-256 is {address}"):
        store.documents("0" * 64)


def test_a_small_file_of_a_stage_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_directory(tmp_path / "a", {"tokenizer.json": lambda path: path.write_bytes(bytes(2 << 20))})
    monkeypatch.setattr(verified, "MOST_BYTES", 1 << 20)
    with pytest.raises(CorruptError, match=r"a/tokenizer\.json: longer than 1 MiB"):
        verified.verify_directory(tmp_path / "a").read("tokenizer.json")
