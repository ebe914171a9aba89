"""Forgetting, backward and forward transfer from the loss matrix.

``R[i, j]`` is the held-out loss on distribution j after stage i. Trained distributions are the first columns, in the
order of first use; later columns were only evaluated and have no forgetting. All functions are pure, in the unit of
``R``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def forgetting(matrix: ArrayLike, learned_after: list[int]) -> NDArray[np.float64]:
    """``R[last, j] − R[j, j]`` per trained distribution; positive means worse than right after learning it.

    Args:
        matrix: ``R``, shape (stages, distributions).
        learned_after: For each trained distribution, in column order, the last stage that trained on it.

    Returns:
        One value per trained distribution; 0 for those that the last stage learned.
    """
    # A distribution that comes back is forgotten anew: its last training, not its first, is the reference.
    r = np.asarray(matrix, dtype=np.float64)
    return np.array([r[-1, j] - r[i, j] for j, i in enumerate(learned_after)])


def backward_transfer(matrix: ArrayLike, learned_after: list[int]) -> float | None:
    """Mean over earlier distributions of ``R[j, j] − R[last, j]``; positive means that later stages improved them.

    None with a single stage.
    """
    last = len(np.asarray(matrix)) - 1
    # No stage came after what the last one learned.
    values = [-f for f, i in zip(forgetting(matrix, learned_after), learned_after, strict=True) if i < last]
    return float(np.mean(values)) if values else None


def forward_transfer(matrix: ArrayLike, init: ArrayLike, first_learned: list[int]) -> float | None:
    """Mean over later distributions of ``R_init[j] − R[j−1, j]``; positive means that earlier stages helped.

    Args:
        matrix: ``R``.
        init: Loss of the untrained model per distribution.
        first_learned: For each trained distribution, in column order, the first stage that trained on it.

    Returns:
        None with a single stage.
    """
    r, r_init = np.asarray(matrix, dtype=np.float64), np.asarray(init, dtype=np.float64)
    # Measured just before the first training: what any later stage adds is not transfer from earlier ones.
    values = [r_init[j] - r[i - 1, j] for j, i in enumerate(first_learned) if i > 0]
    return float(np.mean(values)) if values else None
