from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from lifelong_moe.retraining.structure import shuffled_document


def decode(token_ids: Sequence[int]) -> str:
    """Each byte is a token."""
    return bytes(token_ids).decode("utf-8", errors="replace")


def shuffle(text: str, seed: int = 0) -> str:
    ids = shuffled_document(list(text.encode()), decode, rng=np.random.default_rng(seed))
    return bytes(ids).decode("utf-8")  # strict: a character cut in two would raise


@pytest.mark.parametrize("text", ["plain letters", "grüße, naïve", "漢字かな交じり", "🙂🙃 ab", ""])
def test_characters_are_shuffled_whole(text: str) -> None:
    assert all(sorted(shuffle(text, seed)) == sorted(text) for seed in range(20))


def test_every_order_is_as_likely() -> None:
    orders = [shuffle("äbc", seed) for seed in range(600)]
    assert {order: orders.count(order) >= 70 for order in sorted(set(orders))} == dict.fromkeys(
        ["bcä", "bäc", "cbä", "cäb", "äbc", "äcb"], True
    )


def test_the_same_generator_gives_the_same() -> None:
    assert shuffle("some more letters", 1) == shuffle("some more letters", 1) != shuffle("some more letters", 2)


def test_tokens_of_several_characters_stay_as_they_are() -> None:
    words = {1: "one", 2: "two", 3: "three"}
    ids = [1, 2, 3, 3]
    found = shuffled_document(ids, lambda part: "".join(words[i] for i in part), rng=np.random.default_rng(0))
    assert sorted(found) == ids


def test_a_replacement_character_in_the_text_ends_nothing_but_its_own_unit() -> None:
    # U+FFFD has three bytes, and decodes as what is cut would; it takes one more token along, and the rest is free.
    found = [shuffle("\ufffdabc", seed) for seed in range(50)]
    assert set(found) == {"\ufffdabc", "\ufffdacb", "b\ufffdac", "c\ufffdab", "bc\ufffda", "cb\ufffda"}
