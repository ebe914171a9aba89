"""Models of committed stages: as they are, or as the next stage goes on with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lifelong_moe.config.routing.base import Bundles, Centroids, RoutingConfig
from lifelong_moe.config.routing.shared import TextClusterConfig
from lifelong_moe.data.tokens.shards import TokenizedCorpus
from lifelong_moe.model.transformer import LanguageModel, initialize
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.training.first_centroids import FIRST_CENTROIDS, first_centroids


def load_model(store: StageStore, stage: CommittedStage) -> LanguageModel:
    """The model as a stage committed it, on the CPU."""
    return build_model(stage.architecture, store.tensors(stage))


def build_model(architecture: Architecture, tensors: Mapping[str, Tensor]) -> LanguageModel:
    """A model of stored tensors, on the CPU."""
    model = LanguageModel(architecture)
    model.load_state_dict(tensors, strict=True)
    return model


def initial_model(architecture: Architecture, seed: int) -> LanguageModel:
    """The untrained model that a first stage begins with."""
    model = LanguageModel(architecture)
    initialize(model, seed)
    return model


def continued_model(
    store: StageStore, parent: CommittedStage, routing: RoutingConfig, corpora: Mapping[str, TokenizedCorpus]
) -> LanguageModel:
    """A committed stage's model, as a stage with this routing goes on with it.

    What tells generations apart is this stage's to say while there is one: the parent may have been trained without
    bundles, or left centroids that nothing needs. Losses are always this stage's: an earlier version's coefficients
    were factors of a mean over layers.
    """
    architecture, tensors = parent.architecture, store.tensors(parent)
    was, now = architecture.routing.with_losses_of(routing), routing
    if len(architecture.generations) > 1 or was.effective(grown=True) == now.effective(grown=True):
        return build_model(replace(architecture, routing=was), tensors)
    fitted = ("bundles", "centroids", "clusters", "feature_width")
    fits_alike = all(was.settings().get(key) == now.settings().get(key) for key in fitted)
    if was.bundles == Bundles.cluster and not fits_alike:
        tensors.pop(FIRST_CENTROIDS, None)
    if isinstance(now, TextClusterConfig) and now.bundles == Bundles.cluster and FIRST_CENTROIDS not in tensors:
        if now.centroids == Centroids.random:
            tensors[FIRST_CENTROIDS] = torch.zeros(now.num_clusters(1), architecture.vocab_size)
        else:
            tensors |= store.tensors(first_centroids(store, store.chain(parent.key)[0], now, corpora))
    return build_model(replace(architecture, routing=now), tensors)
