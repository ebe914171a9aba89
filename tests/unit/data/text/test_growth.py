"""What is remembered of files changes nothing: whatever comes and goes, the text is that of a first start."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lifelong_moe.config.data import SourceConfig, TokenizerConfig
from lifelong_moe.data.text import file_rows, jsonl, spool
from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.text.manifest import ROWS
from lifelong_moe.data.text.sources import read_corpus
from lifelong_moe.data.tokens import shards
from lifelong_moe.data.tokens.prepare import PreparedData, prepare_data
from lifelong_moe.data.tokens.records import Remembered
from lifelong_moe.data.tokens.texts import Texts, read_texts
from lifelong_moe.errors import DataError
from lifelong_moe.storage.remembered import SETTLED_SECONDS

WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in "nrst"]
TRAINED = ["grown", "pairs"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is large enough to be remembered, and old enough."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(file_rows, "LEAST_BYTES", 1)
    monkeypatch.setattr("lifelong_moe.data.text.manifest.SETTLED_SECONDS", -SETTLED_SECONDS)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that were parsed, and those of which all documents were read again."""
    names: list[str] = []
    original = jsonl.unpacked

    def noted(file: Any) -> Any:
        names.append(file.path.name)
        return original(file)

    monkeypatch.setattr(jsonl, "unpacked", noted)
    return names


class Grower:
    """Files that come, change, go and get other names; documents repeat and quote each other."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._texts = [self._text() for _ in range(8)]
        self._files: dict[str, list[dict[str, str]]] = {}
        self._number = 0
        for folder in ("grown", "pairs", "held"):
            self._add(folder, 12)

    def _text(self) -> str:
        return " ".join(self._draw.choices(WORDS, k=self._draw.randint(20, 60)))

    def _row(self) -> dict[str, str]:
        draw = self._draw
        if draw.random() < 0.3:
            words = draw.choice(self._texts).split()
            words[draw.randrange(len(words))] = draw.choice(WORDS)
            text = " ".join(words)
        else:
            self._texts.append(text := self._text())
        row = {"text": text.upper() if draw.random() < 0.1 else text}
        return row if draw.random() < 0.3 else {**row, "source": f"site {draw.randint(0, 30)}"}

    def _add(self, folder: str, number: int) -> None:
        rows = [self._row() for _ in range(number)]
        if folder == "pairs":
            rows = [{**row, "answer": row["text"][:9]} for row in rows]
        self._write(f"{folder}/{self._number}.jsonl", rows)
        self._number += 1

    def _write(self, name: str, rows: list[dict[str, str]]) -> None:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._files[name] = rows

    def step(self) -> None:
        """Change something."""
        draw = self._draw
        names = [name for name in self._files if not name.startswith("held")]
        name, what = draw.choice(names), draw.choice(["add", "add", "add", "change", "rename", "remove"])
        folder = draw.choice(["grown", "grown", "pairs"])
        if what == "add" or (what == "remove" and sum(one.startswith(name.split("/")[0]) for one in names) < 2):
            self._add(folder, draw.randint(1, 20))
        elif what == "change":
            rows = [dict(row) for row in self._files[name]]
            draw.choice(rows)["text"] = self._text()
            self._write(name, rows)
        else:
            rows = self._files.pop(name)
            Path(name).unlink()
            if what == "rename":
                self._write(f"{name.split('/')[0]}/z{self._number}.jsonl", rows)
                self._number += 1


def sources(**settings: Any) -> dict[str, SourceConfig]:
    return {
        "grown": SourceConfig(files="grown/*.jsonl", heldout_fraction=0.2, heldout_sources=2, **settings),
        "pairs": SourceConfig(files="pairs/*.jsonl", answer_field="answer", heldout_fraction=0.1),
        "held": SourceConfig(files="grown/*.jsonl", heldout_files="held/*.jsonl"),
    }


def told(texts: Texts) -> dict[str, Any]:
    """All that is known of text, the text too, with what messages call it."""
    return {
        name: (corpus, list(corpus.near_copies), corpus.files, corpus.split_hash, corpus.beyond, *origins(corpus.train))
        for name, corpus in texts.corpora.items()
    }


def origins(documents: Any) -> Iterator[str]:
    return (document.origin for document in documents)


@pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on disk"])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_a_first_start(seed: int, on_disk: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if on_disk:
        monkeypatch.setattr(spool, "MOST_BYTES", 2000)
    grower, settings = Grower(seed), {"max_bytes": 9000} if seed == 3 else {}
    named = {name: source for name, source in sources(**settings).items() if name != "held" or seed == 2}
    if seed == 2:  # what one distribution trains on another must not hold out
        named.pop("grown")
    trained = [name for name in named if name != "pairs"]
    for _ in range(8):
        found, errors = [], []
        for cache in ("kept", f"new{_}"):
            try:
                texts = read_texts(named, trained, Path(cache), Remembered())
                found.append(told(texts))
                texts.remember()
            except DataError as error:
                errors.append(str(error))
        assert len(found) != 1 and len(set(errors)) < 2
        assert not found or found[0] == found[1]
        grower.step()


def test_only_what_is_new_is_read(read: list[str]) -> None:
    grower = Grower(5)
    for _ in range(3):
        grower._add("grown", 30)
    config = {"held": sources()["held"]}
    read_texts(config, ["held"], Path("kept"), Remembered()).remember()
    read.clear()
    grower._add("grown", 5)
    corpus = read_corpus("held", config["held"], Path("kept"))
    assert read == [f"{grower._number - 1}.jsonl"]
    # Held-out text is kept; training text is read again if it is asked for.
    assert len(list(corpus.heldout)) == len(corpus.heldout) and len(read) == 1
    assert len(list(corpus.train)) == len(corpus.train) and len(read) == 1 + 5


def prepared(cache: str, tokenizer: str | None) -> PreparedData:
    named = {name: source for name, source in sources().items() if name != "held"}
    return prepare_data(named, TokenizerConfig(vocab_size=300, file=tokenizer), TRAINED, 256, Path(cache))


def test_tokens_are_those_of_a_first_start(monkeypatch: pytest.MonkeyPatch, read: list[str]) -> None:
    monkeypatch.setattr(shards, "PIECE_BYTES", 1)
    grower = Grower(6)
    prepared("first", None).tokenizer.save(Path("tokenizer.json"))
    for number in range(4):
        one, other = prepared("kept", "tokenizer.json"), prepared(f"new{number}", "tokenizer.json")
        assert one.identity == other.identity and one.records == other.records and one.files == other.files
        for name, corpus in one.corpora.items():
            for part in ("train", "heldout"):
                left, right = getattr(corpus, part), getattr(other.corpora[name], part)
                for array in ("tokens", "offsets", "text_bytes", "answer_bytes", "digests"):
                    mine, its = getattr(left, array), getattr(right, array)
                    assert (mine is None) == (its is None) and (mine is None or (mine == its).all())
        grower._add("grown", 6)
        grower._add("pairs", 3)


@pytest.mark.parametrize("damage", [b"", b"{}\n", b"x", "byte"])
def test_damaged_rows_are_as_none(damage: bytes | str, read: list[str]) -> None:
    grower = Grower(7)
    config = {"grown": sources()["grown"]}
    read_texts(config, ["grown"], Path("kept"), Remembered()).remember()
    (path,) = Path("kept/manifests").glob(f"*{ROWS}")
    data = path.read_bytes()
    path.write_bytes(damage if isinstance(damage, bytes) else data[:-90] + bytes([data[-90] ^ 1]) + data[-89:])
    grower._add("grown", 5)
    read.clear()
    found = told(read_texts(config, ["grown"], Path("kept"), Remembered()))
    assert len(read) == 2 and found == told(read_texts(config, ["grown"], Path("new"), Remembered()))


def test_rows_of_other_text_are_found_out_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a file changes while a start of a grown corpus runs."""
    grower = Grower(8)
    config = {"grown": sources()["grown"]}
    read_texts(config, ["grown"], Path("kept"), Remembered()).remember()
    grower._add("grown", 5)
    corpus = read_corpus("grown", config["grown"], Path("kept"))
    Path("grown/0.jsonl").write_text(json.dumps({"text": "another text"}) + "\n")
    with pytest.raises(DataError, match=r"0\.jsonl: has changed since this command began"):
        list(corpus.train)
    assert all(isinstance(document, Document) for document in corpus.heldout)
