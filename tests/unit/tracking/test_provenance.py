"""Who ran which code on what machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from lifelong_moe.tracking import provenance as made
from lifelong_moe.tracking.provenance import commit_of, provenance

IDENTITY = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *IDENTITY, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    place = tmp_path / "repository"
    (place / "within").mkdir(parents=True)
    git(place, "init", "-q", "-b", "a/main")
    assert commit_of(place) is None  # nothing is committed
    git(place, "commit", "-q", "--allow-empty", "-m", "x")
    return place


def test_the_commit_is_git_s(repository: Path) -> None:
    first = git(repository, "rev-parse", "HEAD")
    assert commit_of(repository) == commit_of(repository / "within") == first
    git(repository, "pack-refs", "--all")
    assert not (repository / ".git/refs/heads/a/main").exists() and commit_of(repository) == first
    git(repository, "worktree", "add", "-q", "-b", "b", "../other")
    other = repository.parent / "other"
    git(other, "commit", "-q", "--allow-empty", "-m", "y")
    assert commit_of(other) == git(other, "rev-parse", "HEAD") != first
    git(repository, "checkout", "-q", "--detach", "b")
    assert commit_of(repository) == git(repository, "rev-parse", "HEAD")


def test_nothing_else_is_read_or_waited_for(repository: Path) -> None:
    (repository / "secret").write_text("5" * 40)
    (repository / ".git/refs/x").mkdir()
    (repository / ".git/HEAD").write_text("ref: refs/x/../../../secret")
    assert commit_of(repository) is None
    (repository / ".git/HEAD").unlink()
    os.mkfifo(repository / ".git/HEAD")
    assert commit_of(repository) is None


@pytest.mark.parametrize("head", ["", "ref: refs/../../../etc/passwd", "ref: /etc/passwd", "nonsense", "a" * 39])
def test_what_git_does_not_write_is_no_commit(repository: Path, head: str) -> None:
    (repository / ".git/HEAD").write_text(head)
    assert commit_of(repository) is None


def test_what_is_not_known_is_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nobody() -> str:
        raise KeyError("no such user")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(made.getpass, "getuser", nobody)
    monkeypatch.setattr(made, "PACKAGES", ("torch", "no-such-package"))
    found = provenance.__wrapped__()
    assert set(found) == {"lifelong.python", "lifelong.machine", "lifelong.version.torch"}
    assert " cores" in found["lifelong.machine"]
    tmp_path.rmdir()
    assert set(provenance.__wrapped__()) == set(found)
