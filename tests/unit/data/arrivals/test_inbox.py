"""The inbox: what is read, what is passed over, and what is refused before it is opened."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.arrivals import inbox as module
from lifelong_moe.data.arrivals.inbox import MANIFEST, Inbox, read_inbox
from lifelong_moe.errors import DataError

SOURCE = SourceConfig(files="inbox")


def jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def entry(data: bytes, **changes: Any) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} | changes


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    path = tmp_path / "inbox"
    path.mkdir()
    return path


def manifest(inbox: Path, files: Any, **keys: Any) -> None:
    (inbox / MANIFEST).write_text(json.dumps({"files": files, **keys}))


def read(inbox: Path) -> Inbox:
    found = read_inbox(inbox, SOURCE)
    assert found is not None
    return found


def test_an_absent_or_empty_inbox_holds_nothing(inbox: Path) -> None:
    assert read_inbox(inbox / "nowhere", SOURCE) is None
    assert read_inbox(inbox, SOURCE) is None
    (inbox / ".hidden.jsonl").write_bytes(b"not even JSON")
    for name in ("a.jsonl.tmp", "b.jsonl.part"):
        (inbox / name).write_bytes(b"half writ")
    (inbox / "folder").mkdir()
    (inbox / "empty.jsonl").write_bytes(b"")
    assert read_inbox(inbox, SOURCE) is None


def test_all_kinds_of_files_in_order_of_name(inbox: Path) -> None:
    (inbox / "b.jsonl").write_bytes(jsonl("second", "third"))
    (inbox / "a.txt.gz").write_bytes(gzip.compress(b"first"))
    found = read(inbox)
    assert [document.text for document in found.documents] == ["first", "second", "third"]
    assert [file["name"] for file in found.files] == ["a.txt.gz", "b.jsonl"] and found.distribution is None
    assert found.files[1] == {"name": "b.jsonl"} | entry(jsonl("second", "third"))


def test_a_name_that_is_not_utf8_is_read_and_told_in_ascii(inbox: Path) -> None:
    (inbox / os.fsdecode(b"caf\xe9.jsonl")).write_bytes(jsonl("one"))
    found = read(inbox)
    assert found.documents[0].text == "one" and found.files[0]["name"] == "caf\\udce9.jsonl"
    with pytest.raises(DataError, match=r"caf\\udce9\.docx"):
        (inbox / os.fsdecode(b"caf\xe9.docx")).touch()
        read(inbox)


def test_a_manifest_names_exactly_what_is_read(inbox: Path) -> None:
    (inbox / "sub").mkdir()
    for name, text in (("listed.jsonl", "one"), ("sub/more.jsonl", "two"), ("unlisted.jsonl", "three")):
        (inbox / name).write_bytes(jsonl(text))
    files = {"listed.jsonl": entry(jsonl("one")), "sub/more.jsonl": entry(jsonl("two"))}
    manifest(inbox, files, distribution="news")
    found = read(inbox)
    assert [document.text for document in found.documents] == ["one", "two"] and found.distribution == "news"


@pytest.mark.parametrize("key", ["bytes", "sha256"])
def test_a_file_that_is_not_what_the_manifest_says(inbox: Path, key: str) -> None:
    (inbox / "a.jsonl").write_bytes(jsonl("one"))
    manifest(inbox, {"a.jsonl": entry(jsonl("one"), **{key: 3 if key == "bytes" else "0" * 64})})
    with pytest.raises(DataError, match=rf"a\.jsonl: {key} is .*, but the manifest says"):
        read_inbox(inbox, SOURCE)


@pytest.mark.parametrize("name", ["../secret.jsonl", "/etc/passwd", "sub/../../secret.jsonl", "", "a\0.jsonl"])
def test_paths_out_of_the_inbox_are_refused(inbox: Path, name: str) -> None:
    (inbox.parent / "secret.jsonl").write_bytes(jsonl("secret"))
    manifest(inbox, {name: entry(jsonl("secret"))})
    with pytest.raises(DataError, match="must be a path below the inbox"):
        read_inbox(inbox, SOURCE)


@pytest.mark.parametrize("listed", [True, False])
def test_a_link_out_of_the_inbox_is_refused(inbox: Path, listed: bool) -> None:
    (inbox.parent / "secret.jsonl").write_bytes(jsonl("secret"))
    (inbox / "a.jsonl").symlink_to(inbox.parent / "secret.jsonl")
    if listed:
        manifest(inbox, {"a.jsonl": entry(jsonl("secret"))})
    with pytest.raises(DataError, match="is a symbolic link, which is not followed here"):
        read_inbox(inbox, SOURCE)


@pytest.mark.parametrize("listed", [True, False])
def test_a_fifo_is_refused_and_not_waited_for(inbox: Path, listed: bool) -> None:
    os.mkfifo(inbox / "a.jsonl")
    if listed:
        manifest(inbox, {"a.jsonl": entry(b"")})
    with pytest.raises(DataError, match="regular file"):
        read_inbox(inbox, SOURCE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"manifest\.json:1: malformed JSON"),
        ('{"files": {}}', '"files" must be an object with an entry'),
        ('{"files": ["a.jsonl"]}', '"files" must be an object with an entry'),
        ('{"files": {"a.jsonl": {}}}', '"a.jsonl" needs bytes'),
        ('{"files": {"a.jsonl": {"bytes": 1, "sha256": "abc"}}}', '"a.jsonl" needs bytes'),
        ('{"files": {"a.jsonl": {"bytes": 1, "sha256": "abc"}}, "fils": 1}', 'key "fils" is unknown'),
        ('{"files": {"a": 1}, "files": {"b": 1}}', "occurs twice"),
    ],
)
def test_a_malformed_manifest(inbox: Path, content: str, message: str) -> None:
    (inbox / MANIFEST).write_text(content)
    with pytest.raises(DataError, match=message):
        read_inbox(inbox, SOURCE)


@pytest.mark.parametrize("name", ["../up", "a/b", "", 3, "x" * 41])
def test_a_distribution_s_name_is_a_plain_one(inbox: Path, name: Any) -> None:
    (inbox / "a.jsonl").write_bytes(jsonl("one"))
    manifest(inbox, {"a.jsonl": entry(jsonl("one"))}, distribution=name)
    with pytest.raises(DataError, match='"distribution" may hold'):
        read_inbox(inbox, SOURCE)


def test_what_is_not_read_at_all(inbox: Path) -> None:
    (inbox / "weights.pt").write_bytes(b"x")
    with pytest.raises(DataError, match=r"weights\.pt"):
        read_inbox(inbox, SOURCE)
    with pytest.raises(DataError, match="must be a directory"):
        read_inbox(inbox / "weights.pt", SOURCE)


def test_a_manifest_of_any_size_is_not_read(inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (inbox / "a.jsonl").write_bytes(jsonl("a"))
    manifest(inbox, {"a.jsonl": entry(jsonl("a"))})
    size = (inbox / MANIFEST).stat().st_size
    monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", size)
    assert len(read(inbox).documents) == 1
    monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", size - 1)
    with pytest.raises(DataError, match="over 0 MiB"):
        read(inbox)
