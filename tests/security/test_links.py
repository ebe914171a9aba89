"""A store from somebody else holds directories and regular files: no link in it is followed, by any command."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from lifelong_moe.errors import CorruptError, LockedError
from lifelong_moe.storage.files import append_line
from lifelong_moe.storage.locks import locked, locked_when_free
from lifelong_moe.storage.plain_files import require_plain_files
from pipelines.cli import COMMANDS, app
from tests.security.hostile import ARGUMENTS, outcome, snapshot

EARLIER = Path(__file__).parents[1] / "integration/earlier"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two stages, and next to it what nobody may touch."""
    shutil.copytree(EARLIER, tmp_path / "here")
    outside = tmp_path / "outside"
    (outside / "folder").mkdir(parents=True)
    for name in ("start", "folder/old.png", "folder/head.json"):
        (outside / name).write_text("{}\n")
        os.utime(outside / name, (0, 0))
    monkeypatch.chdir(tmp_path / "here")
    config = json.loads(Path("mlruns/runs/old/head.json").read_text())["config"]
    Path("old.yaml").write_text(json.dumps(config))
    Path("compare.yaml").write_text(json.dumps({"compare": "c", "base": "old.yaml", "arms": {"a": {}}}))
    Path("retrain.yaml").write_text(json.dumps({"base": "old.yaml", "inbox": {"path": "inbox"}}))
    return tmp_path


def test_every_command_is_tried_here() -> None:
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == set(ARGUMENTS)
    assert len(COMMANDS) == len(ARGUMENTS)


@pytest.mark.parametrize("command", ARGUMENTS)
@pytest.mark.parametrize(
    ("place", "target"),
    [
        ("mlruns/runs/old/ledger.jsonl", "start"),
        ("mlruns/runs/old/.lock", "start"),
        ("mlruns/runs/old/inspection", "folder"),
        ("mlruns/work", "folder"),
        ("mlruns/evaluations", "folder"),
        ("mlruns/stages/fruit-a4d92ce99747f6a2/config.json", "start"),
        ("mlruns/spool", "folder"),
        ("data/cache/tokens", "folder"),
        ("mlruns/artifacts/deep/er/link", "missing"),
    ],
)
def test_no_command_follows_a_link(store: Path, command: str, place: str, target: str) -> None:
    path = Path(place)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(store / "outside" / target)
    before = snapshot(store)
    code, error = outcome(command)
    assert (code, error) == (
        7,
        f"CorruptError: {place}: a symbolic link; a store holds directories and regular files only. "
        f"Put what it leads to in its place.",
    )
    assert snapshot(store) == before


def test_the_root_itself_may_be_a_link(store: Path) -> None:
    Path("mlruns").rename(store / "elsewhere")
    Path("mlruns").symlink_to(store / "elsewhere")
    assert outcome("status")[0] == 0


@pytest.mark.parametrize(
    ("make", "kind"),
    [(os.mkfifo, "a FIFO"), (lambda path: os.mknod(path, stat.S_IFSOCK), "a socket")],
)
def test_what_is_neither_a_folder_nor_a_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object], kind: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    Path("root/a").mkdir(parents=True)
    require_plain_files(Path("root"))
    require_plain_files(Path("not there"))
    make(Path("root/a/thing"))
    with pytest.raises(CorruptError, match=f"^root/a/thing: {kind}; a store holds"):
        require_plain_files(Path("root"))


def test_a_link_that_comes_later_is_not_followed_either(tmp_path: Path) -> None:
    """The look at the whole store is over by then."""
    outside = tmp_path / "outside"
    outside.write_text("mine\n")
    for path in (tmp_path / "ledger.jsonl", tmp_path / ".lock"):
        path.symlink_to(outside)
    with pytest.raises(CorruptError, match="a symbolic link, which is not followed"):
        append_line(tmp_path / "ledger.jsonl", "touch pwned")
    with pytest.raises(CorruptError, match="a symbolic link, which is not followed"), locked(tmp_path / ".lock", "x"):
        pass
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CorruptError, match="a FIFO, not a regular file"):
        append_line(tmp_path / "fifo", "x")
    assert outside.read_text() == "mine\n"


def test_a_second_name_of_a_file_outside_gets_a_file_of_its_own(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine\n")
    os.link(outside, tmp_path / "ledger.jsonl")
    append_line(tmp_path / "ledger.jsonl", "touch pwned")
    append_line(tmp_path / "ledger.jsonl", "more")
    assert (tmp_path / "ledger.jsonl").read_text() == "mine\ntouch pwned\nmore\n"
    os.link(outside, tmp_path / ".lock")
    for lock in (lambda path: locked(path, "x"), locked_when_free):
        with pytest.raises(CorruptError, match="not a lock file"), lock(tmp_path / ".lock"):  # type: ignore[operator]
            pass
    assert outside.read_text() == "mine\n"


def test_a_lock_is_readable_for_those_alone_who_may_write_it(tmp_path: Path) -> None:
    for mask in (0o022, 0o002, 0o077):
        path, before = tmp_path / f"{mask}.lock", os.umask(mask)
        try:
            for _ in range(2):
                with locked(path, "x"):
                    assert path.stat().st_mode & 0o777 == 0o600
                path.chmod(0o644)  # as earlier versions made it
        finally:
            os.umask(before)


def test_nobody_holds_a_lock_for_ever_and_the_holder_is_named(tmp_path: Path) -> None:
    """A reader holds a shared lock, without writing his number into the file."""
    import fcntl

    path = tmp_path / ".lock"
    path.write_text("123")
    ready, release = os.pipe(), os.pipe()
    if not (reader := os.fork()):
        with path.open("r") as file:
            fcntl.lockf(file, fcntl.LOCK_SH)
            os.write(ready[1], b"x")
            os.read(release[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        with pytest.raises(LockedError, match=f"by process {reader}; try again"), locked(path, "x"):
            pass
        with pytest.raises(TimeoutError, match=f"process {reader} holds"), locked_when_free(path, 0.001):
            pass
    finally:
        os.write(release[1], b"x")
        os.waitpid(reader, 0)
    with locked_when_free(path):
        pass
