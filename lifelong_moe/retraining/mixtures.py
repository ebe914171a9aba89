"""The mixture of known distributions that is nearest to new documents.

A batch that mixes known distributions is no new one, but it differs from each of them, and from all of them together
in other shares. So drift is also tested against old documents in the shares that fit the batch best.

Legend: S sources, D feature width, K known distributions.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lifelong_moe.retraining.drift import DocumentSample, source_means

# nnls has no equality constraint: a heavy extra row stands in for it, beside features in standard units.
SUM_WEIGHT = 1e3
"""Weight of the equation that shares sum to 1."""


def nearest_shares(new: DocumentSample, old: Mapping[str, DocumentSample]) -> dict[str, float]:
    """Shares of known distributions whose mixture has the mean features nearest to those of new documents.

    Means are over sources, in units of the features' standard deviation over all sources; shares are at least 0 and
    sum to 1.
    """
    from scipy.optimize import nnls  # on use, as in ``bounds.py``

    # Means suffice: the drift test's classifier is linear, so this mixture is the hardest for it to tell apart.
    sides_SD = []
    for side in (new, *old.values()):
        _, source_N = np.unique(np.array(side.sources), return_inverse=True)
        sides_SD.append(source_means(side.features_ND, source_N))
    deviation_D = np.concatenate(sides_SD).std(axis=0)
    means_D = [side.mean(axis=0) / np.where(deviation_D > 0, deviation_D, 1.0) for side in sides_SD]
    matrix_DK = np.stack([np.append(mean_D, SUM_WEIGHT) for mean_D in means_D[1:]], axis=1)
    shares_K, _ = nnls(matrix_DK, np.append(means_D[0], SUM_WEIGHT))
    return {name: float(share) for name, share in zip(old, shares_K / shares_K.sum(), strict=True)}


def draw_mixture(old: Mapping[str, DocumentSample], shares: Mapping[str, float], *, seed: int) -> dict[str, list[int]]:
    """Draw whole sources at random so that their numbers make a mixture of these shares.

    A small share may be rounded to no source.

    Args:
        old: Documents of each known distribution.
        shares: By distribution; they sum to 1.
        seed: Of the draw.

    Returns:
        Rows of each distribution's documents, ascending; distributions without rows are left out.
    """
    rng, rows = np.random.default_rng(seed), {}
    names = {name: np.unique(np.array(side.sources)) for name, side in old.items()}
    # The largest mixture: some distribution gives all its sources.
    total = min(len(names[name]) / share for name, share in shares.items() if share > 0)
    for name, share in shares.items():
        number = min(len(names[name]), round(total * share))
        if number:
            chosen = set(rng.choice(names[name], number, replace=False).tolist())
            rows[name] = [row for row, source in enumerate(old[name].sources) if source in chosen]
    return rows
