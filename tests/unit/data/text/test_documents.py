"""Duplicates, the cap, the split and the canonical order."""

import hashlib
import unicodedata

import pytest

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.text.documents import Document, documents_hash, letters, normalized_hash
from lifelong_moe.data.text.split import build_corpus
from lifelong_moe.errors import DataError

CONFIG = SourceConfig(files="unused")


def _documents(units: int, pieces: int = 2) -> list[Document]:
    return [Document(f"text {unit} piece {piece}", f"unit{unit}") for unit in range(units) for piece in range(pieces)]


def test_document_hash_is_that_of_its_utf8_text() -> None:
    assert Document("é", "x").hash == hashlib.sha256(b"\xc3\xa9").hexdigest()
    assert Document("é", "x").num_bytes == 2


def test_origin_is_no_part_of_a_document() -> None:
    assert Document("a", "u", "f:1") == Document("a", "u", "g:2")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Hello, World!", "hello world", True), ("STRASSE", "straße", True), ("ab", "abc", False),
        ("...", "!!!", False),
        ("दिन", "दान", False), ("किताब", "कुतब", False),  # vowel signs are marks, categories Mc and Mn
        ("caf\u00e9", "CAFE\u0301", True), ("ｶﾞ", "ｶ", False), ("한", "\u1112\u1161\u11ab", True),
        ("cafe", "café", False),
        ("12<3 → no", "12>3 → no", False), ("3-2", "3*2", False), ("3 / 2", "3 % 2", False), ("1 23", "12 3", False),
        ("-5", "5", False), ("5%", "5", False), ("3.14", "314", False), ("x<y", "x>y", False), ("$5", "5", False),
        ('"Two!"', "two", True), ("12<3\x1eno", "12<3\x1eyes", False), ("so\u00adft", "soft", True),
        ("What is 3 * 4?", "what is 3 - 4", False), ("What is 3 * 4?", " what is\n3 * 4 ", True),
        ("word, " * 20, "word word-" * 10, True),  # long: only letters and digits count
        ("नमस्ते, " * 20, "नमस्ते " * 20, True), ("नमस्ते, " * 20, "नमस्त " * 20, False),
        ("fine ❤\ufe0f " * 20, "fine! " * 20, True),
    ],
)  # fmt: skip
def test_normalized_hash(one: str, other: str, same: bool) -> None:
    assert (normalized_hash(one) == normalized_hash(other)) is same


def test_corpus_is_independent_of_the_order_of_documents() -> None:
    documents = _documents(40)
    assert build_corpus("a", documents, CONFIG) == build_corpus("a", documents[::-1], CONFIG)


def test_corpus_is_in_hash_order_and_its_hash_is_over_sorted_hashes() -> None:
    corpus = build_corpus("a", _documents(40), CONFIG)
    hashes = [document.hash for document in corpus.train]
    assert hashes == sorted(hashes)
    assert corpus.train_hash == hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    assert corpus.heldout_hash == documents_hash(corpus.heldout) != corpus.train_hash


def test_units_are_never_divided_and_nothing_is_lost() -> None:
    corpus = build_corpus("a", _documents(60, pieces=3), SourceConfig(files="unused", heldout_fraction=0.3))
    train, held = ({document.source for document in side} for side in (corpus.train, corpus.heldout))
    assert not train & held
    assert len(train | held) == 60
    assert 8 <= len(held) <= 28  # binomial(60, 0.3): 18 ± 3.5
    assert len(corpus.train) + len(corpus.heldout) == 180


def test_a_unit_stays_held_out_when_others_are_added() -> None:
    few = {document.source for document in build_corpus("a", _documents(100), CONFIG).heldout}
    many = {document.source for document in build_corpus("a", _documents(150), CONFIG).heldout}
    assert few <= many


def split_by_hand(sources: list[str], fraction: float, least: int) -> set[str]:
    """The lowest hashes: all below the fraction, at least so many, at most half unless the fraction says more."""
    digests = {source: int(hashlib.sha256(f"split\n{source}".encode()).hexdigest(), 16) for source in sources}
    below = sum(digest / 2**256 < fraction for digest in digests.values())
    number = max(1, below, min(least, len(sources) // 2))
    return set(sorted(sources, key=digests.__getitem__)[: min(number, len(sources) - 1)])


@pytest.mark.parametrize("units", [2, 3, 7, 9, 10, 11, 24, 100])
@pytest.mark.parametrize("least", [1, 5])
def test_several_sources_are_held_out(units: int, least: int) -> None:
    documents = _documents(units)
    config = SourceConfig(files="unused", heldout_fraction=0.15, heldout_sources=least)
    held = {document.source for document in build_corpus("a", documents, config).heldout}
    assert held == split_by_hand([f"unit{i}" for i in range(units)], 0.15, least)
    assert build_corpus("a", documents[::-1], config) == build_corpus("a", documents, config)


def test_twenty_four_pages_of_a_source_each_hold_out_five_whatever_their_names() -> None:
    """By hand: 15 % of 24 are 3.6, and chance held out one of 24 or none in a tenth of all cases."""
    config = SourceConfig(files="unused", heldout_fraction=0.15, heldout_sources=5)
    for name in range(50):
        pages = [Document(f"Seite {name} {i}", f"{name}/{i}") for i in range(24)]
        assert len(build_corpus("a", pages, config).heldout) >= 5
    fewest = min(
        len(
            build_corpus(
                "a",
                [Document(f"{n} {i}", f"{n}/{i}") for i in range(24)],
                SourceConfig(files="unused", heldout_fraction=0.15),
            ).heldout
        )
        for n in range(50)
    )
    assert fewest == 1  # as distributions of a run still do, whose stages are keyed by this split


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_each_side_has_at_least_one_unit(fraction: float) -> None:
    corpus = build_corpus("a", _documents(5, 1), SourceConfig(files="unused", heldout_fraction=fraction))
    assert min(len(corpus.train), len(corpus.heldout)) == 1


def test_one_unit_is_too_few() -> None:
    with pytest.raises(DataError, match=r"^2 distinct document\(s\) in 1 source unit\(s\) are too few"):
        build_corpus("a", _documents(1), CONFIG)


def test_duplicates_are_dropped_whatever_their_order() -> None:
    documents = [*_documents(20, 1), Document("TEXT 3, piece 0.", "other")]
    corpus = build_corpus("a", documents, CONFIG)
    assert len(corpus.train) + len(corpus.heldout) == 20
    assert build_corpus("a", documents[::-1], CONFIG) == corpus


def test_the_duplicates_are_counted() -> None:
    documents = [*_documents(20, 1), Document("TEXT 3, piece 0.", "other"), Document("text 4 piece 0!", "other")]
    assert build_corpus("a", documents, CONFIG).duplicates == 2
    held = [Document("held", "h"), Document("Held.", "h")]
    assert build_corpus("a", documents, CONFIG, held).duplicates == 3


def test_all_pairs_of_a_table_of_comparisons_stay() -> None:
    """By hand: 60 × 60 ordered pairs with their answers, of which no two are one text."""
    pairs = [f"{a}{'<' if word == 'less' else '>'}{b} → {'yes' if (a < b) == (word == 'less') else 'no'}"
             for a in range(60) for b in range(60) for word in ("less", "more")]  # fmt: skip
    corpus = build_corpus("a", [Document(pair, f"u{i}") for i, pair in enumerate(pairs)], CONFIG)
    assert (len(corpus.train) + len(corpus.heldout), corpus.duplicates) == (7200, 0)


def test_lines_that_differ_in_vowel_signs_alone_stay() -> None:
    signs = ["", "ा", "ि", "ी", "ु", "ू", "े", "ै", "ो", "ौ"]
    lines = [f"द{a}न क{b}ल" for a in signs for b in signs]
    corpus = build_corpus("a", [Document(line, line) for line in lines], CONFIG)
    assert len(corpus.train) + len(corpus.heldout) == len(set(lines)) == 100


def test_two_forms_of_one_text_are_never_on_both_sides() -> None:
    texts = [f"élève numéro {n} répété" for n in range(40)]
    decomposed = [unicodedata.normalize("NFD", text) for text in texts[:20]]
    documents = [Document(text, text) for text in [*texts, *decomposed]]
    corpus = build_corpus("a", documents, SourceConfig(files="unused", heldout_fraction=0.5))
    sides = [{unicodedata.normalize("NFC", d.text) for d in side} for side in (corpus.train, corpus.heldout)]
    assert corpus.duplicates == 20 and not sides[0] & sides[1] and len(sides[0] | sides[1]) == 40


def test_half_duplicates_pass_and_more_do_not() -> None:
    build_corpus("a", _documents(10, 1) * 2, CONFIG)
    with pytest.raises(DataError, match=r"^20 of 30 documents are duplicates"):
        build_corpus("a", _documents(10, 1) * 3, CONFIG)


def test_cap_takes_whole_units_and_is_filled() -> None:
    documents = [Document(f"{unit:03}-{piece}" * 10, f"unit{unit}") for unit in range(100) for piece in range(2)]
    corpus = build_corpus("a", documents, SourceConfig(files="unused", max_bytes=1000))
    kept = [*corpus.train, *corpus.heldout]
    assert sum(document.num_bytes for document in kept) == 1000  # units of 2 * 50 bytes
    assert len({document.source for document in kept}) == 10
    assert corpus.heldout


def test_cap_leaves_a_unit_on_each_side() -> None:
    corpus = build_corpus("a", _documents(9), SourceConfig(files="unused", max_bytes=1))
    assert (len(corpus.train), len(corpus.heldout)) == (2, 2)


def test_explicit_heldout_is_neither_split_nor_capped() -> None:
    heldout = [Document(f"held {n}", f"h{n}") for n in range(5)]
    corpus = build_corpus("a", _documents(4), SourceConfig(files="unused", max_bytes=40), heldout)
    assert len(corpus.heldout) == 5
    assert sum(document.num_bytes for document in corpus.train) == 28  # one unit of two documents of 14 bytes


def test_training_document_in_the_heldout_set_is_named() -> None:
    train = [Document("one", "a", "t.jsonl:1"), Document("Two!", "b", "t.jsonl:2")]
    with pytest.raises(DataError, match=r"^t\.jsonl:2: .* also in the held-out set \(h\.jsonl:7\)"):
        build_corpus("a", train, CONFIG, [Document("two", "c", "h.jsonl:7")])


def test_no_documents() -> None:
    with pytest.raises(DataError, match="too few"):
        build_corpus("a", [], CONFIG)
    with pytest.raises(DataError, match="no held-out documents"):
        build_corpus("a", _documents(3), CONFIG, [])


def test_letters_of_ascii_are_those_of_any_text() -> None:
    text = "".join(map(chr, range(128))) * 2 + "The QUICK_brown fox, 12<3!"
    # A character beyond ASCII takes the other way.
    assert letters(text) == letters(text + "…") and letters(text).endswith("thequickbrownfox123")
