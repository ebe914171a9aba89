"""An index of known documents says what the documents themselves say, or nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lifelong_moe.data.text import known_hashes
from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.text.known_hashes import HashIndex, KnownText, write_index
from lifelong_moe.data.text.manifest import FOLDER
from lifelong_moe.data.text.spool import same_hashes

KNOWN = [Document(f"known document number {number}", "a") for number in range(50)]
NEW = [Document(f"new document number {number}", "a") for number in range(9)]
HASHES = list(same_hashes([*NEW, *KNOWN[:7]]))
REPEATED = set(HASHES[9:])


class ReadError(Exception):
    """In place of text that may not be read."""


def refused() -> list[list[Document]]:
    raise ReadError


def text(parts: Callable[[], list[list[Document]]] = lambda: [KNOWN[:20], KNOWN[20:]], state: str = "now") -> KnownText:
    return KnownText(parts, "f" * 64, state)


def index_file(cache: Path) -> Path:
    (path,) = (cache / FOLDER).iterdir()
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """With an index of the text."""
    index = HashIndex(tmp_path)
    assert index.repeated(HASHES, [text()]) == REPEATED
    assert not list(tmp_path.iterdir())  # until it is told that no mistake was found
    index.save()
    return tmp_path


def test_text_is_read_once(cache: Path) -> None:
    assert HashIndex(cache).repeated(HASHES, [text(refused)]) == REPEATED
    assert HashIndex(cache).repeated([], [text(refused)]) == set()
    before = index_file(cache).read_bytes()
    write_index(cache, text())  # from the text, as when data are prepared
    assert index_file(cache).read_bytes() == before


@given(st.lists(st.binary(min_size=16, max_size=16)), st.lists(st.binary(min_size=16, max_size=16)), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_what_is_among_others(wanted: list[bytes], known: list[bytes], first: int) -> None:
    # Of hashes that begin alike as well.
    known = [*known, *(one[:8] + other[8:] for one, other in zip(wanted, known, strict=False)), *wanted[:first]]
    asked = known_hashes._Wanted.of(wanted)
    assert asked.among(b"".join(known)) == set(wanted) & set(known)


def test_text_that_nothing_names_is_read_each_time(tmp_path: Path) -> None:
    for one in (KnownText.there(KNOWN), text(state="")):
        index = HashIndex(tmp_path)
        assert index.repeated(HASHES, [one]) == REPEATED
        index.save()
    assert not list(tmp_path.iterdir())


def test_files_that_have_changed_since_are_read(cache: Path) -> None:
    with pytest.raises(ReadError):
        HashIndex(cache).repeated(HASHES, [text(refused, state="then")])
    index = HashIndex(cache)
    assert index.repeated(HASHES, [text(lambda: [KNOWN[:3]], state="then")]) == set(HASHES[9:12])
    index.save()
    assert HashIndex(cache).repeated(HASHES, [text(refused, state="then")]) == set(HASHES[9:12])


@pytest.mark.parametrize("damage", ["a bit", "shorter", "longer", "empty", "no hashes", "a folder", "a link", "a FIFO"])
def test_a_damaged_index_says_nothing_and_is_made_again(damage: str, cache: Path) -> None:
    path = index_file(cache)
    data = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "a link":
        path.with_name("elsewhere").write_bytes(data)
        path.symlink_to("elsewhere")
    elif damage == "a FIFO":
        os.mkfifo(path)
    else:
        flipped = bytes([*data[:200], data[200] ^ 1, *data[201:]])
        changed = {"a bit": flipped, "shorter": data[:-16], "longer": data + bytes(16), "empty": b""}
        path.write_bytes(changed.get(damage, data[: data.index(b"\n") + 1] + data[-32:]))
    index = HashIndex(cache)
    assert index.repeated(HASHES, [text()]) == REPEATED
    index.save()
    if damage != "a folder":  # which a file does not replace
        assert path.read_bytes() == data and not path.is_symlink()


def test_every_bit_counts(cache: Path) -> None:
    path = index_file(cache)
    data = path.read_bytes()
    for place in range(0, len(data), 13):
        path.write_bytes(bytes([*data[:place], data[place] ^ 4, *data[place + 1 :]]))
        with pytest.raises(ReadError):
            HashIndex(cache).repeated(HASHES, [text(refused)])


def test_an_index_of_any_size_takes_no_memory(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_hashes, "_AT_ONCE", 3)
    assert HashIndex(cache).repeated(HASHES, [text(refused)]) == REPEATED
    with index_file(cache).open("r+b") as file:  # it is refused by its beginning alone
        file.write(b"\0")
        file.truncate(1 << 40)
    with pytest.raises(ReadError):
        HashIndex(cache).repeated(HASHES, [text(refused)])


def test_where_text_is_read_after_all_it_is_believed_and_a_wrong_index_goes(cache: Path) -> None:
    index = HashIndex(cache)
    assert index.read(HASHES, [text()]) == REPEATED and index_file(cache).exists()
    assert index.read(HASHES, [text(lambda: [KNOWN[:3]])]) == set(HASHES[9:12])
    assert not list((cache / FOLDER).iterdir())
