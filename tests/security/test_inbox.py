"""An inbox is written by other systems: nothing outside it is read, and what is learned is what was hashed."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.arrivals import inbox as module
from lifelong_moe.data.arrivals.inbox import Inbox, read_inbox
from lifelong_moe.data.formats import limits
from lifelong_moe.data.text.files import read_documents
from lifelong_moe.errors import DataError

SOURCE = SourceConfig(files="inbox")
SECRET = b'{"text": "secret"}\n'
GOOD = b'{"text": "good"}\n'


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    (tmp_path / "secret.jsonl").write_bytes(SECRET)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.jsonl").write_bytes(SECRET)
    (tmp_path / "inbox").mkdir()
    return tmp_path / "inbox"


def listing(inbox: Path, **files: bytes) -> None:
    entries = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    (inbox / "manifest.json").write_text(json.dumps({"files": entries}))


def texts(inbox: Path) -> list[str]:
    found = read_inbox(inbox, SOURCE)
    return [] if found is None else [document.text for document in found.documents]


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("target", ["../secret.jsonl", "b.jsonl", "a.jsonl", "/dev/zero", "nowhere", "../outside"])
def test_no_link_is_followed_wherever_it_leads(inbox: Path, target: str, listed: bool) -> None:
    (inbox / "b.jsonl").write_bytes(GOOD)
    (inbox / "a.jsonl").symlink_to(target)
    if listed:
        listing(inbox, **{"a.jsonl": SECRET})
    with pytest.raises(DataError, match=r"a\.jsonl: is a symbolic link, which is not followed here\.$"):
        read_inbox(inbox, SOURCE)


@pytest.mark.parametrize("name", ["sub/a.jsonl", "sub/deep/a.jsonl", "./sub//a.jsonl"])
@pytest.mark.parametrize("target", ["../outside", "/", "sub"])
def test_no_folder_on_the_way_is_a_link(inbox: Path, name: str, target: str) -> None:
    (inbox / "sub").symlink_to(target)
    listing(inbox, **{name: SECRET})
    with pytest.raises(DataError, match="is a symbolic link, which is not followed here"):
        read_inbox(inbox, SOURCE)


def test_a_manifest_that_is_a_link(inbox: Path) -> None:
    (inbox / "a.jsonl").write_bytes(GOOD)
    for target in ("../manifest.json", "manifest.json", "/dev/zero"):
        (inbox / "manifest.json").unlink(missing_ok=True)
        (inbox / "manifest.json").symlink_to(target)
        with pytest.raises(DataError, match=r"manifest\.json: is a symbolic link"):
            read_inbox(inbox, SOURCE)


def test_an_inbox_that_is_a_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "inbox").symlink_to("inbox")
    with pytest.raises(DataError, match=r"inbox: cannot be read: Too many levels of symbolic links\.$"):
        read_inbox(tmp_path / "inbox", SOURCE)


def test_the_inbox_itself_may_be_a_link_as_of_a_mounted_volume(inbox: Path, tmp_path: Path) -> None:
    """As Kubernetes mounts a ConfigMap: ``..data`` leads to a dated folder, and each file's link through ``..data``."""
    (inbox / "..2026_11_29").mkdir()
    (inbox / "..2026_11_29" / "a.jsonl").write_bytes(GOOD)
    (inbox / "..data").symlink_to("..2026_11_29")
    (inbox / "a.jsonl").symlink_to("..data/a.jsonl")
    assert texts(inbox / "..data") == ["good"]
    with pytest.raises(DataError, match="is a symbolic link"):
        read_inbox(inbox, SOURCE)


@pytest.mark.parametrize("name", ["./a.jsonl", "sub//a.jsonl", "sub/./a.jsonl"])
def test_no_way_of_writing_a_name_escapes_its_hash(inbox: Path, name: str) -> None:
    (inbox / "sub").mkdir()
    for path in (inbox / "a.jsonl", inbox / "sub" / "a.jsonl"):
        path.write_bytes(GOOD)
    listing(inbox, **{name: GOOD})
    assert texts(inbox) == ["good"]
    listing(inbox, **{name: SECRET})
    with pytest.raises(DataError, match=r"a\.jsonl: bytes is 17, but the manifest says 19"):
        read_inbox(inbox, SOURCE)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
def test_a_file_that_is_exchanged_after_hashing_is_not_read(
    inbox: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """By a link, by another file, and by writing into the file itself, at the moment between hash and parser."""
    import pyarrow
    from pyarrow import parquet

    path = inbox / name
    for exchange in ("link", "file", "content"):
        path.unlink(missing_ok=True)
        path.write_bytes(b"good" if name == "a.txt" else GOOD)
        if name == "a.parquet":
            parquet.write_table(pyarrow.table({"text": ["good"]}), path)

        def swap(found: Path, *rest: object, exchange: str = exchange) -> None:
            if exchange != "content":
                path.unlink()
            if exchange == "link":
                path.symlink_to("../secret.jsonl")
            else:
                path.write_bytes(SECRET)

        monkeypatch.setattr(module, "_require_as_listed", swap)
        found = read_inbox(inbox, SOURCE)
        assert isinstance(found, Inbox) and [document.text for document in found.documents] == ["good"]


def test_a_folder_that_is_exchanged_for_a_link_while_it_is_read(inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (inbox / "sub").mkdir()
    (inbox / "sub" / "a.jsonl").write_bytes(GOOD)
    listing(inbox, **{"sub/a.jsonl": SECRET})
    reader_of = module.reader_of

    def swap(path: Path) -> object:
        (inbox / "sub").rename(inbox / "was")
        (inbox / "sub").symlink_to("../outside")
        return reader_of(path)

    monkeypatch.setattr(module, "reader_of", swap)
    with pytest.raises(DataError, match="is a symbolic link"):
        read_inbox(inbox, SOURCE)


def test_an_inbox_that_is_exchanged_while_it_is_read(inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (inbox / "a.jsonl").write_bytes(GOOD)
    reader_of = module.reader_of

    def swap(path: Path) -> object:
        inbox.rename(inbox.with_name("was"))
        inbox.symlink_to("outside")
        return reader_of(path)

    monkeypatch.setattr(module, "reader_of", swap)
    assert texts(inbox) == ["good"]


@pytest.mark.parametrize("kind", ["fifo", "device", "socket"])
def test_what_is_no_file_is_neither_waited_for_nor_read(inbox: Path, kind: str) -> None:
    path = inbox / "a.jsonl"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))
    else:
        try:
            os.mknod(path, 0o20600, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("devices are made by root alone")
    with pytest.raises(DataError, match=r"a\.jsonl: "):
        read_inbox(inbox, SOURCE)


def bomb(path: Path, unpacked: int) -> None:
    path.write_bytes(gzip.compress(b'{"text": "' + b"a" * unpacked + b'"}\n'))


def test_two_hundred_small_files_are_one_bomb(inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is within what one small file may unpack to; together they would be 12 GB. Here scaled down by 64."""
    monkeypatch.setattr(limits, "ALLOWANCE_BYTES", 1 << 20)
    for number in range(200):
        bomb(inbox / f"{number:03d}.jsonl.gz", 1_000_000)
    started = time.process_time()
    with pytest.raises(DataError, match=r"001\.jsonl\.gz: unpacks to more than 200 times its size.*other files"):
        read_inbox(inbox, SOURCE)
    with pytest.raises(DataError, match=r"001\.jsonl\.gz: unpacks to more than 200 times its size"):
        read_documents(str(inbox / "*.gz"), SOURCE)
    assert time.process_time() - started < 2
    for path in sorted(inbox.iterdir())[1:]:
        path.unlink()
    assert len(texts(inbox)) == 1


def test_an_inbox_holds_so_much_and_no_more(inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (inbox / f"{name}.jsonl").write_bytes(GOOD)
    each = len(GOOD) + limits.DOCUMENT_BYTES
    monkeypatch.setattr(module, "MAX_INBOX_BYTES", 3 * each)
    assert len(texts(inbox)) == 3
    monkeypatch.setattr(module, "MAX_INBOX_BYTES", 3 * each - 1)
    with pytest.raises(DataError, match=r"c\.jsonl: the inbox may hold .* together"):
        read_inbox(inbox, SOURCE)
    monkeypatch.setattr(module, "MAX_INBOX_FILES", 2)
    with pytest.raises(DataError, match="the inbox may hold 2 files; there are more"):
        read_inbox(inbox, SOURCE)


def test_a_file_of_any_size_takes_no_memory(inbox: Path) -> None:
    with (inbox / "a.jsonl").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(DataError, match=r"a\.jsonl: over 4096 MiB"):
        read_inbox(inbox, SOURCE)


@pytest.mark.parametrize("name", ["\\ud800.jsonl", "a\\u0000.jsonl", "", ".", "..", "/etc/passwd", "../secret.jsonl"])
def test_a_name_that_no_file_has(inbox: Path, name: str) -> None:
    (inbox / "manifest.json").write_text(f'{{"files": {{"{name}": {{"bytes": 1, "sha256": "{"0" * 64}"}}}}}}')
    with pytest.raises(DataError, match="must be a path below the inbox"):
        read_inbox(inbox, SOURCE)
    with pytest.raises(DataError, match="null byte"):
        read_inbox(Path("in\0box"), SOURCE)
