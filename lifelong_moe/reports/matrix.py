"""The loss matrix and what follows from it: forgetting, backward and forward transfer.

``R[i, j]`` is the held-out loss on distribution j after stage i. Columns 0..n-1 belong to the stages in order;
further columns (never trained) have no forgetting. All functions are pure and in the unit of ``R``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def forgetting(matrix: ArrayLike, learned_after: list[int]) -> NDArray[np.float64]:
    """``R[last, j] − R[j, j]`` per trained distribution: positive = worse than right after it was learned.

    Args:
        matrix: ``R``, shape (stages, distributions).
        learned_after: For each trained distribution, in column order, the last stage that trained it.

    Returns:
        One value a trained distribution; 0 for the one that the last stage learned.
    """
    r = np.asarray(matrix, dtype=np.float64)
    return np.array([r[-1, j] - r[i, j] for j, i in enumerate(learned_after)])


def backward_transfer(matrix: ArrayLike, learned_after: list[int]) -> float | None:
    """Mean over earlier distributions of ``R[j, j] − R[last, j]``: positive = later stages improved them.

    None with a single stage: there is nothing to look back on.
    """
    last = len(np.asarray(matrix)) - 1
    values = [-f for f, i in zip(forgetting(matrix, learned_after), learned_after, strict=True) if i < last]
    return float(np.mean(values)) if values else None


def forward_transfer(matrix: ArrayLike, init: ArrayLike, first_learned: list[int]) -> float | None:
    """Mean over distributions from the second on of ``R_init[j] − R[j−1, j]``: what earlier stages taught of it.

    Args:
        matrix: ``R``.
        init: Loss of the untrained model per distribution.
        first_learned: For each trained distribution, the first stage that trained it.

    Returns:
        None with a single stage.
    """
    r, r_init = np.asarray(matrix, dtype=np.float64), np.asarray(init, dtype=np.float64)
    values = [r_init[j] - r[i - 1, j] for j, i in enumerate(first_learned) if i > 0]
    return float(np.mean(values)) if values else None
