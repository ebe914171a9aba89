"""What of errors that are not ours a person can mend, and what its line says."""

from __future__ import annotations

import errno
import os
import sys
import unicodedata

import pytest
import torch

from lifelong_moe.errors import AccessError, DataError, ResourceError, as_ours, both_ends, one_line, visible
from pipelines.cli import exit_code


def failing(error: BaseException) -> int:
    def command() -> None:
        raise error

    return exit_code(command)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, 8), (errno.EDQUOT, 8), (errno.ENOMEM, 8), (errno.EMFILE, 8), (errno.ENFILE, 8),
        (errno.EAGAIN, 8),
        (errno.EACCES, 2), (errno.EPERM, 2), (errno.EROFS, 2), (errno.ELOOP, 2), (errno.ENOLCK, 2),
        (errno.ENAMETOOLONG, 2), (errno.EIO, 2), (errno.ESTALE, 2), (errno.EEXIST, 2), (errno.ENOTDIR, 2),
        (errno.EISDIR, 2), (errno.EOPNOTSUPP, 2),
    ],
)  # fmt: skip
def test_the_state_of_a_disk_is_one_line(number: int, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"mlruns/caf\xe9")
    assert failing(OSError(number, os.strerror(number), name)) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith({8: "ResourceError: mlruns/caf", 2: "AccessError: mlruns/caf"}[code])
    line.encode("utf-8")


@pytest.mark.parametrize("error", [OSError(errno.EBADF, "Bad file descriptor"), FileNotFoundError(2, "No such", "x")])
def test_a_bug_keeps_its_traceback(error: OSError) -> None:
    with pytest.raises(OSError, match=r"Bad|No such"):
        failing(error)


@pytest.mark.parametrize(
    "error",
    [
        OSError("No space left on device"),  # no number
        RuntimeError("Caught OSError in DataLoader worker process 0.\nOSError: [Errno 28] No space left on device"),
        OSError("Not enough disk space. Needed: 1 GiB (download: Unknown size)"),
    ],
)
def test_a_full_disk_in_words(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(error) == 8
    assert capsys.readouterr().err == "ResourceError: the disk: no space left; what was committed is intact.\n"


def test_memory_that_the_cpu_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    """PyTorch's own error for a pebibyte, and as it comes from a training process."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.int8)
    for error in (caught.value, RuntimeError(f"in a training process: {caught.value}"), MemoryError()):
        assert failing(error) == 8
        assert capsys.readouterr().err.startswith("ResourceError: out of memory; what was committed is intact.")


def test_ours_stay_as_they_are() -> None:
    error = DataError("x:1: broken")
    assert as_ours(error) is error
    assert as_ours(ValueError("x")) is None and as_ours(KeyboardInterrupt()) is None
    assert isinstance(as_ours(PermissionError(13, "Permission denied", "x")), AccessError)
    assert isinstance(as_ours(MemoryError()), ResourceError)


def test_what_steers_a_terminal_is_shown() -> None:
    assert (
        visible("a\nb\tc\rd\x00\x7f\x9b\u202e\u2028\U000e0041") == "a\nb\tc\\rd\\x00\\x7f\\x9b\\u202e\\u2028\\U000e0041"
    )
    assert visible("a\nb\tc", keep="\t") == "a\\nb\tc"
    written = "naïve 10\N{NO-BREAK SPACE}km می\N{ZERO WIDTH NON-JOINER}خواهم 👩\N{ZERO WIDTH JOINER}🔬 שלום"
    assert visible(written) == written


@pytest.mark.parametrize("category", ["Cc", "Cf", "Cs", "Zl", "Zp"])
def test_no_steering_character_of_unicode_is_left(category: str) -> None:
    found = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) == category]
    left = {char for char in found if visible(char) == char}
    assert found and left <= {"\n", "\t", "\N{ZERO WIDTH NON-JOINER}", "\N{ZERO WIDTH JOINER}"}


def test_one_line_can_be_encoded() -> None:
    assert one_line("a\nb\udcff\x1b") == "a\\nb\\udcff\\x1b"
    assert len(one_line("x" * 5000)) < 1100


def test_a_long_name_keeps_both_ends() -> None:
    assert both_ends("wikipedia_2024_english_2", 24) == "wikipedia_2024_english_2"
    assert both_ends("wikipedia_2024_english_2", 11) == "wikip…ish_2"
    assert both_ends("wikipedia_2024_english_2", 10) == "wikip…sh_2"
    assert both_ends("abc", 1) == "…"
