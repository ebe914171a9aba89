"""A corpus built in passes equals one built from lists: the same documents, order, split, hashes and mistakes."""

from __future__ import annotations

import errno
import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.text import near_copies, split, spool
from lifelong_moe.data.text.documents import Corpus, Document, documents_hash
from lifelong_moe.data.text.near_copies import without_near_copies
from lifelong_moe.data.text.spool import Spool, SpooledDocuments
from lifelong_moe.errors import DataError
from tests.unit.data.text.reference import build_corpus as build_from_lists

TEXT = "apple pear plum grape cherry quince fig lemon größe naïve 漢字 Straße x+1 a<b a>b"
WORDS = TEXT.split()


@pytest.fixture(params=["in memory", "on disk", "on disk, in small ranges"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that small text exceeds."""
    if request.param != "in memory":
        monkeypatch.setattr(spool, "MOST_BYTES", 2000)
        monkeypatch.setattr(spool, "_BUFFER_BYTES", 200)
        monkeypatch.setattr(spool, "_AT_ONCE", 7)
        monkeypatch.setattr(near_copies, "PART_BYTES", 1500)
    if "ranges" in request.param:
        monkeypatch.setattr(split, "RANGE", 11)


def documents(seed: int, number: int = 300) -> list[Document]:
    """Documents of several sources and of none, some of which repeat or resemble others."""
    rng = random.Random(seed)
    found: list[Document] = []
    for n in range(number):
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 60))) + f" {rng.random()}"
        source = rng.choice([f"site {rng.randint(0, 25)}", f"own {n}"])
        if n % 7 == 3:
            # Other case and punctuation, and perhaps another source: a duplicate.
            old = rng.choice(found)
            text, source = old.text.upper() + " !", rng.choice([old.source, source])
        elif n % 11 == 5:
            text = rng.choice(found).text + " and more"
        elif n % 13 == 6:
            text = f"{text}\x1e{n}"
        found.append(Document(text, source, f"file-{n % 3}.jsonl:{n}"))
    return found


def same(one: Corpus, other: Corpus) -> None:
    assert one == other and one.beyond == other.beyond and one.split_hash == other.split_hash
    for part in ("train", "heldout", "near_copies"):
        left, right = getattr(one, part), getattr(other, part)
        assert [(d.text, d.source, d.origin) for d in left] == [(d.text, d.source, d.origin) for d in right]
        assert documents_hash(left) == documents_hash(right)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"heldout_fraction": 0.3},
        {"heldout_fraction": 1e-9, "heldout_sources": 7},
        {"heldout_fraction": 0.999999},
        {"max_bytes": 9_000},
        {"max_bytes": 1},
        {"heldout_fraction": 0.2, "max_bytes": 20_000, "heldout_sources": 40},
    ],
)
def test_it_equals_the_reference(seed: int, keys: dict[str, float], tmp_path: Path) -> None:
    config, found = SourceConfig(files="x", **keys), documents(seed)  # type: ignore[arg-type]
    built = split.build_corpus("a", iter(found), config, cache=tmp_path)
    expected = build_from_lists("a", found, config)
    same(built, expected)
    rng = random.Random(seed)
    rng.shuffle(found)
    mixed = split.build_corpus("a", iter(found), config, cache=tmp_path)
    assert (mixed.train_hash, mixed.heldout_hash) == (expected.train_hash, expected.heldout_hash)
    assert [d.text for d in mixed.train] == [d.text for d in expected.train]


@pytest.mark.usefixtures("small")
def test_near_copies_beside_explicit_held_out_text(tmp_path: Path) -> None:
    config = SourceConfig(files="x", heldout_files="y", max_bytes=30_000)
    held = [Document(f"{d.text} of the held-out text", d.source) for d in documents(9, 40)]
    copies = [Document(f"{d.text}, once more", f"copy {n}", f"c:{n}") for n, d in enumerate(held[:9])]
    found = [*documents(5), *copies]
    ours = {"a": split.build_corpus("a", iter(found), config, iter(held), tmp_path)}
    theirs = {"a": build_from_lists("a", found, config, held)}
    same(ours["a"], theirs["a"])
    other = SourceConfig(files="z", heldout_fraction=0.2)
    ours["b"], theirs["b"] = (
        split.build_corpus("b", documents(6), other, cache=tmp_path),
        build_from_lists("b", documents(6), other),
    )
    ours, theirs = without_near_copies(ours), without_near_copies(theirs)
    assert ours["a"].near_copies
    for name in ours:
        same(ours[name], theirs[name])
    # Again, from what it made: as when further held-out text is known.
    for name, corpus in without_near_copies(ours, {"c": held[20:]}).items():
        same(corpus, without_near_copies(theirs, {"c": held[20:]})[name])


FEW: list[tuple[Callable[[], list[Document]], Callable[[], list[Document]] | None]] = [
    (lambda: [Document("one", "a")], None),
    (lambda: [Document("one", "a"), Document("two", "a")], None),
    (lambda: [Document("one", "a"), Document("ONE", "b"), Document("one!", "c")], None),
    (lambda: [Document(t, "b") for t in ("one", "two", "Two")], lambda: [Document("TWO.", "h", "h:1")]),
    (lambda: [Document("one", "a")], lambda: [Document("x", "h"), Document("X", "h"), Document("x.", "i")]),
    (lambda: [], lambda: [Document("x", "h")]),
]  # fmt: skip


@pytest.mark.parametrize("given", FEW)
def test_mistakes_are_told_in_the_same_words(
    given: tuple[Callable[[], list[Document]], Callable[[], list[Document]] | None],
) -> None:
    texts, held = given[0](), None if given[1] is None else given[1]()
    config = SourceConfig(files="x", heldout_files=None if held is None else "y")
    with pytest.raises(DataError) as theirs:
        build_from_lists("a", texts, config, held)
    with pytest.raises(DataError) as ours:
        split.build_corpus("a", texts, config, held)
    assert str(ours.value) == str(theirs.value)


def test_text_on_disk_goes_with_its_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "MOST_BYTES", 2000)
    corpus = split.build_corpus("a", documents(1), SourceConfig(files="x"), cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(".tmp-") and folder.stat().st_mode & 0o077 == 0
    assert corpus.train[3:5] == [corpus.train[3], corpus.train[4]] and corpus.train[-1] == list(corpus.train)[-1]
    del corpus
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_no_text_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "MOST_BYTES", 0)
    one, found = Document("text", "a", "caf\udce9.txt"), Spool(tmp_path)
    found.add(one)
    (back,) = SpooledDocuments(found, found.rows(), np.array([0]))
    assert (back, back.origin) == (one, one.origin)


@pytest.mark.parametrize("more", [-1, 0, 1, spool._READ_BYTES])
def test_a_text_longer_than_what_is_read_at_once_comes_back(
    more: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "MOST_BYTES", 0)
    around = spool._HEAD.size + len("sé".encode()) + len("a.jsonl:1")
    each = [Document("é" + "x" * (spool._READ_BYTES - around - 2 + more), "sé", "a.jsonl:1"), Document("b", "sé", "c")]
    found = Spool(tmp_path)
    for document in each:
        found.add(document)
    back = list(SpooledDocuments(found, found.rows(), np.array([0, 1])))
    assert back == each and [one.origin for one in back] == ["a.jsonl:1", "c"]


def spooled(folder: Path) -> Spool:
    found = Spool(folder)
    for document in documents(1, 60):
        found.add(document)
    return found


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EROFS])
def test_where_a_cache_cannot_be_written_text_stays_in_memory(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's cache, of which everything but the text is used."""
    monkeypatch.setattr(spool, "MOST_BYTES", 2000)

    def refused(*_: object) -> None:
        raise OSError(reason, "refused")

    monkeypatch.setattr(spool, "temporary", refused)
    found = spooled(tmp_path)
    rows = found.rows()
    assert list(found.documents(rows, np.arange(len(rows)))) == documents(1, 60)


def test_a_full_disk_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is buffered cannot be written when the spool goes, either, which is told to nobody again."""
    monkeypatch.setattr(spool, "MOST_BYTES", 2000)
    temporary = spool.temporary

    @contextmanager
    def full(parent: Path, mode: int) -> Iterator[Path]:
        with temporary(parent, mode) as folder:
            (folder / "rows").symlink_to("/dev/full")
            yield folder

    monkeypatch.setattr(spool, "temporary", full)
    with pytest.raises(OSError, match="No space left"):
        spooled(tmp_path).rows()
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_files_beyond_the_cap_are_known_and_not_their_documents() -> None:
    """A small part of a large text leaves millions of documents out."""
    texts = [Document(f"text {n}", f"s{n}", f"{'ab'[n % 2]}:1.jsonl:{n}") for n in range(40)]
    texts.append(Document("a whole file", "s40", "c:1.txt"))
    corpus = split.build_corpus("a", texts, SourceConfig(files="x", max_bytes=1))
    assert corpus.beyond == {"a:1.jsonl", "b:1.jsonl", "c:1.txt"}
