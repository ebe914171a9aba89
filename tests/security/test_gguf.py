"""Headers of GGUF files that somebody made to harm whoever reads them: refused in a line, at once."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import pytest

from lifelong_moe.errors import CheckpointError
from lifelong_moe.interop.layout.gguf import read_gguf

HUGE = 2**62
UINT8, UINT32, STRING, ARRAY = 0, 4, 8, 9


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(*, version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def tensor(name: str, *shape: int, kind: int = 0, start: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, start)


HARMFUL = {
    "nothing": (b"", "not a GGUF file"),
    "another file": (b"PK\x03\x04" + bytes(64), "not a GGUF file"),
    "no counts": (b"GGUF\x03\x00\x00\x00", "cut off within its header"),
    "the other order of bytes": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
    "many keys": (header(keys=HUGE) + bytes(64), "cut off within its header"),
    "many tensors": (header(tensors=HUGE), "cut off within its header"),
    "a long name": (header(keys=1) + struct.pack("<Q", HUGE), "cut off within its header"),
    "a long array": (
        header(keys=1) + text("a") + struct.pack("<IIQ", ARRAY, UINT8, HUGE),
        "cut off within its header",
    ),
    "a long array of texts": (
        header(keys=1) + text("a") + struct.pack("<IIQ", ARRAY, STRING, HUGE) + text("b"),
        "cut off within its header",
    ),
    "arrays of arrays": (
        header(keys=1) + text("a") + struct.pack("<IIQ", ARRAY, ARRAY, 1) * 2000,
        "value of kind 9",
    ),
    "an unknown kind": (header(keys=1) + text("a") + struct.pack("<I", 99), "value of kind 99"),
    "many dimensions": (header(tensors=1) + text("a") + struct.pack("<I", 2**32 - 1), "4294967295 dimensions"),
    "a name twice": (header(tensors=2) + tensor("a", 1) * 2, "has a twice"),
    "no alignment": (
        header(keys=1) + text("general.alignment") + struct.pack("<II", UINT32, 0),
        "general.alignment=0",
    ),
    "no UTF-8": (header(keys=1) + struct.pack("<Q", 2) + b"\xff\xfe" + bytes(16), "invalid UTF-8"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_header_costs_a_line(tmp_path: Path, name: str) -> None:
    data, said = HARMFUL[name]
    (tmp_path / "a.gguf").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=said):
            read_gguf(tmp_path / "a.gguf")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match="a FIFO"):
        read_gguf(tmp_path / "a.gguf")


def test_tensors_lie_where_the_header_says(tmp_path: Path) -> None:
    data = header(tensors=1, keys=1) + text("a") + struct.pack("<IIQ3B", ARRAY, UINT8, 3, 7, 8, 9)
    data += tensor("w", 2, 5, start=32)
    (tmp_path / "a.gguf").write_bytes(data)
    found = read_gguf(tmp_path / "a.gguf")
    assert found.keys == {"a": [7, 8, 9]}
    (block,) = found.tensors.values()
    assert (block.shape, block.start % 32, block.start - len(data)) == ((5, 2), 0, 32 + -len(data) % 32)
