"""Byte-pair encoding goes on: new tokens for rows of old ones, whose ids and cuts stay."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from lifelong_moe.data.text.documents import Corpus, Document, documents_hash
from lifelong_moe.data.tokens import merges as module
from lifelong_moe.data.tokens.merges import add_tokens, learn_merges, pieces_of, with_added_tokens
from lifelong_moe.data.tokens.tokenizer import Tokenizer, train_tokenizer
from lifelong_moe.errors import ConfigError

OLD = [f"apple pear plum {n} cherry ripe, sweet tree" for n in range(40)]
NEW = [f"Žluťoučký kůň {n} příšerně úpěl; ďábelské ódy, kůň úpěl" for n in range(40)]


def spelled(tokenizer: Tokenizer, ids: list[int], first: int) -> list[int]:
    """Ids with each new token replaced by its pieces."""
    pieces = pieces_of(tokenizer, first)
    return [piece for token in ids for piece in ([token] if token < first else pieces[token - first])]


def sentencepiece() -> Tokenizer:
    """As Llama 2's: a space is a letter, words are not cut beforehand, and bytes stand in for what has no token."""
    names = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"aelnp", "▁a", "pl"]
    content: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "<s>", "special": True, "single_word": False, "lstrip": False}
                         | {"rstrip": False, "normalized": False}],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": True, "fuse_unk": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False,
                  "vocab": {name: i for i, name in enumerate(names)}, "merges": [["▁", "a"], ["p", "l"]]},
    }  # fmt: skip
    return Tokenizer.from_text(json.dumps(content))


def test_merges_by_hand() -> None:
    # "ab" five times, "abc" three times, "bc" four times: ab comes 8 times, bc 7 times.
    words = {(0, 1): 5, (0, 1, 2): 3, (1, 2): 4}
    names = {0: "a", 1: "b", 2: "c"}
    # Once ab is joined, bc is left in "bc" alone, and abc comes three times.
    assert learn_merges(words, names, 9, 10) == [(0, 1), (1, 2), (10, 2)]
    assert learn_merges(words, names, 1, 10) == [(0, 1)]
    # A text that has a token already gets none; what comes once is no pair.
    assert learn_merges(words, names | {3: "ab"}, 9, 10) == [(1, 2), (0, 10)]
    assert learn_merges({(0, 1): 1}, names, 9, 10) == []


def test_equal_counts_go_to_smaller_ids_and_a_run_is_joined_from_the_left() -> None:
    names = {0: "a", 1: "b", 2: "c"}
    assert learn_merges({(2, 1): 2, (1, 0): 2}, names, 9, 10) == [(1, 0), (2, 1)]
    # aaaaa is aa aa a, and then aaaa a.
    assert learn_merges({(0,) * 5: 2}, names, 9, 10) == [(0, 0), (10, 0), (10, 11)]


def test_counts_are_those_of_a_recount() -> None:
    """Against the plain algorithm, which counts everything anew before each merge."""
    draw = random.Random(0)
    words = {tuple(draw.choices(range(4), k=draw.randint(2, 9))): draw.randint(1, 5) for _ in range(60)}
    names = {i: "abcd"[i] for i in range(4)}
    expected: list[tuple[int, int]] = []
    spelling, known = {word: list(word) for word in words}, dict(names)
    for token in count(10):
        totals: dict[tuple[int, int], int] = {}
        for word, number in words.items():
            for pair in zip(spelling[word], spelling[word][1:], strict=False):
                if known[pair[0]] + known[pair[1]] not in known.values():
                    totals[pair] = totals.get(pair, 0) + number
        best = min(totals, key=lambda pair: (-totals[pair], pair), default=None)
        if best is None or totals[best] < 2:
            break
        expected.append(best)
        known[token] = known[best[0]] + known[best[1]]
        spelling = {word: module._merged(ids, best, token) for word, ids in spelling.items()}
    assert len(expected) > 20 and learn_merges(words, names, 1000, 10) == expected


@pytest.mark.parametrize(
    "make", [lambda: train_tokenizer(OLD, 300), sentencepiece], ids=["byte level", "SentencePiece"]
)
def test_new_tokens_stand_for_rows_of_old_ones(make: Callable[[], Tokenizer]) -> None:
    old = make()
    first = old.vocab_size
    new = add_tokens(old, NEW if "BPE" in old.text and first == 300 else ["a planal plane"] * 3, 12, first)
    texts = [*OLD, *NEW, "a plane", "", "  spaces \n\t", "🙂 plan"]
    assert first < new.vocab_size <= first + 12 and new.bos_id == old.bos_id
    for text in texts:
        ids = new.encode(text)
        assert spelled(new, ids, first) == old.encode(text)
        assert new.decode(ids) == old.decode(old.encode(text))
    assert all(new.name(token) == old.name(token) for token in range(1, first))
    assert all(len(pieces) > 1 and max(pieces) < first for pieces in pieces_of(new, first))
    learned = sum(map(len, new.encode_batch(NEW if first == 300 else ["a planal plane"])))
    assert learned < sum(map(len, old.encode_batch(NEW if first == 300 else ["a planal plane"])))


def test_no_token_crosses_a_word_or_holds_a_byte_without_a_letter() -> None:
    new = add_tokens(sentencepiece(), ["a plan é a plan é"] * 5, 50, 400)
    names = [new._backend.id_to_token(token) for token in range(400, new.vocab_size)]
    assert "▁plan" in names
    assert not any("▁" in name[1:] or "<0x" in name for name in names)


def test_tokens_go_on_from_a_tokenizer_that_was_continued() -> None:
    old = train_tokenizer(OLD, 300)
    once = add_tokens(old, NEW, 5, 310)  # ten rows of the embedding have no token
    twice = add_tokens(once, NEW, 5, once.vocab_size)
    assert (once.vocab_size, once.num_tokens, twice.vocab_size) == (315, 305, 320)
    assert all(max(pieces) < 315 for pieces in pieces_of(twice, 315))
    assert spelled(twice, twice.encode(NEW[0]), 315) == once.encode(NEW[0])
    assert Tokenizer.stored(twice.text, 0).hash == twice.hash


def test_merges_written_as_one_text_stay_so() -> None:
    content = json.loads(train_tokenizer(OLD, 300).text)
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    new = add_tokens(Tokenizer.from_text(json.dumps(content)), NEW, 4, 300)
    assert all(isinstance(merge, str) for merge in json.loads(new.text)["model"]["merges"])
    assert len(pieces_of(new, 300)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Unigram"}, r"continues a tokenizer of byte-pair encoding \(BPE\); this one is Unigram"),
        ({"end_of_word_suffix": "</w>"}, r"does not continue a tokenizer with model\.end_of_word_suffix=</w>"),
        ({"continuing_subword_prefix": "##"}, r"with model\.continuing_subword_prefix=##"),
    ],
)
def test_other_tokenizers_are_refused_by_name(change: dict[str, str], message: str) -> None:
    content = json.loads(train_tokenizer(OLD, 300).text)
    content["model"] |= change
    with pytest.raises(ConfigError, match=message) as caught:
        module._require_continuable(content)
    assert caught.value.exit_code == 2


def test_a_text_without_a_pair_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"vocabulary\.add=4: no two tokens of the text stand side by side"):
        add_tokens(train_tokenizer(OLD, 300), ["a b c"], 4, 300)


def test_a_tokenizer_that_cuts_otherwise_with_more_merges_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = train_tokenizer(OLD, 300)
    pieces = pieces_of(add_tokens(old, NEW, 4, 300), 300)
    monkeypatch.setattr(module, "pieces_of", lambda *_: pieces[::-1])
    with pytest.raises(ConfigError, match="cuts text in another way"):
        add_tokens(old, NEW, 4, 300)


def test_they_are_learned_once_and_from_training_text_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = train_tokenizer(OLD, 300)

    def corpus(train: list[str], heldout: list[str]) -> Corpus:
        documents = [[Document(text, "s") for text in texts] for texts in (train, heldout)]
        return Corpus("new", *documents, train_hash=documents_hash(documents[0]), heldout_hash="h")

    made = with_added_tokens(old, corpus(NEW, OLD), 6, 300, tmp_path)
    monkeypatch.setattr(module, "add_tokens", None)
    assert with_added_tokens(old, corpus(NEW, NEW), 6, 300, tmp_path).hash == made.hash
    for number, first in ((7, 300), (6, 301)):
        with pytest.raises(TypeError):
            with_added_tokens(old, corpus(NEW, OLD), number, first, tmp_path)
