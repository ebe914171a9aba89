"""Add tokens to a tokenizer: byte-pair encoding goes on where it ended, on other text, and no old token changes.

Merges are applied in the order in which they were learned. Those added here come last, so a text is first cut as
before, and then adjacent tokens of a word are joined: a new token always stands for a row of old ones, its *pieces*.

Source:
    Byte-pair encoding of words (arXiv:1508.07909), continued. As there a pair is counted within words, as often as the
    word comes; equal counts go to the pair of smaller ids.
"""

from __future__ import annotations

import heapq
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lifelong_moe.data.text.documents import Corpus
from lifelong_moe.data.tokens.tokenizer import Tokenizer, cached_tokenizer
from lifelong_moe.errors import ConfigError
from lifelong_moe.storage.keys import canonical_json

MERGES_VERSION = 1
"""Raised whenever the same text would yield other tokens."""
LEAST = 2
"""Fewest occurrences of a pair that becomes a token."""
_BATCH = 1_000
"""Documents encoded at a time."""
_CHECKED = 200
"""Documents on which the new tokenizer is compared with the old one."""
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's space, with which a word begins; its tokenizers cut text into no words themselves."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""SentencePiece's name of a byte without a token."""


def with_added_tokens(tokenizer: Tokenizer, corpus: Corpus, number: int, first: int, cache: Path) -> Tokenizer:
    """A tokenizer with tokens added for a text, made once per tokenizer and text.

    Args:
        tokenizer: Byte-pair encoding; its tokens keep their ids.
        corpus: The new text, of which the held-out documents are not looked at.
        number: Tokens wanted. A small text yields fewer.
        first: Id of the first one, above all that there are. Rows of an embedding without a token stay without.
        cache: Directory of trained tokenizers.

    Raises:
        ConfigError: The tokenizer is no byte-pair encoding that can go on, or the text has no pair twice.
    """
    identity = {"continues": tokenizer.hash, "train_hash": corpus.train_hash, "add": number, "first": first}

    def make() -> Tokenizer:
        return add_tokens(tokenizer, [document.text for document in corpus.train], number, first)

    identity |= {"version": MERGES_VERSION, "bos_id": tokenizer.bos_id}
    return cached_tokenizer(identity, cache, corpus.mode, make, bos_id=tokenizer.bos_id)


def add_tokens(tokenizer: Tokenizer, texts: Sequence[str], number: int, first: int) -> Tokenizer:
    """Learn new tokens; arguments and errors as for :func:`with_added_tokens`."""
    content = json.loads(tokenizer.text)
    model = _require_continuable(content)
    names = {token: name for name, token in model["vocab"].items()}
    merges = learn_merges(_words(tokenizer, texts, content), names, number, first)
    if not merges:
        raise ConfigError(f"vocabulary.add={number}: no two tokens of the text stand side by side in a word twice.")
    # Earlier versions of the format write both halves as one text.
    joined = bool(model["merges"]) and isinstance(model["merges"][0], str)
    for token, (left, right) in enumerate(merges, start=first):
        pair = [names[left], names[right]]
        model["merges"].append(" ".join(pair) if joined else pair)
        names[token] = "".join(pair)
        model["vocab"][names[token]] = token
    found = Tokenizer.from_text(canonical_json(content), tokenizer.bos_id)
    _require_same_cuts(tokenizer, found, texts[:_CHECKED], first)
    return found


def learn_merges(
    words: Mapping[tuple[int, ...], int], names: Mapping[int, str], number: int, first: int
) -> list[tuple[int, int]]:
    """The pairs of tokens that byte-pair encoding merges next, in order.

    Args:
        words: Token ids of each different word, and how often it comes.
        names: Texts of the tokens. A pair whose text has a token already is left alone, and stays two tokens.
        number: Merges wanted.
        first: Id of the first new token; the ``i``-th merge makes token ``first + i``.
    """
    spelled, counts = [list(word) for word in words], list(words.values())
    names, taken = dict(names), set(names.values())
    totals: Counter[tuple[int, int]] = Counter()
    places: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for i, word in enumerate(spelled):
        _count(word, i, counts[i], totals, places)
    queue = [(-total, pair) for pair, total in totals.items()]
    heapq.heapify(queue)
    merges: list[tuple[int, int]] = []
    while queue and len(merges) < number:
        negative, pair = heapq.heappop(queue)
        if totals[pair] != -negative:
            # Other merges took some of its places; a count only falls, so it goes back to where it belongs.
            heapq.heappush(queue, (-totals[pair], pair))
            continue
        if -negative < LEAST:
            break
        if (name := names[pair[0]] + names[pair[1]]) in taken:
            continue
        token = first + len(merges)
        merges.append(pair)
        names[token] = name
        taken.add(name)
        touched: set[tuple[int, int]] = set()
        for i in places.pop(pair):
            _count(spelled[i], i, -counts[i], totals, places)
            spelled[i] = _merged(spelled[i], pair, token)
            touched |= {one for one in pairwise(spelled[i]) if token in one}
            _count(spelled[i], i, counts[i], totals, places)
        for one in touched:
            heapq.heappush(queue, (-totals[one], one))
    return merges


def _count(
    word: list[int],
    i: int,
    number: int,
    totals: Counter[tuple[int, int]],
    places: defaultdict[tuple[int, int], set[int]],
) -> None:
    for pair in pairwise(word):
        totals[pair] += number
        if number > 0:
            places[pair].add(i)


def _merged(word: list[int], pair: tuple[int, int], token: int) -> list[int]:
    found: list[int] = []
    i = 0
    while i < len(word):
        is_pair = word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]
        found.append(token if is_pair else word[i])
        i += 2 if is_pair else 1
    return found


def pieces_of(tokenizer: Tokenizer, first: int) -> list[list[int]]:
    """For each token from ``first`` on, the row of tokens below ``first`` that it stands for."""
    model = json.loads(tokenizer.text)["model"]
    pieces: dict[int, list[int]] = {}
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if (token := model["vocab"][left + right]) >= first:
            halves = (model["vocab"][half] for half in (left, right))
            pieces[token] = [piece for half in halves for piece in pieces.get(half, [half])]
    return [pieces[token] for token in sorted(pieces)]


def _require_continuable(content: Mapping[str, Any]) -> Any:
    model = content["model"]
    if "merges" not in model or model.get("type", "BPE") != "BPE":
        raise ConfigError(
            f"vocabulary.add continues a tokenizer of byte-pair encoding (BPE); this one is {model.get('type')}."
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ConfigError(f"vocabulary.add does not continue a tokenizer with model.{key}={str(model[key])[:20]}.")
    return model


def _words(tokenizer: Tokenizer, texts: Sequence[str], content: Mapping[str, Any]) -> Counter[tuple[int, ...]]:
    """How often each word comes, as a row of token ids; what may not be merged divides words."""
    model = content["model"]
    added = {token["id"] for token in content.get("added_tokens") or ()}
    names = {token: name for name, token in model["vocab"].items() if name != model.get("unk_token")}
    mergeable = {token for token, name in names.items() if token not in added and not _BYTE.fullmatch(name)}
    begins = {token for token in mergeable if names[token].startswith(_SPACE)}
    words: Counter[tuple[int, ...]] = Counter()
    for at in range(0, len(texts), _BATCH):
        for ids, numbers in tokenizer.encode_words(texts[at : at + _BATCH]):
            words.update(_cut(ids, numbers, mergeable, begins if content.get("pre_tokenizer") is None else set()))
    return words


def _cut(
    ids: Iterable[int], numbers: Iterable[int | None], mergeable: set[int], begins: set[int]
) -> Iterator[tuple[int, ...]]:
    word: list[int] = []
    before: int | None = None
    for token, number in zip(ids, numbers, strict=True):
        if number != before or token in begins or token not in mergeable:
            if len(word) > 1:
                yield tuple(word)
            word = []
        before = number
        if token in mergeable:
            word.append(token)
    if len(word) > 1:
        yield tuple(word)


def _require_same_cuts(old: Tokenizer, new: Tokenizer, texts: Sequence[str], first: int) -> None:
    """Require that new tokens stand for the old ones that were there, which readers of both rely on."""
    pieces = pieces_of(new, first)
    for before, after in zip(old.encode_batch(texts), new.encode_batch(texts), strict=True):
        spelled = [piece for token in after for piece in ([token] if token < first else pieces[token - first])]
        if spelled != before:
            raise ConfigError("vocabulary.add: this tokenizer cuts text in another way once merges are added to it.")
