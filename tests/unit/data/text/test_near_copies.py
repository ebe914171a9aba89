"""Near copies of held-out text: found among honest text, and judged as a comparison of sets of strings judges."""

from __future__ import annotations

import errno
import json
import os
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from lifelong_moe.config.data import SourceConfig, TokenizerConfig
from lifelong_moe.data.text import near_copies as module
from lifelong_moe.data.text import runs
from lifelong_moe.data.text.documents import Corpus, Document, documents_hash, letters
from lifelong_moe.data.text.near_copies import near_copies, without_near_copies
from lifelong_moe.data.text.runs import FILTER_BITS, Column, Table, ngrams
from lifelong_moe.data.text.split import build_corpus
from lifelong_moe.data.tokens.prepare import prepare_data
from lifelong_moe.errors import DataError
from tests.unit.data.text import near_copies_reference as reference

SYLLABLES = [a + b for a, b in zip("bcdfghjklmnprstvwxyz", "aeiouaeiouaeiouaeiou", strict=True)]
LICENCE = "licensed under the terms of the usual licence without any warranty of any kind express or implied " * 3


@pytest.fixture(autouse=True, params=["at once", "in parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text is compared at once or in parts, with the same result; and looked up twice, in files, in pieces."""
    if request.param == "in parts":
        monkeypatch.setattr(module, "PART_BYTES", 300)
        monkeypatch.setattr(module, "MOST_HITS", 50)
        monkeypatch.setattr(module, "LEAST_MERGED", 40)
        monkeypatch.setattr(runs, "_AT_ONCE", 32)
        monkeypatch.setattr(runs, "_MOST_BYTES", 200)
        monkeypatch.setattr(runs, "_COUNTED", 50)


def words(rng: random.Random, number: int) -> list[str]:
    """Words that no two documents have by chance in the same order."""
    return ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(number)]


def edited(rng: random.Random, text: str, edits: int) -> str:
    """The text with some words replaced."""
    found = text.split()
    for place in rng.sample(range(len(found)), edits):
        found[place] = "".join(rng.choices(SYLLABLES, k=3))
    return " ".join(found)


def corpus_of(train: list[Document], heldout: list[Document], name: str = "a") -> Corpus:
    return Corpus(name, train, heldout, documents_hash(train), documents_hash(heldout))


def kept(train: list[Document], heldout: list[Document]) -> list[Document]:
    return without_near_copies({"a": corpus_of(train, heldout)})["a"].train


def by_sets(documents: list[Document], known: list[Document]) -> list[bool]:
    """The rule in sets of strings of 16 letters, document by document."""

    def runs(document: Document) -> set[str]:
        text = letters(document.text)
        return {text[i : i + 16] for i in range(len(text) - 15)}

    new, old = [runs(d) for d in documents], [runs(d) for d in known]
    sources: dict[str, set[str]] = {}
    for document, its in zip([*documents, *known], [*new, *old], strict=True):
        sources.setdefault(document.source, set()).update(its)
    counts = Counter(run for its in sources.values() for run in its)
    # What stands in no new document is not counted among known ones: it can only make their share smaller.
    common = {run for run, number in counts.items() if number > 8} & set().union(*new)
    everything = set().union(*old)

    def is_copy(its: set[str]) -> bool:
        own = its - common
        if len(its) >= 49 and 10 * len(own) < len(its):
            return 2 * len(its & everything) >= len(its)
        for other in old:
            theirs = other - common
            for part, whole in ((own, its), (theirs, other)):
                if len(part) >= 49 and 10 * len(part) >= len(whole) and 2 * len(own & theirs) >= len(part):
                    return True
        return False

    return [is_copy(its) for its in new]


def test_ngrams_are_one_for_each_different_run_of_letters() -> None:
    rng = random.Random(0)
    texts = [" ".join(words(rng, 300)), "ab" * 50, "日本語の文章です。" * 9, "ＡＢＣ" * 20, "x" * 16, "x" * 15, ""]
    for text in texts:
        plain = letters(text)
        found = ngrams(text)
        assert len(found) == len({plain[i : i + 16] for i in range(len(plain) - 15)})
        assert found.dtype == np.uint64 and (np.diff(found.astype(object)) > 0).all()
    assert np.array_equal(ngrams("Hello, World! It's 1 o'clock."), ngrams("hello world, its 1 oclock"))
    shared = np.intersect1d(ngrams(texts[0]), ngrams("quite another beginning " + texts[0][400:]))
    plain = letters(texts[0][400:])
    assert len(shared) == len({plain[i : i + 16] for i in range(len(plain) - 15)})


def test_it_is_the_comparison_of_sets() -> None:
    """Random pieces of each other, prefixed by what many share, cut, edited and short."""
    rng = random.Random(1)
    for case in range(30):
        pool = [" ".join(words(rng, rng.randint(8, 60))) for _ in range(12)]
        both = []
        for side in range(2):
            documents = []
            for i in range(rng.randint(1, 25)):
                text = " ".join(rng.sample(pool, rng.randint(1, 3)))
                text = edited(rng, text, rng.randint(0, 6))[rng.randint(0, 40) : rng.randint(60, 700)] or "a"
                text = (LICENCE[: rng.choice([60, 290])] if rng.random() < 0.5 else "") + text
                documents.append(Document(text, f"{rng.choice('abcdefghijklm')}{side if case % 2 else ''}{i // 2}"))
            both.append(documents)
        assert near_copies(*both, may_contain=False) == by_sets(*both)


def test_it_is_the_comparison_by_matrices(tmp_path: Path) -> None:
    """Many kinds of text at once, of several distributions: by arrays of numbers, and as earlier versions did it."""
    rng = random.Random(9)
    for _ in range(12):
        pool = [" ".join(words(rng, rng.randint(5, 60))) for _ in range(10)]
        pool += ["日本語" * 9 + str(rng.random()), "ab" * rng.randint(20, 60), LICENCE]
        corpora = {}
        for name in "abc":
            sides = []
            for number in (rng.randint(2, 40), rng.randint(1, 12)):
                texts = [" ".join(rng.choices(pool, k=rng.randint(1, 4))) for _ in range(number)]
                texts = [edited(rng, text, min(rng.randint(0, 6), len(text.split()))) for text in texts]
                sides.append([Document(text, f"{rng.randint(0, 14)}") for text in texts])
            sides[0].append(Document(" ".join(words(rng, 80)), "own"))
            corpora[name] = corpus_of(*sides, name=name)
        others = {"gone": [Document(rng.choice(pool), "gone")]}
        found, expected = without_near_copies(corpora, others, tmp_path), reference.without_near_copies(corpora, others)
        assert found == expected
        assert [one.near_copies for one in found.values()] == [one.near_copies for one in expected.values()]
        for may_contain in (False, True):
            sides_of_a = corpora["a"].train, [*corpora["b"].train, *corpora["c"].heldout]
            judged = (one.near_copies(*sides_of_a, may_contain=may_contain) for one in (module, reference))
            assert next(judged) == next(judged)
    # Where there is much, files are made, without names.
    is_much = runs._MOST_BYTES < 1000
    assert isinstance(Table(corpora["a"].train, tmp_path).runs_W, np.memmap) == is_much and [*tmp_path.iterdir()] == []


def test_where_no_file_can_be_made_numbers_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(error: int) -> Callable[..., IO[bytes]]:
        def raising(**_: object) -> IO[bytes]:
            raise OSError(error, os.strerror(error))

        return raising

    monkeypatch.setattr(runs, "_MOST_BYTES", 10)
    numbers = np.arange(100)
    for error in (errno.EROFS, errno.EACCES):
        monkeypatch.setattr("tempfile.TemporaryFile", refuse(error))
        column = Column(np.int64, tmp_path)
        for part in np.split(numbers, 5):
            column.extend(part)
        assert column.array().tolist() == numbers.tolist()
    monkeypatch.setattr("tempfile.TemporaryFile", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        Column(np.int64, tmp_path).extend(numbers)


def test_documents_that_are_no_copies_are_not_held_to_be_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentences that many documents share are counted; of the documents nothing is kept, and they are read once."""
    rng = random.Random(12)
    sentences = [" ".join(words(rng, 4)) for _ in range(60)]
    train, heldout = (
        [Document(" ".join([*rng.sample(sentences, 8), *words(rng, 60)]), f"{side}{i}") for i in range(number)]
        for side, number in (("t", 300), ("h", 100))
    )
    copy = Document(edited(rng, heldout[0].text, 2), "copy")
    monkeypatch.setattr(module, "MOST_HITS", 20 * len(ngrams(copy.text)))
    looked_up, look = list[int](), module._looked_up
    monkeypatch.setattr(module, "_looked_up", lambda train, *rest: looked_up.append(len(train)) or look(train, *rest))
    assert len(kept([*train, copy], heldout)) == 300
    assert looked_up == [301]


def test_two_edits_and_every_tenth_word_are_found_and_new_text_is_not() -> None:
    rng = random.Random(2)
    heldout = [Document(" ".join(words(rng, n)), f"h{n}") for n in (30, 60, 100, 400, 2000)]
    honest = [Document(" ".join(words(rng, n)), f"t{n}") for n in (12, 30, 100, 400, 2000)]
    copies = [Document(edited(rng, d.text, 2), f"c{d.source}") for d in heldout]
    copies += [Document(edited(rng, d.text, len(d.text.split()) // 10), f"e{d.source}") for d in heldout]
    copies += [Document(d.text.upper() + " !", f"u{d.source}") for d in heldout]
    assert kept([*honest, *copies], heldout) == sorted(honest, key=lambda document: document.hash)


def test_what_holds_a_held_out_document_and_what_it_holds_are_copies() -> None:
    rng = random.Random(3)
    whole, short = (" ".join(words(rng, n)) for n in (500, 40))
    heldout = [Document(whole, "h"), Document(short, "s")]
    around = " ".join(words(rng, 2000))
    digest, excerpt = Document(f"{around} {short} {around[::-1]}", "d"), Document(whole[300:900], "e")
    quotation = Document(f"{around} {whole[:300]}", "q")  # some of it, and mostly its own
    assert kept([digest, excerpt, quotation], heldout) == [quotation]


def test_text_that_all_documents_share_makes_none_a_copy() -> None:
    """A licence longer than the text below it; and each file is still found if its own text is copied."""
    rng = random.Random(4)
    documents = [Document(LICENCE + " ".join(words(rng, 25)), f"u{i}") for i in range(40)]
    train, heldout = documents[:30], documents[30:]
    assert len(kept(train, heldout)) == 30
    copy = Document(LICENCE + edited(rng, heldout[0].text[len(LICENCE) :], 2), "copy")
    assert len(kept([*train, copy], heldout)) == 30
    bare = Document(LICENCE + "so", "bare")  # held out too, the licence makes no other document a copy
    assert len(kept(train, [*heldout, bare])) == 30


def test_short_documents_are_copies_only_of_their_equals() -> None:
    """By hand: below 64 letters nothing is compared in parts, so that a greeting is in no document by chance."""
    greeting = Document("Thank you very much, and have a nice day!", "h")
    longer = Document("Of course. Thank you very much, and have a nice day! Where is the station, please?", "t")
    assert kept([longer], [greeting]) == [longer] and kept([greeting], [longer]) == [greeting]


def test_scripts_without_spaces() -> None:
    rng = random.Random(5)
    text = "".join(chr(0x4E00 + rng.randrange(3000)) for _ in range(300))
    changed = text[:100] + "一二三" + text[103:250] + "。" + text[251:]
    other = "".join(chr(0x4E00 + rng.randrange(3000)) for _ in range(300))
    assert [d.text for d in kept([Document(changed, "a"), Document(other, "b")], [Document(text, "h")])] == [other]


def test_another_distributions_held_out_text_counts_and_changes_nothing_else() -> None:
    rng = random.Random(6)
    texts = {name: [Document(" ".join(words(rng, 60)), f"{name}{i}") for i in range(40)] for name in "abc"}
    copies = [Document(edited(rng, d.text, 2), f"x{i}") for i, d in enumerate(texts["b"])]
    config = SourceConfig(files="unused", heldout_fraction=0.3)
    corpora = {name: build_corpus(name, documents, config) for name, documents in texts.items()}
    corpora["a"] = build_corpus("a", [*texts["a"], *copies], config)
    alone = without_near_copies({name: corpora[name] for name in "ac"})
    assert [corpus.near_copies for corpus in alone.values()] == [[], []]
    assert alone["a"] == corpora["a"] and alone["c"] == corpora["c"]
    found = without_near_copies(corpora)
    held = {d.text for d in corpora["b"].heldout}
    left = {copy.text for copy, d in zip(copies, texts["b"], strict=True) if d.text in held}
    assert {d.text for d in found["a"].near_copies} == left & {d.text for d in corpora["a"].train} != set()
    assert found["c"] == corpora["c"]
    assert found["a"].heldout == corpora["a"].heldout
    assert found["a"].split_hash == corpora["a"].train_hash != found["a"].train_hash
    assert without_near_copies(found) == found  # done again it is the same


def test_data_is_prepared_without_them(tmp_path: Path) -> None:
    """By hand: b holds out 20 texts that a trains on twice, each time edited; the tokenizer stays as it was."""
    rng = random.Random(7)
    texts = [" ".join(words(rng, 60)) for _ in range(40)]
    again = [edited(rng, text, 2) for text in texts[:20]]
    sides = {
        "a": ([*texts, *again], [" ".join(words(rng, 4)) for _ in range(30)]),
        "b": ([" ".join(words(rng, 4)) for _ in range(30)], [edited(rng, text, 1) for text in texts[:20]]),
    }
    sources = {}
    for name, (train, heldout) in sides.items():
        for part, side in (("train", train), ("heldout", heldout)):
            rows = "".join(json.dumps({"text": text}) + "\n" for text in side)
            (tmp_path / f"{name}.{part}.jsonl").write_text(rows)
        files, heldout_files = (str(tmp_path / f"{name}.{part}.jsonl") for part in ("train", "heldout"))
        sources[name] = SourceConfig(files=files, heldout_files=heldout_files)
    tokenizer, cache = TokenizerConfig(vocab_size=300), tmp_path / "cache"
    alone = prepare_data({"a": sources["a"]}, tokenizer, ["a"], 8, cache)
    assert (alone.corpora["a"].near_copies, alone.corpora["a"].train.num_documents) == (0, 60)
    beside = prepare_data(sources, tokenizer, ["a", "b"], 8, cache)
    found = beside.corpora["a"]
    assert (found.near_copies, found.train.num_documents) == (40, 20)
    assert found.split_hash == alone.corpora["a"].train_hash != found.train_hash
    assert beside.tokenizer.hash == alone.tokenizer.hash


def test_a_text_of_near_copies_alone_is_an_error() -> None:
    rng = random.Random(8)
    text = " ".join(words(rng, 60))
    train = [Document(edited(rng, text, 1), f"t{i}") for i in range(3)]
    with pytest.raises(DataError, match=r"^distributions\.a: all 3 training documents are near copies"):
        kept(train, [Document(text, "h")])


def test_nothing_is_a_near_copy_of_nothing() -> None:
    assert near_copies([], [Document("a", "a")], may_contain=False) == [] and near_copies(
        [Document("a", "a")], [], may_contain=False
    ) == [False]
    assert near_copies([Document("…", "a")], [Document("…", "b")], may_contain=False) == [False]


def test_a_new_book_may_quote_what_was_seen_but_not_what_is_held_out() -> None:
    line = Document("the member states of the european union and the commission agreed upon it in the end", "line")
    draw = random.Random(0)
    book = Document(" ".join("".join(draw.choices("abcdefghij", k=6)) for _ in range(2000)) + " " + line.text, "book")
    assert near_copies([book], [line], may_contain=True) == [False]
    assert near_copies([book], [line], may_contain=False) == [True]
    for may_contain in (False, True):  # what is mostly a part of something known is a copy of it
        assert near_copies([line], [book], may_contain=may_contain) == [True]


def test_new_text_of_nothing_but_what_is_common_is_no_loss() -> None:
    """A template in ten sources is nobody's own; what is nothing else is known once a single known document has it."""
    template = [Document(f"{LICENCE}{'.' * i}", f"site {i}") for i in range(10)]
    assert near_copies(template, [Document(f"{LICENCE}!", "known")], may_contain=True) == [True] * 10
    other = Document(" ".join(words(random.Random(0), 60)), "known")
    assert near_copies(template, [other], may_contain=True) == [False] * 10


def test_counting_the_documents_of_a_range_copies_no_column(tmp_path: Path) -> None:
    """What lies in files would otherwise be in memory all the same."""
    table = Table([Document("abcdefghijklmnopqrstuvwxyz", "s")] * 2, tmp_path)
    table._again_run = np.sort(np.resize(table._again_run, 1 << 20))
    table._again_document = np.ones(1 << 20, np.int32)
    tracemalloc.start()
    try:
        assert table.documents_of(np.array([True, False]), 0, 0).tolist() == []
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_more_runs_than_numbers_of_32_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    heldout = Document(" ".join(words(random.Random(0), 100)), "h")
    size = len(ngrams(heldout.text))
    monkeypatch.setattr(runs, "MOST_RUNS", size)
    assert len(Table([heldout, heldout])) == size
    monkeypatch.setattr(runs, "MOST_RUNS", size - 1)
    with pytest.raises(DataError, match=r"^text that is held out has more than .*: lower heldout_fraction, or name"):
        Table([heldout])


def test_a_run_beyond_all_of_a_table_is_not_in_it() -> None:
    table = Table([Document("abcdefghijklmnop", "")])  # a single run
    (run,) = table.runs_W
    others = run + (
        np.arange(1, 5, dtype=np.uint64) << np.uint64(FILTER_BITS[1])
    )  # with the same low bits, some beyond
    for sought, found in (([run], [0]), (np.sort(others), [])):
        which, places = table.places(np.array(sought))
        assert which.tolist() == places.tolist() == found
