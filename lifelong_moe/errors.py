"""Exceptions that a caller can act on, each with the exit code that the command line returns.

Every message is one line: the full config path or ``file:line``, what was required, what came, and the remedy if one
is known. Any other exception that escapes, unless :func:`as_ours` knows it, is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
import re
import unicodedata

from lifelong_moe.redaction import MASK, redact, without_credentials

_MAX_CHARS = 1000
_SUSPECT = re.compile(r"[^ -~]")
_STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of characters that are obeyed, not shown: controls (C0, C1, DEL), formats (bidirectional
overrides, zero widths, tags), lone surrogates, separators of lines and paragraphs."""
# Persian, Indic scripts and emoji cannot be written without the joiners.
_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_IN_WORDS = ("No space left on device", "Disk quota exceeded", "Not enough disk space", "database or disk is full")
"""Messages of libraries that pass no error number on."""
# What the user can free (exit code 8), apart from what must be mended (2, below).
_SPENT = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN)
_NO_MEMORY_IN_WORDS = ("can't allocate memory", "out of memory", "Cannot allocate memory")
# ENOENT is absent on purpose: commands look for a user's files first, so a file that is missing later is a bug.
_UNUSABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),  # not ours to write
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG),  # of another kind
    *(errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV),  # a file system that lacks what we need
    *(errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EBUSY),  # broken, or gone
}


class LifelongError(Exception):
    """Base of all errors that a user can fix; never raised itself."""

    exit_code = 1

    def __str__(self) -> str:
        """The message on one line of bounded length, whatever names and values from a user's files it quotes."""
        return one_line(super().__str__())


class AccessError(LifelongError):
    """A file or directory is unusable: wrong permissions, wrong kind, or a faulty or limited file system."""

    exit_code = 2


class ConfigError(LifelongError):
    """The configuration, or a combination of its keys, is not usable."""

    # As of a command line that cannot be parsed: either is the user's to correct.
    exit_code = 2


class DataError(LifelongError):
    """Documents are missing, malformed, duplicated or too few."""

    exit_code = 2

    def __init__(self, message: str, *, is_missing: bool = False) -> None:
        super().__init__(message)
        self.is_missing = is_missing
        """Whether there is nothing at all where the documents should be."""


class CheckpointError(LifelongError):
    """A named weight file or run does not fit the request, or has a format that is never loaded."""

    exit_code = 2


class StalePlanError(LifelongError):
    """A plan was made for another champion, other data or other settings, or has expired."""

    exit_code = 5


class DivergedError(LifelongError):
    """Training produced non-finite gradients several times in a row; none was applied, and nothing was committed."""

    exit_code = 6


class CorruptError(LifelongError):
    """A committed file no longer matches its recorded size or SHA-256."""

    exit_code = 7


class ResourceError(LifelongError):
    """There is not enough disk space or memory."""

    exit_code = 8


class TryAgainError(LifelongError):
    """Nothing is wrong, but try later: another process holds the lock, or we were preempted after a checkpoint."""

    # EX_TEMPFAIL of sysexits.h, so that a scheduler can tell what to repeat.
    exit_code = 75


class LockedError(TryAgainError):
    """Another process works on the same thing."""


def visible(text: str, keep: str = "\n\t") -> str:
    """Write characters that a terminal or a reader's eye would obey as escapes, such as ``\\x1b`` and ``\\u202e``.

    Args:
        text: Any text, whoever wrote it.
        keep: Control characters that stay as they are.
    """
    if text.isprintable():
        return text
    return _SUSPECT.sub(lambda found: _shown(found[0], keep), text)


def _shown(char: str, keep: str) -> str:
    is_harmless = char in keep or char in _JOINERS or unicodedata.category(char) not in _STEERING
    return char if is_harmless else ascii(char)[1:-1]


def one_line(text: str) -> str:
    """Shorten and escape a text such that it can be printed and encoded, whatever names and values it holds.

    Secrets and credentials are left out.
    """
    text = without_credentials(redact(text), mask=MASK)
    # A message begins with a key or path and ends with the remedy.
    return visible(both_ends(text, _MAX_CHARS), keep="")


def both_ends(text: str, most: int) -> str:
    """A text of at most so many characters: a long one without its middle, since long names differ in their ends."""
    if len(text) <= most:
        return text
    end = (most - 1) // 2
    return f"{text[: most - 1 - end]}…{text[len(text) - end :]}"


def disk_is_full(error: BaseException) -> bool:
    """Whether the disk or a quota is full, which some libraries report in words only."""
    number = error.errno if isinstance(error, OSError) else None
    return number in _FULL or any(words in str(error) for words in _FULL_IN_WORDS)


def memory_is_full(error: BaseException) -> bool:
    """Whether memory ran out, of the CPU (where PyTorch raises a plain RuntimeError) or of a device."""
    in_words = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY_IN_WORDS)
    return isinstance(error, MemoryError) or in_words


def as_ours(error: BaseException) -> LifelongError | None:
    """Translate what a user can fix into an error of ours; None for a bug."""
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
