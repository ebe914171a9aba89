"""Exceptions that a caller can act on, each with the exit code that the command line returns.

Every message is one line: the full config path or ``file:line``, what was required, what came, and the remedy
if one is known. Anything else that escapes, unless :func:`as_ours` knows it, is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import errno

_MAX_CHARS = 1000
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_IN_WORDS = ("No space left on device", "Disk quota exceeded", "Not enough disk space", "database or disk is full")
"""Not every library hands an error number on."""
_SPENT = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN)
_NO_MEMORY_IN_WORDS = ("can't allocate memory", "out of memory", "Cannot allocate memory")
_UNUSABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),  # not ours to write
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG),  # of another kind
    *(errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV),  # a file system that lacks what we need
    *(errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EBUSY),  # broken, or gone
}


class LifelongError(Exception):
    """Base of all errors that a person can mend; never raised itself."""

    exit_code = 1

    def __str__(self) -> str:
        """The message on one line of bounded length, whatever the names and values from a person's files hold."""
        return one_line(super().__str__())


class AccessError(LifelongError):
    """A file or directory cannot be used as it is: permissions, its kind, or a file system that is not well."""

    exit_code = 2


class ConfigError(LifelongError):
    """The configuration, or a combination of its keys, is not usable."""

    exit_code = 2


class DataError(LifelongError):
    """Documents are missing, malformed, duplicated or too few."""

    exit_code = 2

    def __init__(self, message: str, *, is_missing: bool = False) -> None:
        super().__init__(message)
        self.is_missing = is_missing
        """Whether nothing at all is where documents were looked for."""


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


def one_line(text: str) -> str:
    """A text of bounded length that can be printed and encoded, whatever names and values it holds."""
    if len(text) > _MAX_CHARS:
        text = f"{text[: _MAX_CHARS // 2]} … {text[-_MAX_CHARS // 2 :]}"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def disk_is_full(error: BaseException) -> bool:
    """Whether the disk or a quota is full, which some libraries say in words only."""
    number = error.errno if isinstance(error, OSError) else None
    return number in _FULL or any(words in str(error) for words in _FULL_IN_WORDS)


def memory_is_full(error: BaseException) -> bool:
    """Whether there was no memory left, of the CPU (for which PyTorch has a plain RuntimeError) or of a device."""
    in_words = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY_IN_WORDS)
    return isinstance(error, MemoryError) or in_words


def as_ours(error: BaseException) -> LifelongError | None:
    """What a person can mend, said as an error of ours; None for whatever is a bug."""
    if isinstance(error, LifelongError):
        return error
    number, name, reason = None, None, str(error)
    if isinstance(error, OSError):
        number, name, reason = error.errno, error.filename, error.strerror or reason
    place = f"{name}: " if name is not None else ""
    if disk_is_full(error):
        return ResourceError(f"{place or 'the disk: '}no space left; what was committed is intact.")
    if memory_is_full(error):
        return ResourceError("out of memory; what was committed is intact. Set the model's size or its context lower.")
    if number in _SPENT:
        return ResourceError(f"{place}{reason}; what was committed is intact.")
    return AccessError(f"{place}{reason}.") if number in _UNUSABLE else None
