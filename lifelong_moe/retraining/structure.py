"""A document without its order: the control that tells text from noise.

Noise can be learned, as far as its frequencies go, but it is as likely in any order, while text is not. What a probe
loses on documents whose characters were shuffled says what order is worth to it. The *characters* are shuffled, and the
result tokenized anew: shuffled tokens would betray noise as well, since a tokenizer never writes what it would have
merged, and the bytes of one character stand in a strict order. Words drawn at random are not noise in this sense: how
they are spelled is order.
"""

from __future__ import annotations

import numpy as np


def shuffled_text(text: str, *, rng: np.random.Generator) -> str:
    """The same characters in another order, each order as likely."""
    return "".join(text[i] for i in rng.permutation(len(text)))
