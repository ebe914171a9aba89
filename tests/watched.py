"""A command in a forked child that is watched: it may not write, connect or start anything outside its directory."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typer.main import get_command

from pipelines.cli import app, exit_code
from pipelines.exit_codes import MEANINGS

COMMAND_LINE = get_command(app)
"""Made once: it takes as long as many a command."""

CPU_SECONDS, WAIT_SECONDS = 20, 120
"""Longest computing and waiting of a command on a tiny store: a cycle that is followed for ever, or a FIFO that is
opened, ends here."""
MEMORY = 4 << 30
"""Most bytes that a command may take beyond what the process has."""
CANARY = "canary-secret"
"""A secret of the user, in the environment variable ``CANARY``."""


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that move a terminal's cursor, change its colours or reverse its text; not tab and line feed."""


@dataclass(frozen=True)
class Scene:
    """A working directory with a store in it, and its surroundings, which no command may change."""

    work: Path
    outside: Path

    @property
    def store(self) -> Path:
        """The ``mlruns/`` directory."""
        return self.work / "mlruns"


@dataclass(frozen=True)
class Outcome:
    """What a command left."""

    code: int
    """Exit code; -1 if it did not end by itself, 99 after a traceback."""
    out: str
    err: str
    forbidden: list[str]
    """What it tried outside its working directory."""
    imported: list[str]
    """Modules that this process has not, by name."""


def surroundings(outside: Path) -> None:
    """Make the directory that no command may change: a start file of a shell, pictures, old folders, a module."""
    (outside / "folder" / "step-1").mkdir(parents=True)
    for name in ("file", ".bashrc", "folder/picture.png", "folder/head.json", "folder/step-1/state.json"):
        (outside / name).write_text("{}\n")
    (outside / "evil_router.py").write_text(f"open({str(outside / 'imported')!r}, 'w').close()\n")
    for path in (outside / "folder", outside / "folder/step-1"):
        os.utime(path, (0, 0))


def fingerprint(outside: Path) -> str:
    """A hash of names, kinds, modes, times and contents."""
    found = hashlib.sha256()
    for path in sorted(outside.rglob("*")):
        state = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found.update(
            f"{path.relative_to(outside)} {state.st_mode} {state.st_mtime_ns} {len(content)} ".encode() + content
        )
    return found.hexdigest()


WRITTEN = ("out", "err", "forbidden", "imported")
"""Files that an attempt leaves for its parent."""


def attempt(arguments: list[str], directory: Path, outside: Path) -> Outcome:
    """Carry out a command in a directory, watched, in a forked child; its ``HOME`` is ``outside``."""
    log = _new_log(directory)
    pid = os.fork()
    if not pid:
        code = 99
        try:
            # Else the child's first collection would write to each of our objects, and so copy the memory they lie in.
            gc.freeze()
            code = _carry_out(arguments, directory, outside, log)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return _left_in(log, -1 if code in ENDED else code)


def attempt_here(arguments: list[str], directory: Path, outside: Path) -> Outcome:
    """The same in this process, a forked child, which the deadlines of :func:`attempt` end.

    What one command leaves in the process another one meets, so that a fault has to be repeated by :func:`attempt`.
    """
    log = _new_log(directory)
    return _left_in(log, _carry_out(arguments, directory, outside, log))


ENDED = (-signal.SIGALRM, -signal.SIGXCPU, -signal.SIGKILL)
"""How a process ends at a deadline."""


def _new_log(directory: Path) -> Path:
    log = directory.parent / f"log-{random.SystemRandom().randrange(1 << 40):x}"
    log.mkdir()
    return log


def _left_in(log: Path, code: int) -> Outcome:
    out, err, *lists = (log.joinpath(name).read_text(errors="replace") for name in WRITTEN)
    shutil.rmtree(log)
    return Outcome(code, out, err, *(text.splitlines() for text in lists))


def import_named(modules: Iterable[str]) -> None:
    """Import here what a command imported, so that no later one needs to: the longest part of most attempts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in modules:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def complaint(outcome: Outcome) -> str | None:
    """What is wrong with the way a command ended; None if nothing is.

    A command may succeed, where it does not need what was changed; otherwise it ends with one line and an exit code of
    :mod:`pipelines.exit_codes`. It never changes anything elsewhere, and prints neither control characters nor secrets.
    """
    if outcome.code == -1:
        return f"it did not end within {CPU_SECONDS} s of computing or {WAIT_SECONDS} s of waiting"
    if outcome.code not in MEANINGS or outcome.code in (1, 130) or "Traceback" in outcome.err:
        return f"exit code {outcome.code}: {outcome.err[-600:]}"
    if outcome.forbidden:
        return f"it reached outside: {outcome.forbidden[0]}"
    if CANARY in outcome.out + outcome.err:
        return "it printed a secret"
    if found := CONTROL.search(outcome.out + outcome.err):
        return f"it printed the control character {found[0]!r}"
    if outcome.code and not re.fullmatch(r"\w+: [^\n]+", (outcome.err.splitlines() or [""])[-1]):
        return f"exit code {outcome.code} without one clear line: {outcome.err[-600:]!r}"
    return None


def _carry_out(arguments: list[str], directory: Path, outside: Path, log: Path) -> int:
    """Carry out a command in this process, which keeps its directory, environment and limits; returns the exit code."""
    code, known = 99, set(sys.modules)
    out, err, forbidden, imported = (os.open(log / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND) for name in WRITTEN)
    try:
        os.chdir(directory)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = (
            os.fdopen(number, "w", encoding="utf-8", errors="replace", closefd=False) for number in (1, 2)
        )
        os.environ |= {"HOME": str(outside), "TMPDIR": str(directory), "CANARY": CANARY}
        tempfile.tempdir = None  # which knows the parent's
        sys.path.append(str(outside))
        sys.dont_write_bytecode = True
        sys.argv = ["lifelong-moe", *arguments]
        torch.set_num_threads(1)
        _set_deadlines()
        WATCH.begin(directory, forbidden)
        code = exit_code(COMMAND_LINE)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
            os.write(imported, "\n".join(sys.modules.keys() - known).encode())
        WATCH.end()
        sys.path.remove(str(outside))
        for number in (out, err, forbidden, imported):
            os.close(number)
    return code


def _set_deadlines() -> None:
    """Bound what a command may compute, wait and take, beyond what this process has."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(WAIT_SECONDS)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime) + CPU_SECONDS)
    _limit(resource.RLIMIT_AS, int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY)


def _limit(what: int, most: int) -> None:
    # The hard limit stays, as it could not be raised for the next command in this process.
    resource.setrlimit(what, (most, resource.getrlimit(what)[1]))


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.symlink", "os.link", "os.truncate")
STARTS = ("socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")


class _Watch:
    """Reports every change outside a directory, every connection and every process, while a command is carried out."""

    def __init__(self) -> None:
        self.is_added = False
        self.allowed: str | None = None
        self.report = -1

    def begin(self, directory: Path, report: int) -> None:
        """From now on, to this descriptor."""
        self.allowed, self.report = os.path.realpath(directory), report
        if not self.is_added:  # it cannot be removed
            sys.addaudithook(self._hear)
            self.is_added = True

    def end(self) -> None:
        """Until :meth:`begin`."""
        self.allowed = None

    def _is_outside(self, path: Any) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        real = os.path.realpath(os.fsdecode(path))
        # Semaphores lie in /dev/shm itself; the store that is attacked may lie in a folder there.
        if real == "/dev/null" or real.startswith("/proc/self/") or os.path.dirname(real) == "/dev/shm":
            return False
        return real != self.allowed and not real.startswith(f"{self.allowed}/")

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event == "open" and isinstance(args[2], int) and args[2] & WRITES and self._is_outside(args[0]):
            os.write(self.report, f"open for writing {args[0]!r}\n".encode())
        # With a folder's descriptor a path is relative to it, and that folder was opened before.
        elif event in CHANGES and args[-1] in (-1, None) and self._is_outside(args[0]):
            os.write(self.report, f"{event} {args[0]!r}\n".encode())
        elif event in STARTS:
            os.write(self.report, f"{event} {args[:2]!r}\n".encode())


WATCH = _Watch()
