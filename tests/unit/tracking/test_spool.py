"""The spool itself: order, durability, several processes, and what is in its files. No MLflow here."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lifelong_moe.storage.keys import text_sha256
from lifelong_moe.tracking.spool import Delivered, RefusedError, Spool, left_for_others

URI = "http://me:canary@127.0.0.1:5000/base?token=canary"


class Store:
    """Remembers what it was told; ``fails`` may raise."""

    def __init__(self, fails: Callable[[int], None] = lambda number: None) -> None:
        self.told: list[tuple[int, bytes | None]] = []
        self.fails = fails

    def perform(self, operation: dict[str, Any], content: bytes | None) -> None:
        self.fails(operation["number"])
        self.told.append((operation["number"], content))

    @property
    def numbers(self) -> list[int]:
        return [number for number, _ in self.told]


def in_child(action: Callable[[], object]) -> int:
    """Do something in a forked process; returns its pid."""
    if pid := os.fork():
        return pid
    try:
        action()
    finally:
        os._exit(0)


def filled(root: Path, count: int = 5) -> Spool:
    spool = Spool(root, URI)
    for number in range(count):
        spool.append({"do": "metrics", "number": number})
    return spool


def test_nothing_is_written_before_there_is_something(tmp_path: Path) -> None:
    spool = Spool(tmp_path, URI)
    assert spool.empty and spool.deliver(Store().perform) == Delivered(0, 0)
    assert left_for_others(tmp_path, []) == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_does_not_know_is_refused_and_spoils_nothing(tmp_path: Path, value: float) -> None:
    spool = filled(tmp_path, 1)
    with pytest.raises(ValueError, match="JSON compliant"):
        spool.append({"do": "metrics", "number": 1, "value": value})
    spool.append({"do": "metrics", "number": 2})
    store = Store()
    assert spool.deliver(store.perform) == Delivered(2, 0) and store.numbers == [0, 2]


def test_all_is_told_in_order_with_its_files_and_forgotten(tmp_path: Path) -> None:
    spool = filled(tmp_path, 2)
    spool.append({"do": "artifact", "number": 2, "path": "figures/a.png"}, b"\x89PNG")
    spool.append({"do": "artifact", "number": 3, "path": "notes/\u2028.md"}, "a\u2028b\n".encode())
    assert left_for_others(tmp_path, []) == [spool.address] and left_for_others(tmp_path, [spool]) == []
    store = Store()
    assert spool.deliver(store.perform) == Delivered(4, 0)
    assert store.told == [(0, None), (1, None), (2, b"\x89PNG"), (3, "a\u2028b\n".encode())]
    assert spool.empty and left_for_others(tmp_path, []) == []
    assert not list((spool.path / "files").iterdir()) and not list(spool.path.glob("*.jsonl"))


def test_what_a_failing_store_was_not_told_is_told_later(tmp_path: Path) -> None:
    spool = filled(tmp_path)

    def fails(number: int) -> None:
        if number == 3:
            raise ConnectionError("gone")

    store = Store(fails)
    with pytest.raises(ConnectionError, match="gone"):
        spool.deliver(store.perform)
    assert store.numbers == [0, 1, 2]
    spool.append({"do": "metrics", "number": 5})
    again = Store()
    assert spool.deliver(again.perform) == Delivered(3, 0)
    assert again.numbers == [3, 4, 5]


def test_a_killed_delivery_is_repeated_from_the_start(tmp_path: Path) -> None:
    spool = filled(tmp_path)

    def fails(number: int) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    pid = in_child(lambda: spool.deliver(Store(fails).perform))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    spool.append({"do": "metrics", "number": 5})
    store = Store()
    assert spool.deliver(store.perform) == Delivered(6, 0)
    assert store.numbers == [0, 1, 2, 3, 4, 5]


def test_a_torn_line_costs_itself_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = filled(tmp_path, 2)
    pending = spool.path / "pending.jsonl"
    pending.write_bytes(pending.read_bytes() + b'{"do":"metrics","num')
    spool.append({"do": "metrics", "number": 2})
    store = Store()
    assert spool.deliver(store.perform) == Delivered(3, 1)
    assert store.numbers == [0, 1, 2]
    assert "the record is damaged" in caplog.text


def test_what_is_refused_is_put_aside_with_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = filled(tmp_path, 1)
    spool.append({"do": "artifact", "number": 1, "path": "a.txt"}, b"kept")
    spool.append({"do": "metrics", "number": 2})

    def fails(number: int) -> None:
        if number == 1:
            raise RefusedError("run is deleted")

    store = Store(fails)
    assert spool.deliver(store.perform) == Delivered(2, 1)
    assert store.numbers == [0, 2] and spool.empty
    (line,) = (spool.path / "refused.jsonl").read_text().splitlines()
    refused = json.loads(line)
    assert refused["reason"] == "run is deleted"
    assert (spool.path / "files" / json.loads(refused["operation"])["file"]).read_bytes() == b"kept"
    assert "run is deleted" in caplog.text


def test_a_bounded_delivery_keeps_the_rest(tmp_path: Path) -> None:
    spool = filled(tmp_path)
    store = Store()
    with pytest.raises(TimeoutError, match="5 records are left"):
        spool.deliver(store.perform, seconds=-1.0)
    assert not store.told and not spool.empty
    assert spool.deliver(store.perform) == Delivered(5, 0)


def test_processes_append_while_another_delivers(tmp_path: Path) -> None:
    spool = filled(tmp_path, 1)

    def write(first: int) -> Callable[[], object]:
        return lambda: [spool.append({"do": "metrics", "number": first + i}) for i in range(30)]

    children = [in_child(write(100 * (1 + child))) for child in range(3)]
    store = Store()
    for pid in children:
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            spool.deliver(store.perform)
        assert ended == (pid, 0)
    spool.deliver(store.perform)
    assert spool.empty and len(store.told) == 91
    for child in range(1, 4):  # each one's own order is kept
        assert [n for n in store.numbers if n // 100 == child] == [100 * child + i for i in range(30)]


def test_credentials_are_written_nowhere(tmp_path: Path) -> None:
    spool = filled(tmp_path)
    # In the path too a token may stand.
    assert (spool.path / "address").read_text() == "http://***@127.0.0.1:5000/***"
    # Another password is the same store; the folder is that of earlier versions.
    assert Spool(tmp_path, "http://you:other@127.0.0.1:5000/base").path == spool.path
    assert Spool(tmp_path, "http://127.0.0.1:5000/other").path != spool.path
    assert spool.path.name == text_sha256("http://127.0.0.1:5000/base")[:16]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 1 and all(b"canary" not in path.read_bytes() for path in written)
