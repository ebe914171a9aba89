"""The generation whose experts each chunk of training text uses.

Where generations predict together, each of them reads a whole text: what a stage learns is its own generation's from
the first token on. Where one is selected, text is assigned to generations by
:meth:`~lifelong_moe.model.transformer.LanguageModel.domain_ids`, each chunk by what precedes it
(:func:`lifelong_moe.clustering.unigrams.prefix_generations` decides), and training text gets the same ids, but for the
first chunk of each document that the stage learns.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.config.routing.base import Bundles
from lifelong_moe.data.tokens.blocks import RowSource
from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.spec import StageSpec


def training_domain_ids(
    model: LanguageModel, spec: StageSpec, shard: TokenShard, name: str
) -> NDArray[np.integer] | None:
    """Generation (or document cluster, or label) of each token of the text that a stage learns, ``(num_tokens,)``.

    Args:
        model: Grown, its centroids fitted.
        spec: The stage.
        shard: Training text of a distribution that the stage learns.
        name: The distribution.

    Returns:
        In a mixture the generation that this stage trains. Else as ``model.domain_ids``, but the first chunk of a
        document belongs to that generation; None if routing has no domains.
    """
    architecture = model.architecture
    trained = len(architecture.generations) - 1 if spec.grow is not None else architecture.continued
    if architecture.mixture is not None and trained is not None:
        return np.full(shard.num_tokens, trained, np.min_scalar_type(trained))
    ids = model.domain_ids(shard, name)
    if ids is None or architecture.routing.bundles != Bundles.cluster or trained is None:
        return ids
    # No text precedes a first chunk, so evaluation and sampling give it to the first generation. That one is frozen and
    # would learn nothing from it, while in training the right generation is known.
    places = np.arange(shard.num_tokens) - np.repeat(shard.offsets[:-1], np.diff(shard.offsets))
    return np.where(places < architecture.routing.chunk_tokens, trained, ids).astype(ids.dtype)


def generated_source(model: LanguageModel, teacher: LanguageModel | None, rows: NDArray[np.int64]) -> RowSource:
    """Blocks that the parent's model wrote, with the generation of each token.

    Args:
        model: Trained on them.
        teacher: Distilled from, which knows fewer generations.
        rows: Tokens ``(N, S + 1)``.
    """
    bos = model.architecture.bos_id
    tokens = rows.flatten()
    # Every row begins with BOS, so no document runs on from one row into the next.
    begins = np.flatnonzero(tokens == bos)
    shard = TokenShard(tokens, np.append(begins, len(tokens)), np.zeros(len(begins), dtype=np.int64))
    # Written text belongs to no known distribution, hence the empty name.
    domains = (None if m is None else m.domain_ids(shard, "") for m in (model, teacher))
    return RowSource(rows, bos, *(None if ids is None else ids.reshape(rows.shape) for ids in domains))
