"""Who owns a token, and that nothing in a text can break out of a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lifelong_moe.data.tokens.tokenizer import train_tokenizer
from lifelong_moe.evaluation.probing import Observation
from lifelong_moe.evaluation.routed_text import RoutedText, describe, route_text, token_pieces
from lifelong_moe.plan.architecture import Architecture

Make = Callable[..., Architecture]
TEXTS = {1: "<b>", 2: '"&\n', 3: "\x1b[31m"}


def decode(ids: Sequence[int]) -> str:
    return "".join(TEXTS[i] for i in ids)


def routed(make_architecture: Make, layer: int | None) -> RoutedText:
    """Three tokens, two layers of 2 + 2 experts of stages s0 and s1."""
    seen = Observation(
        document_T=np.zeros(3, dtype=np.int64),
        position_T=np.arange(1, 4),
        token_ids_T=np.array([1, 2, 3]),
        expert_ids=[np.array([[0, 2], [1, 0], [2, 3]]), np.array([[3, 1], [0, 2], [0, 1]])],
        weights=[np.array([[0.6, 0.4], [0.2, 0.8], [0.5, 0.5]]), np.array([[0.7, 0.3], [0.5, 0.5], [0.4, 0.6]])],
    )
    return route_text(make_architecture("learned", (2, 2)), seen, decode, layer)


def test_of_a_layer_the_heaviest_expert_owns_a_token(make_architecture: Make) -> None:
    first = routed(make_architecture, 0)
    assert first.owners == ["s0/L0/E0", "s0/L0/E1", "s1/L0/E2", "s1/L0/E3"]
    assert [token.owner for token in first.tokens] == [0, 0, 2] and first.counts == [2, 0, 1, 0]
    assert "heaviest expert of layer 0" in first.rule
    assert first.tokens[1].experts == [[("s0/L0/E0", 0.8), ("s0/L0/E1", 0.2)]]


def test_of_the_model_the_heaviest_stage_owns_a_token(make_architecture: Make) -> None:
    whole = routed(make_architecture, None)
    assert whole.owners == ["s0", "s1"]
    # s0 has 0.6 + 0.3 of token 0, 1.0 + 0.5 of token 1, and an even 1.0 of token 2, where the older one wins.
    assert [token.owner for token in whole.tokens] == [1, 0, 0]
    assert describe(whole, whole.tokens[0]) == "s0/L0/E0 0.600, s1/L0/E2 0.400\ns1/L1/E3 0.700, s0/L1/E1 0.300"


def test_where_another_owner_begins(make_architecture: Make) -> None:
    assert routed(make_architecture, None).begins() == [True, True, False]
    assert RoutedText(["s0"], [0], []).begins() == []


def test_pieces_are_the_whole_text_and_whole_characters() -> None:
    text = "the naïve 漢字 🙂 of a tree\n\tand more"
    tokenizer = train_tokenizer(["the tree and more of a tree and the more"] * 3, 280)
    ids = tokenizer.encode(text)
    pieces = token_pieces(ids, tokenizer.decode)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    assert "漢" in pieces and "\N{REPLACEMENT CHARACTER}" not in "".join(pieces) and "" in pieces


def test_an_unfinished_character_at_the_end_is_shown_as_such() -> None:
    tokenizer = train_tokenizer(["abc"], 257)
    ids = tokenizer.encode("a漢")
    assert token_pieces(ids[:-1], tokenizer.decode)[-1] == "\N{REPLACEMENT CHARACTER}"
