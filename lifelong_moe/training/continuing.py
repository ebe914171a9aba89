"""A committed stage's model as the next stage continues it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from lifelong_moe.config.routing.base import Bundles, Centroids, RoutingConfig
from lifelong_moe.config.routing.shared import TextClusterConfig
from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.data.tokens.shards import TokenizedCorpus
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.training.first_centroids import FIRST_CENTROIDS, first_centroids
from lifelong_moe.training.restore import build_model


def continued_model(
    store: StageStore,
    parent: CommittedStage,
    routing: RoutingConfig,
    corpora: Mapping[str, TokenizedCorpus],
    trainer: TrainerConfig,
) -> LanguageModel:
    """A committed stage's model with the routing of the stage that continues it, on the CPU.

    Args:
        store: Where the parent's tensors are.
        parent: The committed stage.
        routing: Of the stage that continues it.
        corpora: Tokenized text by distribution; read only if centroids of the first stage have to be fitted.
        trainer: Names the device on which a checkpoint writes text for them.
    """
    architecture, tensors, read = parent.architecture, store.forms(parent), partial(store.read_into, parent)
    # Losses are always the new stage's. Earlier versions stored coefficients of a mean over layers, not of a sum.
    was, now = architecture.routing.with_losses_of(routing), routing
    # With several generations, how to tell them apart is settled. With one, the new stage decides: its parent may have
    # been trained without bundles, or with centroids that nothing reads.
    if len(architecture.generations) > 1 or was.effective(grown=True) == now.effective(grown=True):
        return build_model(replace(architecture, routing=was), tensors, read)
    fitted = ("bundles", "centroids", "clusters", "feature_width")
    fits_alike = all(was.settings().get(key) == now.settings().get(key) for key in fitted)
    if was.bundles == Bundles.cluster and not fits_alike:
        tensors.pop(FIRST_CENTROIDS, None)  # fitted in another number or of other features
    if isinstance(now, TextClusterConfig) and now.bundles == Bundles.cluster and FIRST_CENTROIDS not in tensors:
        if now.centroids == Centroids.random:
            # Zeros stand for centroids that are not fitted, and random ones never are.
            tensors[FIRST_CENTROIDS] = torch.zeros(now.num_clusters(1), architecture.vocab_size)
        else:
            tensors |= store.tensors(first_centroids(store, store.chain(parent.key)[0], now, corpora, trainer))
    return build_model(replace(architecture, routing=now), tensors, read)
