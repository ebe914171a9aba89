"""Domains of a corpus a chunk at a time, and the file that keeps them."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lifelong_moe.clustering.chunks import ChunkDomains, DomainFile, chunk_begins
from lifelong_moe.storage.temporary import remove_temporary
from tests.tiny import fork, kill_self

KEY = hashlib.sha256(b"tokens and centroids").hexdigest()
IDS = np.array([0, 2, 1, 1, 0, 2, 2], np.uint8)


@pytest.fixture
def kept(tmp_path: Path) -> DomainFile:
    """Seven chunks of three domains, beside tokens; nothing is written yet."""
    (tmp_path / "tokens.bin").write_bytes(b"tokens")
    return DomainFile(tmp_path, KEY, len(IDS), 3)


def written(kept: DomainFile) -> bytes:
    kept.write([IDS[:3].astype(np.int64), IDS[3:].astype(np.int64)])
    return kept.path.read_bytes()


def by_hand(lengths: list[int], chunk: int, ids: NDArray[np.integer], first: int | None) -> list[int]:
    """Token after token."""
    found, chunks = list[int](), iter(ids.tolist())
    for length in lengths:
        for place in range(length):
            if place % chunk == 0:
                domain = next(chunks)
            found.append(first if first is not None and place < chunk else domain)
    return found


@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
@pytest.mark.parametrize("first", [None, 7])
def test_every_slice_is_that_of_the_array(chunk: int, first: int | None) -> None:
    lengths = [4, 1, 0, 9, 3]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.arange(chunk_begins(offsets, chunk)[-1], dtype=np.uint8)
    domains, expected = ChunkDomains(offsets, chunk, ids, first), by_hand(lengths, chunk, ids, first)
    assert domains.shape == (17,) and domains[:].tolist() == expected
    for begin in range(18):
        for end in range(begin, 19):
            assert domains[begin:end].tolist() == expected[begin:end]


def test_domains_of_other_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="for 2 chunks"):
        ChunkDomains(np.array([0, 5]), 4, np.zeros(3, np.uint8))


def test_what_is_written_is_found_again(kept: DomainFile) -> None:
    assert kept.find() is None
    written(kept)
    found = kept.find()
    assert isinstance(found, np.memmap) and found.tolist() == IDS.tolist() and not found.flags.writeable
    assert [path.name for path in sorted(kept.folder.iterdir())] == [f"domains-{KEY[:16]}.bin", "tokens.bin"]


@pytest.mark.parametrize(("domains", "width"), [(2, 1), (256, 1), (257, 2)])
def test_a_byte_for_up_to_256_domains(kept: DomainFile, domains: int, width: int) -> None:
    kept = replace(kept, domains=domains)
    ids = np.full(7, domains - 1)
    kept.write([ids])
    assert kept.path.stat().st_size == 7 * width + 32
    found = kept.find()
    assert found is not None and found.tolist() == ids.tolist()


def other_hash(data: bytes) -> bytes:
    """A number that no domain has, and a hash that fits."""
    numbers = b"\x03" + data[1:-32]
    return numbers + hashlib.sha256(KEY.encode() + numbers).digest()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "hash flipped": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "cut": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "of no domain": other_hash,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_none_and_is_written_again(kept: DomainFile, damage: str) -> None:
    whole = written(kept)
    kept.path.write_bytes(DAMAGES[damage](whole))
    assert kept.find() is None
    assert written(kept) == whole and kept.find() is not None


def test_a_file_of_other_tokens_or_centroids_is_none_whatever_its_name(kept: DomainFile) -> None:
    written(kept)
    other = replace(kept, key=hashlib.sha256(b"others").hexdigest())
    os.rename(kept.path, other.path)
    assert other.find() is None
    assert replace(kept, key=KEY[:16] + "0" * 48).find() is None  # the same name


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_only_a_file_is_read(kept: DomainFile, kind: str) -> None:
    written(kept)
    os.rename(kept.path, kept.folder / "elsewhere")
    match kind:
        case "link":
            kept.path.symlink_to("elsewhere")
        case "pipe":
            os.mkfifo(kept.path)
        case _:
            kept.path.mkdir()
    assert kept.find() is None
    if kind == "folder":
        with pytest.raises(OSError):
            written(kept)
    else:
        written(kept)
        assert kept.find() is not None and not kept.path.is_symlink()


def test_an_error_half_way_leaves_nothing(kept: DomainFile) -> None:
    def killed() -> Iterator[NDArray[np.integer]]:
        yield IDS[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept.write(killed())
    assert kept.find() is None and [path.name for path in kept.folder.iterdir()] == ["tokens.bin"]


def test_a_kill_half_way_leaves_nothing_that_is_believed(kept: DomainFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """What remains is found like other half-written files, three folders below the cache at most."""
    cache = kept.folder / "cache"
    inner = replace(kept, folder=cache / "tokens" / "part")
    inner.folder.mkdir(parents=True)
    (inner.folder / "tokens.bin").write_bytes(b"tokens")
    monkeypatch.chdir(kept.folder)

    def killed() -> Iterator[NDArray[np.integer]]:
        yield IDS[:3]
        kill_self()

    assert fork(lambda: inner.write(killed())).wait() == -9
    assert inner.find() is None and len(list(inner.folder.iterdir())) == 2
    assert remove_temporary(cache) == 1 and [path.name for path in inner.folder.iterdir()] == ["tokens.bin"]
    written(inner)
    assert inner.find() is not None


def test_it_does_not_come_back_when_the_tokens_are_gone(kept: DomainFile) -> None:
    (kept.folder / "tokens.bin").unlink()
    kept.folder.rmdir()
    with pytest.raises(OSError):
        written(kept)
    assert not kept.folder.exists()


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_it_is_as_private_as_the_tokens(kept: DomainFile, mode: int) -> None:
    (kept.folder / "tokens.bin").chmod(mode)
    before = os.umask(0o022)
    try:
        written(kept)
    finally:
        os.umask(before)
    assert stat.S_IMODE(kept.path.stat().st_mode) == mode


def test_opening_it_keeps_it_from_being_collected(kept: DomainFile) -> None:
    written(kept)
    os.utime(kept.path, (1, 1))
    assert kept.find() is not None and kept.path.stat().st_mtime > 1
