"""Nothing is read twice while no file has changed, and whatever has changed is read."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from lifelong_moe.config.data import SourceConfig, TokenizerConfig
from lifelong_moe.data.text import files as reading
from lifelong_moe.data.text.documents import Corpus, Document
from lifelong_moe.data.text.manifest import forget
from lifelong_moe.data.text.sources import read_corpus
from lifelong_moe.data.text.spool import Spool
from lifelong_moe.data.tokens.prepare import PreparedData, prepare_data
from lifelong_moe.errors import DataError
from lifelong_moe.storage.keys import canonical_json, content_key

CACHE = Path("cache")
TOKENIZER = TokenizerConfig(vocab_size=300)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text of several sources with a duplicate, a near copy of held-out text, and a file of pairs."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"text": f"{n} apples, " + " ".join(f"w{n}x{i}" for i in range(40)), "source": f"s{n % 9}"} for n in range(60)
    ]
    rows.append({**rows[0], "source": "s8"})
    write("a.jsonl", rows[:30])
    write("b.jsonl", rows[30:])
    write("held.jsonl", [{"text": "held out " + " ".join(f"h{i}y" for i in range(60))}])
    write(
        "c.jsonl",
        [{"text": "copied: held out " + " ".join(f"h{i}y" for i in range(60))}, *rows[:2], {"text": "it is new"}],
    )
    write("pairs.jsonl", [{"text": f"what is {n}?", "answer": f"{n}!", "source": f"p{n}"} for n in range(30)])


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can give a file an earlier time of change, so the clock goes on instead."""
    now = time.time
    monkeypatch.setattr("lifelong_moe.data.text.manifest.time.time", lambda: now() + 60)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of text files that were opened."""
    names: list[str] = []
    original = reading.open_file

    def noted(path: Path, *given: Any) -> Any:
        names.append(path.name)
        return original(path, *given)

    monkeypatch.setattr(reading, "open_file", noted)
    return names


def sources() -> dict[str, SourceConfig]:
    return {
        "ab": SourceConfig(files="[ab].jsonl", heldout_fraction=0.3),
        "c": SourceConfig(files="c.jsonl", heldout_files="held.jsonl"),
        "pairs": SourceConfig(files="pairs.jsonl", answer_field="answer"),
    }


def prepared() -> PreparedData:
    return prepare_data(sources(), TOKENIZER, ["ab", "pairs"], 32, CACHE)


def remembered(name: str) -> Corpus:
    corpus = read_corpus(name, sources()[name], CACHE)
    assert corpus.remember is not None
    corpus.remember()
    return corpus


def forge(path: Path, content: dict[str, Any]) -> None:
    """Write a manifest that says whatever it says, and is whole."""
    del content["sha256"]
    path.write_text(canonical_json({**content, "sha256": content_key(content)}))


def same(one: PreparedData, other: PreparedData) -> None:
    assert one.identity == other.identity and one.records == other.records and one.files == other.files
    for name, corpus in one.corpora.items():
        for part in ("train", "heldout"):
            left, right = getattr(corpus, part), getattr(other.corpora[name], part)
            assert (left.tokens == right.tokens).all() and (left.text_bytes == right.text_bytes).all()


def test_a_second_start_opens_no_text(opened: list[str]) -> None:
    first = prepared()
    assert first.records["c"].left_out and first.records["ab"].duplicates == 1
    assert sorted(opened) == ["a.jsonl", "b.jsonl", "c.jsonl", "held.jsonl", "pairs.jsonl"]
    opened.clear()
    second = prepared()
    same(first, second)
    assert not opened
    # Text is read when it is asked for.
    assert [document.text[:8] for document in second.heldout_documents["c"]] == ["held out"]
    assert sorted(opened) == ["c.jsonl", "held.jsonl"]
    assert second.heldout_documents == first.heldout_documents


def test_what_changed_is_read_and_nothing_else(opened: list[str]) -> None:
    first = prepared()
    with Path("b.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more document, which nobody has seen", "source": "s1"}) + "\n")
    opened.clear()
    second = prepared()
    # The near copies of all others are judged anew, by the new held-out text too.
    assert {"a.jsonl", "b.jsonl"} <= set(opened)
    assert second.records["ab"].documents + second.records["ab"].heldout_documents == 61
    assert second.records["pairs"] == first.records["pairs"]


@pytest.mark.parametrize("change", ["touched", "copied"])
def test_a_file_of_the_same_bytes_is_hashed_and_not_parsed(change: str, opened: list[str]) -> None:
    first = prepared()
    if change == "touched":
        os.utime("a.jsonl", (1e9, 1e9))
    else:
        data = Path("a.jsonl").read_bytes()
        Path("other").write_bytes(data)
        os.replace("other", "a.jsonl")
    opened.clear()
    same(first, prepared())
    assert not opened


@pytest.mark.parametrize("change", ["same size", "gone", "new", "cap"])
def test_other_files_or_settings_are_read(change: str, opened: list[str]) -> None:
    config = sources()["ab"]
    first = read_corpus("ab", config, CACHE)
    assert first.remember is not None
    first.remember()
    opened.clear()
    assert read_corpus("ab", config, CACHE).train_hash == first.train_hash and not opened
    if change == "same size":
        path = Path("a.jsonl")
        path.write_text(path.read_text().replace("apples", "grapes", 1))
    elif change == "gone":
        Path("b.jsonl").unlink()
    elif change == "new":
        Path("d.jsonl").write_bytes(Path("c.jsonl").read_bytes())
        config = SourceConfig(files="[abd].jsonl", heldout_fraction=0.3)
    else:
        config = SourceConfig(files="[ab].jsonl", heldout_fraction=0.3, max_bytes=4000)
    assert read_corpus("ab", config, CACHE).train_hash != first.train_hash and opened


def test_what_was_written_a_moment_ago_is_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a tick of the clock a file may change and keep its times."""
    monkeypatch.setattr("lifelong_moe.data.text.manifest.SETTLED_SECONDS", 3600.0)
    corpus = read_corpus("ab", sources()["ab"], CACHE)
    assert corpus.remember is not None
    corpus.remember()
    (path,) = CACHE.glob("manifests/*.json")
    assert [file["state"] for file in json.loads(path.read_text())["files"].values()] == [[], []]
    assert read_corpus("ab", sources()["ab"], CACHE).remember is None
    # Once it is old enough, its times are noted and it is not hashed any more.
    monkeypatch.setattr("lifelong_moe.data.text.manifest.SETTLED_SECONDS", 10.0)
    assert read_corpus("ab", sources()["ab"], CACHE).remember is None
    assert all(len(file["state"]) == 5 for file in json.loads(path.read_text())["files"].values())


@pytest.mark.parametrize("damage", ["{", '{"files": {}}', "null", '{"files": {"a.jsonl": {"state": "x"}}}'])
def test_a_damaged_manifest_is_as_none(damage: str, opened: list[str]) -> None:
    first = prepared()
    for path in CACHE.glob("manifests/*.json"):
        path.write_text(damage)
    opened.clear()
    same(first, prepared())
    assert len(opened) == 5


def test_one_wrong_digit_is_found(opened: list[str]) -> None:
    first = prepared()
    (path,) = (path for path in CACHE.glob("manifests/*.json") if "near_copies" in path.read_text())
    digest = first.records["c"].left_out[0]
    path.write_text(path.read_text().replace(digest, f"{'0' if digest[0] != '0' else '1'}{digest[1:]}"))
    same(first, prepared())


def test_forgetting_reads_again(opened: list[str]) -> None:
    first = prepared()
    forget(CACHE)
    opened.clear()
    same(first, prepared())
    assert len(opened) == 5


@pytest.mark.parametrize("wrong", ["train_hash", "heldout_hash", "heldout_rows", "documents"])
def test_a_manifest_of_other_text_is_found_out_when_text_is_read_and_forgotten(wrong: str) -> None:
    """As one that is damaged, or that another version or somebody else wrote: tokens would be named by what it says."""
    corpus = remembered("ab")
    (path,) = CACHE.glob("manifests/*.json")
    content = json.loads(path.read_text())
    if wrong == "documents":
        content["train"]["documents"] += 1
    elif wrong == "heldout_rows":
        content["heldout_rows"] = "1" * 64
    else:
        content[wrong.removesuffix("_hash")]["hash"] = "1" * 64
    forge(path, content)
    found = read_corpus("ab", sources()["ab"], CACHE)
    with pytest.raises(DataError, match="has changed since this command began"):
        list(found.train)
    # Or else the next start would end in the same way.
    again = read_corpus("ab", sources()["ab"], CACHE)
    assert again.train == corpus.train and again.remember is not None


def test_a_wrong_manifest_of_what_is_left_is_found_out_and_forgotten() -> None:
    """A near copy would be trained on, as text that the cache has under this name ever after."""
    first = prepared()
    (path,) = (path for path in CACHE.glob("manifests/*.json") if "near_copies" in path.read_text())
    content = json.loads(path.read_text())
    assert content["left"]["c"]["near_copies"]
    content["left"]["c"]["near_copies"] = ["1" * 64]
    forge(path, content)
    shutil.rmtree(CACHE / "tokens")
    with pytest.raises(DataError, match="has changed since this command began"):
        prepared()
    same(first, prepared())


@pytest.mark.parametrize("number", [-1, 0])
def test_a_manifest_of_no_documents_is_as_none(number: int) -> None:
    corpus = remembered("ab")
    (path,) = CACHE.glob("manifests/*.json")
    content = json.loads(path.read_text())
    content["train"]["documents"] = number
    forge(path, content)
    assert len(read_corpus("ab", sources()["ab"], CACHE).train) == len(corpus.train)


@pytest.mark.parametrize("age", [0.0, 3600.0])
def test_a_file_that_changes_while_it_is_read_is_not_remembered(age: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its documents are of what it was, its hash would be of what it is now, and so it would never be read again."""
    monkeypatch.setattr("lifelong_moe.data.text.manifest.SETTLED_SECONDS", age)
    add, path = Spool.add, Path("a.jsonl")

    def added(spool: Spool, document: Document, part: int = 0) -> None:
        if "apples" in path.read_text():
            path.write_text(path.read_text().replace("apples", "grapes"))
        add(spool, document, part)

    monkeypatch.setattr(Spool, "add", added)
    found = read_corpus("ab", sources()["ab"], CACHE)
    assert any("apples" in document.text for document in found.train)
    if found.remember is not None:
        found.remember()
    assert not found.identity
    again = read_corpus("ab", sources()["ab"], CACHE)
    assert sum("apples" in document.text for document in [*again.train, *again.heldout]) == 31  # the duplicate too


def test_a_mistake_leaves_no_manifest() -> None:
    with pytest.raises(DataError, match="too few tokens"):
        prepare_data(sources(), TOKENIZER, ["ab"], 100_000, CACHE)
    assert not CACHE.exists()
