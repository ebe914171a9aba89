"""Canonical JSON, atomic writing, and what killed writers leave."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from lifelong_moe.errors import CorruptError
from lifelong_moe.storage import temporary as module
from lifelong_moe.storage.directories import new_directory
from lifelong_moe.storage.files import append_line, write_atomic
from lifelong_moe.storage.keys import canonical_json, file_sha256, text_sha256
from lifelong_moe.storage.modes import PRIVATE
from lifelong_moe.storage.temporary import remove_temporary, temporary

HOUR = 3600.0


def test_canonical_json() -> None:
    assert canonical_json({"b": [1, 2.5], "a": "é"}) == '{"a":"é","b":[1,2.5]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    write_atomic(path, b"old")
    write_atomic(path, b"abc")
    assert path.read_bytes() == b"abc"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]
    assert file_sha256(path) == text_sha256("abc")


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.rename", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("umask", "shared"), [(0o022, 0o640), (0o002, 0o640), (0o077, 0o600), (0, 0o640)])
def test_what_is_written_is_for_its_owner_and_group(tmp_path: Path, umask: int, shared: int) -> None:
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "a" / "file", b"")
        write_atomic(tmp_path / "private", b"", PRIVATE)
        append_line(tmp_path / "b" / "lines", "line")
        with new_directory(tmp_path / "c" / "made") as work:
            (work / "file").touch(0o666)
            (work / "narrow").touch(0o600)
        with new_directory(tmp_path / "secret", PRIVATE) as work:
            (work / "file").touch(0o666)
    finally:
        os.umask(before)
    for name in ("a/file", "b/lines", "c/made/file", "c/made/narrow"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == shared
        assert stat.S_IMODE((tmp_path / name).parent.stat().st_mode) == shared | 0o100 | (shared & 0o040) >> 2
    for name in ("private", "secret/file"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o700


def test_lines_are_appended_to_no_link(tmp_path: Path) -> None:
    (tmp_path / "startup").write_text("ours\n")
    (tmp_path / "lines").symlink_to("startup")
    with pytest.raises(CorruptError, match="symbolic link"):
        append_line(tmp_path / "lines", "theirs")
    assert (tmp_path / "startup").read_text() == "ours\n"


def left_behind(path: Path, age: float) -> Path:
    """A directory with one file, of which nothing has changed for so many seconds."""
    path.mkdir(parents=True)
    (path / "file").write_bytes(b"half")
    for entry in (path / "file", path):
        os.utime(entry, (time.time() - age, time.time() - age))
    return path


def abandon(parent: Path) -> Path:
    """What a process leaves that is killed while it writes."""
    pid = os.fork()
    if not pid:
        with temporary(parent) as work:
            (work / "file").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    (path,) = parent.glob(".tmp-*")
    return path


def test_a_temporary_directory_is_gone_in_the_end_whatever_happens(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), temporary(tmp_path) as work:
        (work / "file").write_bytes(b"half")
        raise ValueError("wrong")
    with temporary(tmp_path) as work:
        work.rename(tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize("folder", ["", "stages", "runs/tiny/plans", "spool/0123/files"])
def test_what_a_killed_process_left_goes_at_once(tmp_path: Path, folder: str) -> None:
    parent = tmp_path / folder
    parent.mkdir(parents=True, exist_ok=True)
    path = abandon(parent)
    assert remove_temporary(tmp_path) == 1 and not path.exists()


def test_a_process_identifier_that_is_used_again_means_nothing(tmp_path: Path) -> None:
    name = abandon(tmp_path).name
    assert str(os.getpid()) not in name
    assert remove_temporary(tmp_path) == 1


@pytest.mark.parametrize("machine", ["", "@elsewhere"], ids=["here", "elsewhere"])
def test_a_living_writer_keeps_its_directory_however_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    ready, wait = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        with temporary(tmp_path) as work:
            left_behind(work / "inner", 400 * 24 * HOUR)
            os.utime(work, (0, 0))
            os.write(ready[1], b"1")
            os.read(wait[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    if machine:
        monkeypatch.setattr(module, "_machine", lambda: machine)
    assert remove_temporary(tmp_path) == 0 and len(list(tmp_path.glob(".tmp-*/inner/file"))) == 1
    os.write(wait[1], b"1")
    os.waitpid(pid, 0)
    assert list(tmp_path.iterdir()) == []


def test_our_own_directory_is_not_removed_by_ourselves(tmp_path: Path) -> None:
    with temporary(tmp_path) as work:
        assert remove_temporary(tmp_path) == 0 and work.is_dir()


@pytest.mark.parametrize(
    "name",
    [".tmp-0123456789abcdef@elsewhere", ".tmp-host-123-0123abcd", ".tmp-123-0123456789abcdef", ".tmp-0123456789abcdef"],
)
def test_what_others_left_goes_after_a_day(tmp_path: Path, name: str) -> None:
    """Of other machines, and of names as they once were."""
    old, young = left_behind(tmp_path / "a" / name, 25 * HOUR), left_behind(tmp_path / "b" / name, 23 * HOUR)
    written = left_behind(tmp_path / "c" / name, 25 * HOUR)
    (written / "file").write_bytes(b"a little more")
    assert remove_temporary(tmp_path) == 1
    assert (old.exists(), young.exists(), written.exists()) == (False, True, True)


def test_what_is_dated_in_the_future_goes_a_day_from_now(tmp_path: Path) -> None:
    path = left_behind(tmp_path / ".tmp-0123456789abcdef@elsewhere", -3650 * 24 * HOUR)
    assert remove_temporary(tmp_path) == 0
    assert max(entry.stat().st_mtime for entry in (path, path / "file")) < time.time() + HOUR
    for entry in (path / "file", path):
        os.utime(entry, (time.time() - 25 * HOUR,) * 2)
    assert remove_temporary(tmp_path) == 1


def test_files_of_earlier_versions_go_as_well(tmp_path: Path) -> None:
    path = tmp_path / ".tmp-123-address"
    path.write_bytes(b"")
    os.utime(path, (time.time() - 25 * HOUR,) * 2)
    assert remove_temporary(tmp_path) == 1 and not path.exists()


@pytest.mark.parametrize(
    "name", [".tmp-notes", ".tmp-0123", ".tmp-2024-notes", ".tmp-0123456789abcdef.bak", ".tmp-my-0123abcd", "tmp-1"]
)
def test_what_has_no_name_of_ours_stays(tmp_path: Path, name: str) -> None:
    path = left_behind(tmp_path / "stages" / name, 400 * 24 * HOUR)
    assert remove_temporary(tmp_path) == 0 and (path / "file").exists()


def test_age_decides_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with temporary(tmp_path) as work:
        assert "@" not in work.name and remove_temporary(tmp_path) == 0
    path = left_behind(tmp_path / ".tmp-0123456789abcdef@here", 23 * HOUR)
    monkeypatch.setattr(module, "_machine", lambda: "@here")
    assert remove_temporary(tmp_path) == 0  # perhaps its writer could lock it
    left_behind(path / "inner", 0)
    os.utime(path / "inner", (0, 0))
    for entry in path.rglob("*"):
        os.utime(entry, (0, 0))
    os.utime(path, (0, 0))
    assert remove_temporary(tmp_path) == 1


def test_what_cannot_be_looked_at_or_removed_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's, whose directory we may read only."""
    left = tmp_path / ".tmp-otherhost-1-0123abcd"
    left.mkdir()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "not yours")

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", refuse)
        assert remove_temporary(tmp_path) == 0
    os.utime(left, (0, 0))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        assert remove_temporary(tmp_path) == 0
    assert left.is_dir() and remove_temporary(tmp_path) == 1


def test_what_lies_deeper_than_anything_of_ours_is_not_ours(tmp_path: Path) -> None:
    for depth, number in (("a/b/c", 1), ("a/b/c/d", 0)):
        left_behind(tmp_path / depth / ".tmp-0123456789abcdef@elsewhere", 25 * HOUR)
        assert remove_temporary(tmp_path) == number


def test_looking_makes_nothing_younger(tmp_path: Path) -> None:
    """Else what is looked at every night would never be a day old."""
    path = left_behind(tmp_path / ".tmp-0123456789abcdef@elsewhere", 23 * HOUR)
    before = (path / "file").stat().st_mtime
    assert remove_temporary(tmp_path) == 0 and (path / "file").stat().st_mtime == before
