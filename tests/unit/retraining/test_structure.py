"""Shuffled text: the same characters, every order as likely."""

from __future__ import annotations

import numpy as np
import pytest

from lifelong_moe.retraining.structure import shuffled_text


def shuffle(text: str, seed: int = 0) -> str:
    return shuffled_text(text, rng=np.random.default_rng(seed))


@pytest.mark.parametrize("text", ["plain letters", "grüße, naïve", "漢字かな交じり", "🙂🙃 ab", "a", ""])
def test_the_same_characters(text: str) -> None:
    assert all(sorted(shuffle(text, seed)) == sorted(text) for seed in range(20))


def test_every_order_is_as_likely() -> None:
    orders = [shuffle("äbc", seed) for seed in range(600)]
    assert {order: orders.count(order) >= 70 for order in sorted(set(orders))} == dict.fromkeys(
        ["bcä", "bäc", "cbä", "cäb", "äbc", "äcb"], True
    )


def test_the_same_generator_gives_the_same() -> None:
    assert shuffle("some more letters", 1) == shuffle("some more letters", 1) != shuffle("some more letters", 2)
