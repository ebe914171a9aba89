"""Files that somebody else may have made: what is opened, and what is refused without waiting."""

import errno
import os

import pytest

from lifelong_moe.storage.opening import open_regular, read_bounded


def test_a_regular_file_is_read_and_bounded(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"12345")

    assert read_bounded(path, 5, follow=False) == b"12345"
    with pytest.raises(OSError, match="longer than"):
        read_bounded(path, 4, follow=False)


def test_a_link_is_followed_only_where_it_is_wanted(tmp_path):
    (tmp_path / "text").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("text")

    assert read_bounded(tmp_path / "link", 5, follow=True) == b"12345"
    with pytest.raises(OSError, match="symbolic link") as caught:
        open_regular(tmp_path / "link", follow=False)
    assert caught.value.errno == errno.ELOOP


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")

    for path, kind in ((tmp_path / "fifo", "a FIFO"), (tmp_path, "a directory"), ("/dev/zero", "a device")):
        with pytest.raises(OSError, match=f"{kind}, not a regular file"):
            open_regular(path, follow=True)
