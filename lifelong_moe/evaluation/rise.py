"""How far a loss on the same excerpts has risen, and whether noise explains it.

Legend: N excerpts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ERRORS = 3.0
"""Standard errors that a rise must exceed. With eight excerpts, chance does that once in a hundred looks (Student's t
with seven degrees of freedom, one-sided)."""
LEAST = 0.01
"""Bits per byte that it must exceed as well: less is not worth a word, however sure it is."""


@dataclass(frozen=True)
class Rise:
    """The difference of two losses on one text, in bits per byte."""

    bits_per_byte: float
    """Positive is worse."""
    error: float
    """Its standard error over excerpts; infinite if there is only one."""

    @property
    def is_real(self) -> bool:
        """Whether it is more than noise, and than nothing."""
        return self.bits_per_byte > max(LEAST, ERRORS * self.error)


def paired_rise(
    before_N: NDArray[np.float64], after_N: NDArray[np.float64], tokens_N: NDArray[np.int64], num_bytes: int
) -> Rise:
    """The rise from one model's loss to another's.

    Pairs cancel what makes one excerpt harder than another. Excerpts and not tokens are the sample: the tokens of one
    document rise and fall together.

    Args:
        before_N: Summed cross-entropy of each excerpt in nats.
        after_N: The same of the other model.
        tokens_N: Scored tokens of each.
        num_bytes: Of their text.

    Source:
        The standard error of a ratio of sums (Cochran, Sampling Techniques, 3rd edition, eq. 6.13).
    """
    differences_N, num = after_N - before_N, len(tokens_N)
    mean = differences_N.sum() / tokens_N.sum()
    to_bits = 1 / (math.log(2) * num_bytes)
    if num < 2:
        return Rise(float(differences_N.sum() * to_bits), math.inf)
    residuals_N = differences_N - mean * tokens_N
    error = math.sqrt(num / (num - 1) * float((residuals_N**2).sum()))
    return Rise(float(differences_N.sum() * to_bits), error * to_bits)
