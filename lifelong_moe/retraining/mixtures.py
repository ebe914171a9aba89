"""The mixture of known distributions that is nearest to new documents: a batch of several known kinds is no new kind.

Such a batch differs from each known distribution, and from all of them put together as well, if its shares are others.
So it is tested against old documents in the shares that fit it best, too.

Legend: S sources, D feature width, K known distributions.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import nnls

from lifelong_moe.retraining.drift import DocumentSample, source_means

SUM_WEIGHT = 1e3
"""How strictly shares sum to 1, against features in standard units."""


def nearest_shares(new: DocumentSample, old: Mapping[str, DocumentSample]) -> dict[str, float]:
    """Shares of the known distributions whose mixture has the mean features nearest to those of new documents.

    A linear classifier finds differences of means, so this mixture is the hardest to tell from the new documents.
    Means are over sources, in units of the features' standard deviation over all sources; shares are not negative and
    sum to 1.
    """
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
    """Documents of as many sources as make a mixture of these shares, by distribution: whole sources, drawn at random.

    At least one source of any distribution whose share is not 0 would be rounded to none if its share is small.

    Args:
        old: Documents of each known distribution.
        shares: They sum to 1.
        seed: Of the draw.

    Returns:
        Rows of each distribution's documents, ascending; distributions without any are left out.
    """
    rng, rows = np.random.default_rng(seed), {}
    names = {name: np.unique(np.array(side.sources)) for name, side in old.items()}
    total = min(len(names[name]) / share for name, share in shares.items() if share > 0)
    for name, share in shares.items():
        number = min(len(names[name]), round(total * share))
        if number:
            chosen = set(rng.choice(names[name], number, replace=False).tolist())
            rows[name] = [row for row, source in enumerate(old[name].sources) if source in chosen]
    return rows
