"""Text as people have it: kinds, encodings, several globs, and what became of each file."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.formats.outcomes import Outcome, counted, sentence
from lifelong_moe.data.text import files as module
from lifelong_moe.data.text.documents import Corpus
from lifelong_moe.data.text.files import matching_files, read_documents, read_files, settled
from lifelong_moe.data.text.near_copies import without_near_copies
from lifelong_moe.data.text.sources import read_corpus
from lifelong_moe.errors import ConfigError, DataError

PAGE = "<html><head><title>T</title></head><body><p>A <b>short</b> page.</p><script>x</script></body></html>"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("my/sub").mkdir(parents=True)
    return tmp_path


def write(files: dict[str, bytes]) -> None:
    for name, data in files.items():
        Path("my", name).write_bytes(data)


def became(named: object, **keys: object) -> dict[str, str]:
    """By name, what became of the files of a distribution."""
    corpus = read_corpus("a", SourceConfig(files=named, **keys), Path("cache"))  # type: ignore[arg-type]
    return {Path(file.file).name: file.outcome.value for file in settled(corpus)}


def test_text_of_every_kind(folder: Path) -> None:
    write(
        {
            "a.md": b"# Title\n\ntext",
            "b.rst": b"Title\n=====",
            "c.html": PAGE.encode(),
            "d.py": b"def f(): ...\n",
            "e.HTM.gz": gzip.compress(PAGE.replace("A", "Another").encode()),
            "sub/f.cpp": b"int main() {}",
        }
    )
    assert [document.text for document in read_documents("my/**/*.*", SourceConfig(files="x"))] == [
        "# Title\n\ntext",
        "Title\n=====",
        "A short page.",
        "def f(): ...\n",
        "Another short page.",
        "int main() {}",
    ]


def test_several_globs_name_a_file_once_and_a_home_directory(folder: Path) -> None:
    write({"a.txt": b"one", "b.md": b"two"})
    Path("home").mkdir()
    Path("home/c.txt").write_text("three")
    assert [path.name for path in matching_files(["my/*.txt", "my/*", "~/*.txt"])] == ["c.txt", "a.txt", "b.md"]
    # A folder of that name is meant first.
    Path("~").mkdir()
    Path("~/d.txt").write_text("four")
    assert [document.text for document in read_documents("~/d.txt", SourceConfig(files="x"))] == ["four"]


@pytest.mark.parametrize("files", [3, [], [""], [1], {"a": 1}])
def test_what_files_may_be(files: object) -> None:
    with pytest.raises(ConfigError, match="must be a path or glob, or a list of them"):
        SourceConfig(files=files)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"files": "a", "encoding": "rot13"}, "encoding=rot13 is unknown; there are cp1250"),
        ({"files": "a", "encoding": "a\0"}, "is unknown"),
        ({"files": "a", "encoding": "punycode"}, "is unknown"),  # takes the square of a text's length
        ({"files": "a", "min_chars": -1}, "must not be negative"),
        ({"builtin": "python_code", "min_chars": 1}, "goes with files only"),
        ({"builtin": "python_code", "encoding": "cp1252"}, "goes with files only"),
        ({"files": ["a"] * 1001}, "names 1,001 paths"),
    ],
)
def test_keys_that_cannot_be(keys: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        SourceConfig(**keys)  # type: ignore[arg-type]


def test_what_became_of_each_file(folder: Path) -> None:
    write(
        {
            "a.txt": b"one text of its own",
            "b.txt": b"one text  of its own!",
            "c.md": b" \n",
            "d.md": b"short",
            "e.png": b"\x89PNG",
            "f.txt": "Größe und Maß".encode("cp1252"),
            "g.txt": "\ufeffcafé, and a little more".encode("utf-16-le"),
            "h.txt": b"text, but \0 binary as well",
            "i.html": b"<p><script>no text here</script>",
            "j.pkl": b"\x80\x04.",
            "k.txt": b"another text of its own",
        }
    )
    expected = {
        "a.txt": "used",
        "b.txt": "duplicate",
        "c.md": "empty",
        "d.md": "too short",
        "e.png": "of a kind that is not read",
        "f.txt": "neither UTF-8 nor UTF-16",
        "g.txt": "used",
        "h.txt": "binary",
        "i.html": "empty",
        "j.pkl": "of a kind that is not read",
        "k.txt": "used",
    }
    assert became("my/*", min_chars=6) == expected
    # Only what was not UTF-8 is read by the encoding that is stated.
    assert became("my/*", min_chars=6, encoding="latin-1") == expected | {"f.txt": "used"}
    documents, files = read_files("my/*", SourceConfig(files="x", min_chars=6, encoding="cp1252"))
    assert {file.file: file.note for file in files if file.outcome == "used" and file.note} == {
        "my/f.txt": "read as cp1252",
        "my/g.txt": "read as utf-16-le",
    }
    assert {"Größe und Maß", "café, and a little more"} < {document.text for document in documents}
    assert sentence(files) == ("11 files: 5 used, 2 empty, 1 too short, 1 binary, 2 of a kind that is not read")
    assert counted(files)["used"] == 5


def test_files_beyond_max_bytes_and_near_copies_of_held_out_text(folder: Path) -> None:
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    write({"a.txt": words.encode(), "b.txt": f"{words} and more".encode(), "c.txt": b"something else"})
    corpus = read_corpus("a", SourceConfig(files="my/[bc].txt", heldout_files="my/a.txt"), Path("cache"))
    corpus = without_near_copies({"a": corpus}, {})["a"]
    assert {file.file: file.outcome.value for file in settled(corpus)} == {
        "my/b.txt": "near copy of held-out text",
        "my/c.txt": "used",
        "my/a.txt": "used",
    }
    write({f"{number}.md": f"text number {number}".encode() for number in range(9)})
    found = became("my/*.md", max_bytes=30)
    assert sorted(found.values()) == ["beyond max_bytes"] * 7 + ["used"] * 2


def test_files_of_rows_tell_too(folder: Path) -> None:
    write({"a.jsonl": b'{"text": "one"}\n{"text": "two"}\n', "b.jsonl": b'{"text": "one"}\n', "c.jsonl": b""})
    corpus = read_corpus("a", SourceConfig(files="my/*"), Path("cache"))
    assert [(file.outcome.value, file.documents) for file in settled(corpus)] == [
        ("used", 2),
        ("duplicate", 1),
        ("empty", 0),
    ]
    assert settled(Corpus("a", [], [], "", "")) == ()


def test_pages_may_declare_their_encoding(folder: Path) -> None:
    page = '<html><head><meta charset="{}"></head><body>Größe “{}”</body></html>'
    write(
        {
            "a.html": page.format("iso-8859-1", 1).encode("cp1252"),  # as browsers read it
            "b.html": page.format("utf-8", 2).encode(),
            "c.html": page.format("rot13", 3).encode("cp1252"),
        }
    )
    documents, files = read_files("my/*", SourceConfig(files="x"))
    assert [document.text for document in documents] == ["Größe “1”", "Größe “2”"]
    assert files[2].outcome == "neither UTF-8 nor UTF-16" and "Set encoding" in files[2].note


def test_nothing_that_could_be_used(folder: Path) -> None:
    write({"a.png": b"x", "b.txt": b""})
    with pytest.raises(DataError, match=r"no documents in its 2 file\(s\)\. 2 files: 1 empty, 1 of a kind"):
        read_documents("my/*.*", SourceConfig(files="x"))


def test_texts_and_patterns_without_an_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_HTML_BYTES", 40)
    write({"a.html": b"<p>" * 20, "b.txt": b"one", "c.txt": b"two"})
    assert became("my/*.*") == {"a.html": "too long", "b.txt": "used", "c.txt": "used"}
    monkeypatch.setattr(module, "MAX_SOURCE_FILES", 2)
    with pytest.raises(DataError, match="3 files; there may be at most 2"):
        matching_files("my/*.*")


def test_what_a_glob_finds_that_is_no_file_is_left_out_and_named(folder: Path) -> None:
    write({"a.md": b"one text", "b.md": b"another text"})
    Path("my/gone.md").symlink_to("nowhere")
    Path("my/round.jsonl").symlink_to("round.jsonl")
    os.mkfifo("my/pipe.md")
    files = {Path(file.file).name: file for file in read_files("my/**/*", SourceConfig(files="x"))[1]}
    assert list(files) == ["a.md", "b.md", "gone.md", "pipe.md", "round.jsonl"]
    unread = {name: file.note for name, file in files.items() if file.outcome == Outcome.unknown}
    assert unread == {
        "gone.md": "a link that leads nowhere",
        "pipe.md": "a FIFO",
        "round.jsonl": "a link that leads nowhere",
    }
    for name in unread:
        # Whoever names one by itself wants its text.
        with pytest.raises(DataError, match=f"my/{name}: (cannot be read|is a FIFO)"):
            read_files(["my/*.md", f"my/{name}"], SourceConfig(files="x"))


def test_a_file_is_read_by_one_path_however_many_links_lead_to_it(folder: Path) -> None:
    write({"a.md": b"one text", "sub/b.jsonl": b'{"text": "another"}\n{"text": "third"}\n'})
    Path("my/again").symlink_to(".")
    Path("my/sub/0.md").symlink_to("../a.md")
    # A folder elsewhere that only a link leads to is read.
    Path("other").mkdir()
    Path("other/c.md").write_text("far text")
    Path("my/linked").symlink_to("../other")
    documents, files = read_files("my/**/*", SourceConfig(files="x"))
    assert [document.text for document in documents] == ["one text", "far text", "another", "third"]
    used = [file.file for file in files if file.outcome == Outcome.used]
    assert used == ["my/a.md", "my/linked/c.md", "my/sub/b.jsonl"]
    notes = {file.file: file.note for file in files if file.outcome == Outcome.duplicate}
    # A folder is entered once, however many links lead to it.
    assert notes == {"my/sub/0.md": "the same file as my/a.md"}
    # The one that is named by itself is the one that counts.
    _, files = read_files(["my/*.md", "my/sub/0.md"], SourceConfig(files="x"))
    assert {file.file: file.outcome for file in files} == {"my/a.md": "duplicate", "my/sub/0.md": "used"}
