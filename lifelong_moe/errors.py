"""Exceptions that a caller can act on, each with the exit code that the command line returns.

Every message is one line: the full config path or ``file:line``, what was required, what came, and the remedy
if one is known. Anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

_MAX_CHARS = 1000


class LifelongError(Exception):
    """Base of all errors that a person can mend; never raised itself."""

    exit_code = 1

    def __str__(self) -> str:
        """The message on one line of bounded length, whatever the names and values from a person's files hold."""
        text = super().__str__()
        if len(text) > _MAX_CHARS:
            text = f"{text[: _MAX_CHARS // 2]} … {text[-_MAX_CHARS // 2 :]}"
        return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class ConfigError(LifelongError):
    """The configuration, or a combination of its keys, is not usable."""

    exit_code = 2


class DataError(LifelongError):
    """Documents are missing, malformed, duplicated or too few."""

    exit_code = 2


class CheckpointError(LifelongError):
    """A named weight file or run does not fit what was asked for, or is of a format that is never loaded."""

    exit_code = 2


class StalePlanError(LifelongError):
    """A plan was made for another champion, other data or other settings, or has expired."""

    exit_code = 5


class DivergedError(LifelongError):
    """Training produced non-finite gradients several times in a row; nothing was stepped on or committed."""

    exit_code = 6


class CorruptError(LifelongError):
    """A committed file no longer matches its recorded size or SHA-256."""

    exit_code = 7


class ResourceError(LifelongError):
    """Disk or memory does not suffice."""

    exit_code = 8


class TryAgainError(LifelongError):
    """Nothing is wrong, but not now: another process holds the lock, or we were preempted after a checkpoint."""

    exit_code = 75


class LockedError(TryAgainError):
    """Another process is at work on the same thing."""
