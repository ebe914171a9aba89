"""Globs, kinds of files, and what is never loaded."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.formats import limits
from lifelong_moe.data.formats.streams import open_file
from lifelong_moe.data.text import parquet as parquets
from lifelong_moe.data.text.files import matching_files, read_documents
from lifelong_moe.data.text.hub import hub_documents
from lifelong_moe.data.text.sources import read_corpus
from lifelong_moe.errors import DataError, ResourceError, TryAgainError

CONFIG = SourceConfig(files="unused")


def _jsonl(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_globs_are_relative_to_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _jsonl(Path("a/b/1.jsonl"), ["one"])
    _jsonl(Path("a/2.jsonl"), ["two"])
    assert [document.text for document in read_documents("a/**/*.jsonl", CONFIG)] == ["two", "one"]
    assert [path.name for path in matching_files("a/**")] == ["2.jsonl", "1.jsonl"]


def test_name_with_glob_characters(tmp_path: Path) -> None:
    _jsonl(tmp_path / "a[1].jsonl", ["one"])
    assert len(read_documents(str(tmp_path / "a[1].jsonl"), CONFIG)) == 1


def test_unmatched_glob_and_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing matches it under"):
        read_documents("no/such/*.jsonl", CONFIG)
    with pytest.raises(DataError, match=r"is a directory; name its files, e\.g\. .*\*\*/\*\.jsonl"):
        read_documents(str(tmp_path), CONFIG)


@pytest.mark.parametrize("name", ["a.pkl", "a.pt", "a.npy", "a.bin"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match="can run code when loaded"):
        read_documents(str(tmp_path / name), CONFIG)


def test_a_file_that_is_named_by_itself_must_be_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"broken")
    (tmp_path / "b.csv").write_bytes(b"x")
    # Before anything is read: the broken file would else be named.
    with pytest.raises(DataError, match=r"b\.csv: unknown kind of file; .*\.parquet are read"):
        read_documents([str(tmp_path / "*"), str(tmp_path / "b.csv")], CONFIG)
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"c\.txt: invalid UTF-8 at byte 3 \(0xe9\)\. Set encoding"):
        read_documents(str(tmp_path / "c.txt"), CONFIG)


def test_a_broken_file_of_rows_is_a_mistake_among_others_too(tmp_path: Path) -> None:
    _jsonl(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "b.jsonl").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"b\.jsonl:1"):
        read_documents(str(tmp_path / "*"), CONFIG)


def test_text_files_are_documents_whatever_their_names(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"three"))
    one, three = read_documents(str(tmp_path / "*"), CONFIG)
    assert (one.text, three.text) == ("one\ntwo\n", "three")
    (tmp_path / "a.txt").rename(tmp_path / "z.txt")
    assert set(read_documents(str(tmp_path / "*"), CONFIG)) == {one, three}


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"a\xff", r"invalid UTF-8 at byte 1"), (b" \n", "blank"), (b"abc\0", "NUL"), (b"\xff\xfea", "UTF-16")],
)
def test_bad_text_files(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=reason):
        read_documents(str(tmp_path / "a.txt"), CONFIG)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["one", "two"], "source": ["u", None], "other": [1, 2]}), path)
    one, two = read_documents(str(path), SourceConfig(files="unused", text_field="body"))
    assert (one.text, one.source, one.origin) == ("one", "u", f"{path}:1")
    assert two.source == f"sha256:{two.hash}"
    with pytest.raises(DataError, match='no column "text"; columns: body, source, other'):
        read_documents(str(path), CONFIG)


def test_bad_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_documents(str(path), CONFIG)
    parquet.write_table(pyarrow.table({"text": ["one", None]}), path)
    with pytest.raises(DataError, match=':2: "text" must be a string; got null'):
        read_documents(str(path), CONFIG)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="FIFO"):
        read_documents(str(path), CONFIG)


def test_renaming_and_shuffling_files_changes_nothing(tmp_path: Path) -> None:
    texts = [f"document {n}" for n in range(30)]
    _jsonl(tmp_path / "x" / "1.jsonl", texts[:10])
    _jsonl(tmp_path / "x" / "2.jsonl", texts[10:])
    _jsonl(tmp_path / "y" / "other.jsonl", texts[::-1])
    x, y = (read_corpus("a", SourceConfig(files=str(tmp_path / d / "*")), tmp_path) for d in "xy")
    assert x == y


def test_heldout_files(tmp_path: Path) -> None:
    _jsonl(tmp_path / "t.jsonl", ["one", "two"])
    _jsonl(tmp_path / "h.jsonl", ["three", "TWO"])
    config = SourceConfig(files=str(tmp_path / "t.jsonl"), heldout_files=str(tmp_path / "h.jsonl"))
    with pytest.raises(DataError, match=r"t\.jsonl:2: this training document is also in the held-out set .*h\.jsonl:2"):
        read_corpus("a", config, tmp_path)
    _jsonl(tmp_path / "h.jsonl", ["three"])
    assert [document.text for document in read_corpus("a", config, tmp_path).heldout] == ["three"]


HUB = SourceConfig(hf="some/data", revision="0123456789" * 4)


def test_hub_rows_become_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def load(path: str, name: str | None, **rest: object) -> datasets.Dataset:
        asked.update(path=path, name=name, **rest)
        return datasets.Dataset.from_dict({"text": ["one", "two"], "other": [1, 2]})

    monkeypatch.setattr("datasets.load_dataset", load)
    assert [document.text for document in hub_documents(HUB)] == ["one", "two"]
    assert asked == {"path": "some/data", "name": None, "split": "train", "revision": HUB.revision}
    with pytest.raises(DataError, match='there is no field "body"; fields: text, other'):
        hub_documents(SourceConfig(hf="some/data", revision=HUB.revision, text_field="body"))


def test_a_dataset_of_the_hub_is_read_row_by_row_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows:
        column_names = ("text", "image")
        read = 0

        def select_columns(self, names: list[str]) -> Rows:
            assert names == ["text"]
            return self

        def __iter__(self) -> Iterator[dict[str, str]]:
            for number in range(30):
                self.read += 1
                yield {"text": f"document {number}"}

    rows, loads = Rows(), list[object]()
    monkeypatch.setattr("datasets.load_dataset", lambda *asked, **_: loads.append(asked) or rows)
    documents = hub_documents(HUB)
    assert (next(documents).text, rows.read) == ("document 0", 1)
    config, cache = replace(HUB, heldout_fraction=0.3), tmp_path / "cache"
    first = read_corpus("a", config, cache)
    assert first.remember is not None and len(loads) == 2
    first.remember()
    again = read_corpus("a", config, cache)
    assert len(loads) == 2 and again.heldout_hash == first.heldout_hash and len(again.train) == len(first.train)
    assert [document.text for document in again.train] == [document.text for document in first.train]
    assert len(loads) == 3  # the text itself was asked for
    # Another commit is another dataset, and a fault of it is told as before.
    read_corpus("a", replace(config, revision="f" * 40), cache)
    assert len(loads) == 4


def test_what_a_manifest_says_of_a_dataset_is_compared_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    texts = [f"document {number}" for number in range(30)]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": texts}))
    config = replace(HUB, heldout_fraction=0.3)
    first = read_corpus("a", config, tmp_path)
    assert first.remember is not None
    first.remember()
    texts[0] = "another"
    with pytest.raises(DataError, match="has changed since this command began"):
        list(read_corpus("a", config, tmp_path).train)
    again = read_corpus("a", config, tmp_path)
    assert "another" in {document.text for part in (again.train, again.heldout) for document in part}


def test_hub_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*_: object, **__: object) -> SimpleNamespace:
        raise RuntimeError("Couldn't read\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"hf=some/data@01234567: .* RuntimeError: Couldn't read the hub"):
        hub_documents(HUB)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(429, TryAgainError), (503, TryAgainError), (408, TryAgainError), (404, DataError), (401, DataError)],
)
def test_a_hub_that_is_busy_is_not_a_mistake(
    monkeypatch: pytest.MonkeyPatch, status: int, kind: type[Exception]
) -> None:
    class RefusalError(Exception):
        response = SimpleNamespace(status_code=status)

    def load(*args: Any, **kwargs: Any) -> Any:
        try:
            raise RefusalError(f"{status} of the hub")
        except RefusalError as error:
            raise FileNotFoundError("not cached") from error  # as datasets does

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(kind) as caught:
        hub_documents(HUB)
    assert str(caught.value).count("\n") == 0 and type(caught.value) is kind


def test_offline_what_is_not_in_the_cache_will_never_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is what datasets raises without a network; nothing is asked of one here."""
    import datasets

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)

    def load(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Couldn't reach 'some/data' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"^hf=some/data@01234567: split train is not in the cache, and HF_HUB_OFF"):
        hub_documents(HUB)


def test_offline_other_mistakes_are_told_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)

    def load(*args: Any, **kwargs: Any) -> Any:
        raise ValueError('Unknown split "train". Should be one of ["test"].')

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(DataError, match="Unknown split"):
        hub_documents(HUB)


@pytest.mark.parametrize(
    "full", [OSError(28, "No space left on device"), OSError("Not enough disk space. Needed: 1.2 GiB")]
)
def test_a_full_disk_is_no_mistake_about_the_hub(monkeypatch: pytest.MonkeyPatch, full: OSError) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        try:
            raise full
        except OSError as error:
            raise RuntimeError("An error occurred while generating the dataset") from error

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(ResourceError, match=r"^hf=some/data@01234567: no space left"):
        hub_documents(HUB)


@pytest.mark.parametrize("error", [ConnectionError("no route"), TimeoutError("slow")])
def test_a_hub_that_is_not_reached_is_tried_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(TryAgainError, match="the hub cannot serve it now"):
        hub_documents(HUB)


def test_parquet_s_bombs_are_known_before_and_while_they_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the columns that are read: a text that a dictionary repeats is small on disk and large in memory."""
    path, text = tmp_path / "a.parquet", "x" * 5_000
    columns = {"text": [f"{i}" for i in range(200)], "other": [text] * 200}
    parquet.write_table(pyarrow.table(columns), path, compression="zstd", use_dictionary=["other"])
    size = path.stat().st_size
    monkeypatch.setattr(limits, "ALLOWANCE_BYTES", 1_000)
    monkeypatch.setattr(limits, "MAX_RATIO", 2)
    assert len(read_documents(str(path), CONFIG)) == 200  # the other column counts for nothing
    with pytest.raises(DataError, match="unpacks to more than 2 times its size"):
        read_documents(str(path), SourceConfig(files="unused", text_field="other"))
    assert 20 * size < 200 * len(text)
    monkeypatch.setattr(limits, "MAX_RATIO", 200 * len(text) // size + 2)
    with open_file(path) as file:
        assert len(list(parquets.read_parquet(file, "other", "source"))) == 200


def test_a_row_s_fault_is_said_with_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one"] * 70 + ["toolong"]}), path)
    monkeypatch.setattr(parquets, "MAX_LINE_BYTES", 6)
    with pytest.raises(DataError, match=r"a\.parquet:71: text is longer than"):
        read_documents(str(path), CONFIG)
    monkeypatch.setattr(parquets, "MAX_LINE_BYTES", 7)
    assert len(read_documents(str(path), CONFIG)) == 71
    whole = pyarrow.array([b"good", b"bad\xff"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"text": whole}), path)
    with pytest.raises(DataError, match=r"a\.parquet:2: invalid UTF-8 at byte 3 of a text"):
        read_documents(str(path), CONFIG)


def test_a_dataset_of_the_hub_is_bounded_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["one", "three"]})
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
    size = 2 * limits.DOCUMENT_BYTES + len("onethree")
    assert len(list(hub_documents(HUB, limits.Quota(size)))) == 2
    with pytest.raises(DataError, match="hf=some/data@01234567: the inbox may hold"):
        list(hub_documents(HUB, limits.Quota(size - 1, "the inbox")))
    monkeypatch.setattr("lifelong_moe.data.text.hub.MAX_LINE_BYTES", 4)
    with pytest.raises(DataError, match="hf=some/data@01234567:2: text is longer than"):
        list(hub_documents(HUB))
