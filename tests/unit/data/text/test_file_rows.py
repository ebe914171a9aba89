"""What is remembered of a file says what reading it would say, whatever it is called and wherever its text lies."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.text import file_rows, spool
from lifelong_moe.data.text.documents import Corpus
from lifelong_moe.data.text.manifest import ROWS
from lifelong_moe.data.text.sources import read_corpus
from lifelong_moe.errors import DataError
from lifelong_moe.storage.remembered import SETTLED_SECONDS


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is large enough to be remembered, and old enough."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(file_rows, "LEAST_BYTES", 1)
    monkeypatch.setattr("lifelong_moe.data.text.manifest.SETTLED_SECONDS", -SETTLED_SECONDS)


def write(name: str, first: int, number: int = 20, **more: Any) -> None:
    Path(name).parent.mkdir(exist_ok=True)
    rows = ({"text": f"text of document {i} {i * i}", **more} for i in range(first, first + number))
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def remembered(cache: str, **settings: Any) -> Corpus:
    """Read, and remember what was read."""
    corpus = read_corpus("a", SourceConfig(**{"heldout_fraction": 0.2, **settings}), Path(cache))
    if corpus.remember is not None:
        corpus.remember()
    return corpus


def error_of(cache: str, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        remembered(cache, **settings)
    return str(caught.value)


def test_a_file_that_a_glob_leaves_out_is_a_mistake_where_it_is_named() -> None:
    write("text/a.jsonl", 0)
    Path("text/noise.txt").write_bytes(b"\x81\x8d\0" * 50)
    remembered("kept", files="text/*")
    named = ["text/a.jsonl", "text/noise.txt"]
    assert error_of("kept", files=named) == error_of("new", files=named)


def test_a_file_that_is_left_out_is_called_by_its_name_now() -> None:
    write("text/a.jsonl", 0)
    Path("text/noise.txt").write_bytes(b"\x81\x8d\0" * 50)
    remembered("kept", files="text/*")
    Path("text/noise.txt").rename("text/other.txt")
    assert remembered("kept", files="text/*").files == remembered("new", files="text/*").files


def test_a_name_that_is_no_unicode() -> None:
    write("text/a.jsonl", 0)
    remembered("kept", files="text/*")
    write("text/b.jsonl", 20)
    os.rename(b"text/b.jsonl", b"text/b.\xff.jsonl")
    assert remembered("kept", files="text/*") == remembered("new", files="text/*")


def test_a_file_that_goes_before_it_is_remembered() -> None:
    write("text/a.jsonl", 0)
    corpus = read_corpus("a", SourceConfig(files="text/*", heldout_fraction=0.2), Path("kept"))
    Path("text/a.jsonl").unlink()
    assert corpus.remember is not None
    corpus.remember()


def test_names_of_sources_are_kept_though_known_text_goes_to_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    write("text/a.jsonl", 0, 200, source="site a")
    write("text/b.jsonl", 200, 200, source="site b")
    remembered("kept", files="text/*")
    write("text/c.jsonl", 400, 10, source="site c")
    remembered("new", files="text/*")
    # Less than all text, and more than its rows.
    monkeypatch.setattr(spool, "MOST_BYTES", 10_000)
    monkeypatch.setattr(spool.Spool, "_spill", lambda _: None)
    corpus = read_corpus("a", SourceConfig(files="text/*", heldout_fraction=0.2), Path("kept"))
    # Asked for, as by the training of a tokenizer, before anything is remembered.
    assert len(list(corpus.train)) > 200 and corpus.remember is not None
    corpus.remember()
    kept, new = ({path.name: path.read_bytes() for path in Path(cache).glob(f"*/*{ROWS}")} for cache in ("kept", "new"))
    assert len(kept) == 3 and kept == new


def test_documents_on_disk_without_sources_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "MOST_BYTES", 100)
    write("text/a.jsonl", 0)
    remembered("kept", files="text/*")
    assert len(list(Path("kept/manifests").glob(f"*{ROWS}"))) == 1


def test_a_held_out_document_is_called_by_its_line() -> None:
    write("held.jsonl", 0)
    write("text/a.jsonl", 20)
    remembered("kept", files="text/*", heldout_files="held.jsonl")
    write("text/b.jsonl", 19, 2)
    settings = {"files": "text/*", "heldout_files": "held.jsonl"}
    assert error_of("kept", **settings) == error_of("new", **settings)
