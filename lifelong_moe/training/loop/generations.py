"""The generation whose experts each chunk of training text uses.

Where generations predict together, each of them reads a whole text: what a stage learns is its own generation's from
the first token on. Where one is selected, text is assigned to generations by
:meth:`~lifelong_moe.model.transformer.LanguageModel.domain_ids`, each chunk by what precedes it
(:func:`lifelong_moe.clustering.unigrams.prefix_generations` decides, once for a corpus), and training text gets the
same ids, but for the first chunk of each document that the stage learns.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.clustering.chunks import ChunkDomains
from lifelong_moe.config.routing.base import Bundles
from lifelong_moe.data.tokens.blocks import Domains, RowSource
from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.model.domains import CorpusDomains, same_domain
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.spec import StageSpec


def training_domains(
    model: LanguageModel, spec: StageSpec, shard: TokenShard, name: str, domains_of: CorpusDomains
) -> Domains | None:
    """Generation (or document cluster, or label) of each token of the text that a stage learns, ``(num_tokens,)``.

    Args:
        model: Grown, its centroids fitted.
        spec: The stage.
        shard: Training text of a distribution that the stage learns.
        name: The distribution.
        domains_of: The model's.

    Returns:
        In a mixture the generation that this stage trains. Else as ``model.domain_ids``, but the first chunk of a
        document belongs to that generation; None if routing has no domains.
    """
    architecture = model.architecture
    trained = len(architecture.generations) - 1 if spec.grow is not None else architecture.continued
    if architecture.mixture is not None and trained is not None:
        return same_domain(trained, shard.num_tokens)
    domains = domains_of.of(shard, name)
    if not isinstance(domains, ChunkDomains) or architecture.routing.bundles != Bundles.cluster or trained is None:
        return domains
    # No text precedes a first chunk, so evaluation and sampling give it to the first generation. That one is frozen and
    # would learn nothing from it, while in training the right generation is known.
    return replace(domains, first=trained)


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
