"""A document without its order: the control that tells text from noise.

Noise can be learned, as far as its frequencies go, but it is as likely in any order, while text is not. A probe's
loss on shuffled documents minus its loss on the same documents as they are says what order is worth to it. Words
drawn at random are not noise in this sense: how they are spelled is order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

MAX_CHARACTER_TOKENS = 4
"""Tokens that one character may take: UTF-8 has at most four bytes, and none is cut."""


def shuffled_document(
    token_ids: Sequence[int], decode: Callable[[Sequence[int]], str], *, rng: np.random.Generator
) -> list[int]:
    """Shuffle a document's tokens, keeping together those that only jointly make characters.

    The bytes of one character follow a strict order in noise as well: random Latin-1 letters, a lead byte and one
    more each, would pass for text if their bytes were shuffled.

    Args:
        token_ids: Tokens of one document, without BOS.
        decode: Text of token ids; a character cut in two shows as U+FFFD.
        rng: Of the permutation.

    Returns:
        The same tokens in another order, which cuts no character in two.
    """
    units: list[list[int]] = [[]]
    for token_id in token_ids:
        units[-1].append(int(token_id))
        if len(units[-1]) == MAX_CHARACTER_TOKENS or "\ufffd" not in decode(units[-1]):
            units.append([])
    return [token_id for unit in rng.permutation(len(units)) for token_id in units[unit]]
