"""Shuffled documents: the control that tells text from noise.

A model can learn the frequencies of noise, but noise is as likely in any order, while text is not. By how much a
probe's loss rises on shuffled documents is what their order is worth to it. Words drawn at random are not noise in this
sense: their spelling is order.
"""

from __future__ import annotations

import numpy as np


def shuffled_text(text: str, *, rng: np.random.Generator) -> str:
    """The same characters in a random order."""
    # Characters, which the caller tokenizes anew. Shuffled tokens would betray noise as well, since a tokenizer never
    # writes two tokens that it would have merged, and the bytes of one character stand in a strict order.
    return "".join(text[i] for i in rng.permutation(len(text)))
