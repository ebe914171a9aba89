"""Each thing wrong with a user's file is one ``file:line: reason``, quickly."""

import gzip
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lifelong_moe.data.formats import limits
from lifelong_moe.data.formats.bad_lines import BadLines
from lifelong_moe.data.formats.streams import open_file
from lifelong_moe.data.text import jsonl
from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.text.jsonl import read_jsonl
from lifelong_moe.errors import DataError

GOOD = b'{"text": "good"}\n'


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    started = time.process_time()
    yield
    assert time.process_time() - started < 2


def _read(path: Path) -> list[Document]:
    with open_file(path) as file:
        return list(read_jsonl(file, "text", "source"))


def _texts(path: Path) -> list[str]:
    return [document.text for document in _read(path)]


def _write(tmp_path: Path, data: bytes, name: str = "a.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(gzip.compress(data, 6) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_reads_lines(tmp_path: Path, name: str) -> None:
    lines = '{"text": "é\\n", "source": "u", "more": [1, {"x": 2.5}]}\r\n{"text": "line\u2028separator"}'
    first, second = _read(_write(tmp_path, lines.encode(), name))
    assert (first.text, first.source, first.origin) == ("é\n", "u", f"{tmp_path / name}:1")
    assert second.text == "line\u2028separator"
    assert second.source == f"sha256:{second.hash}"


@pytest.mark.parametrize("data", [GOOD, GOOD.strip(), GOOD + b"\n", b"\xef\xbb\xbf" + GOOD])
def test_harmless_variations(tmp_path: Path, data: bytes) -> None:
    assert _texts(_write(tmp_path, data)) == ["good"]


BAD_LINES = {
    "malformed": (b'{"text": "a" "b"}', "malformed JSON at column 14: Expecting ',' delimiter"),
    "cut off": (b'{"text": "a', "malformed JSON at column 10: Unterminated string starting"),
    "raw newline": (b'{"text": "a\x01"}', "malformed JSON at column 12: Invalid control character"),
    "bad utf-8": (b'{"text": "\xff"}', r"invalid UTF-8 at byte 10 \(0xff\)"),
    "deep": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "long integer": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "integer of 5000 digits"),
    "NaN": (b'{"text": "a", "n": NaN}', "NaN is not JSON"),
    "Infinity": (b'{"text": "a", "n": -Infinity}', "-Infinity is not JSON"),
    "overflow": (b'{"text": "a", "n": 1e999}', "1e999 is not finite"),
    "surrogate": (b'{"text": "a\\ud800b"}', r"\"text\" holds a lone surrogate \\ud800"),
    "surrogate source": (b'{"text": "a", "source": "\\udfff"}', r"\"source\" holds a lone surrogate"),
    "duplicate": (b'{"text": "a", "text": "b"}', "key 'text' occurs twice"),
    "nested duplicate": (b'{"text": "a", "m": {"k": 1, "k": 1}}', "key 'k' occurs twice"),
    "NUL": (b'{"text": "a\\u0000b"}', "NUL character at position 1"),
    "missing": (b'{"body": "a", "id": 1}', 'no field "text"; fields: body, id'),
    "null": (b'{"text": null}', '"text" must be a string; got null'),
    "number": (b'{"text": 5}', '"text" must be a string; got a number'),
    "list": (b'{"text": ["a"]}', '"text" must be a string; got a list'),
    "blank": (b'{"text": " \\n\\t"}', '"text" is blank'),
    "source number": (b'{"text": "a", "source": 3}', '"source" must be a string; got a number'),
    "source blank": (b'{"text": "a", "source": ""}', '"source" is blank'),
    "not an object": (b'"text"', "must be one JSON object; got a str"),
    "empty": (b"  ", "line is empty"),
    "over 16 MiB": (b'{"text": "' + b"a" * (16 << 20) + b'"}', "longer than 16 MiB"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_line(tmp_path: Path, kind: str) -> None:
    line, reason = BAD_LINES[kind]
    path = _write(tmp_path, GOOD + line + b"\n" + GOOD)
    with pytest.raises(DataError, match=f":2: .*{reason}") as caught:
        _texts(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_long_line_is_not_loaded_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.truncate(8 << 30)  # sparse: 8 GiB of NULs on no disk
        stream.seek(0)
        stream.write(GOOD + b'{"')
    with pytest.raises(DataError, match=":2: line is longer than 16 MiB"):
        _texts(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(DataError, match=":1: this is UTF-16"):
        _texts(_write(tmp_path, GOOD.decode().encode(encoding)))


def test_truncated_and_damaged_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(1000)))
    cases = {"truncated": whole[:-20], "not a valid gzip": b"plain text", "damaged": whole[:40] + b"\xff" * 60}
    for kind, data in cases.items():
        path = tmp_path / f"{len(kind)}.jsonl.gz"
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"truncated|not a valid gzip"):
            _texts(path)


@pytest.mark.parametrize("line", [GOOD, b'{"text": "' + b"a" * (1 << 20) + b'"}\n'])
def test_gzip_bomb(tmp_path: Path, line: bytes) -> None:
    data = line * ((72 << 20) // len(line))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(data, 5))
    assert path.stat().st_size * limits.MAX_RATIO < len(data)
    started = time.process_time()
    with pytest.raises(DataError, match="more than 200 times its size"):
        _texts(path)
    assert time.process_time() - started < 1.5


def test_total_unpacked_size_is_bounded(tmp_path: Path) -> None:
    path = _write(tmp_path, GOOD * 1000, "a.jsonl.gz")
    with (
        pytest.raises(DataError, match="the files of a distribution may hold 1000 B of documents together"),
        open_file(path, limits.Quota(1000)) as file,
    ):
        list(read_jsonl(file, "text", "source"))


def test_fifo_does_not_wait(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    os.mkfifo(path)
    with pytest.raises(DataError, match="is a FIFO, not a regular file"):
        _texts(path)


def test_directory_and_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a directory"):
        _texts(tmp_path)
    with pytest.raises(DataError, match="No such file"):
        _texts(tmp_path / "no.jsonl")


def test_many_ordinary_lines_are_quick(tmp_path: Path) -> None:
    path = _write(tmp_path, b"".join(json.dumps({"text": f"a {n}"}).encode() + b"\n" for n in range(20_000)))
    assert len(_texts(path)) == 20_000


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.sampled_from([b'{"text": "a"}', b'"', b"{", b"}", b":", b"\\", b"\n", b"\0", b"\xff", b"9", b"e9"])))
def test_whatever_the_bytes_only_a_data_error_escapes(tmp_path: Path, parts: list[bytes]) -> None:
    for name in ("a.jsonl", "a.jsonl.gz"):
        try:
            texts = _texts(_write(tmp_path, b"".join(parts), name))
        except DataError as error:
            assert "\n" not in str(error)
        else:
            assert all(text == "a" for text in texts)


def test_reading_goes_on_after_a_bad_line_however_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 64)
    path = tmp_path / "a.jsonl"
    rows = ['{"text": "first"}', '{"text": "' + "x" * 500 + '"}', "", '{"text": "second"}', "{"]
    path.write_text("\n".join(rows) + "\n\n")
    bad = BadLines(3)
    with open_file(path) as file:
        found = list(read_jsonl(replace(file, bad_lines=bad), "text", "source"))
    assert [(one.text, one.origin) for one in found] == [("first", f"{path}:1"), ("second", f"{path}:4")]
    assert [(one.line, one.text[:12]) for one in bad.found] == [(2, '{"text": "xx'), (3, ""), (5, "{")]
    assert bad.found[0].reason == "line is longer than 0 MiB; cut the document."
