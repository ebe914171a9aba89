"""Fit the centroids that route a stage, before it trains. FAISS does the clustering; routers only apply it.

Legend: N tokens, V vocabulary, F feature width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lifelong_moe.clustering.balanced import balanced_kmeans
from lifelong_moe.clustering.documents import document_features, fit_tfidf
from lifelong_moe.clustering.kmeans import spherical_kmeans
from lifelong_moe.clustering.tokens import token_embedding
from lifelong_moe.growth.observe import observe
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.routing.cluster import TokenClusterRouter
from lifelong_moe.routing.config import Features, Level

FIT_DOCUMENTS = 4096


def fit_token_clusters(
    model: LanguageModel, stream: NDArray[np.integer], sample: Mapping[str, Tensor], seed: int
) -> None:
    """Set the newest centroids of every layer; older centroids take their points first and stay as they are.

    Layers are fitted from the bottom up, and each sees what the layers below it, already clustered, make of the
    sample; with frozen embedding features they differ by their seed alone.

    Args:
        model: With a generation whose centroids are not set yet.
        stream: Token ids of the stage's training text; the frozen embedding is made of the first stage's.
        sample: Blocks of it, for hidden states.
        seed: Of the embedding and of every clustering.
    """
    routing = model.architecture.routing
    if routing.features == Features.embedding:
        table: Tensor = model.token_features  # type: ignore[assignment]
        if not bool(table.any()):
            fitted = token_embedding(stream, len(table), routing.feature_width, seed=seed)
            table[:, : fitted.shape[1]] = torch.from_numpy(fitted)
        features_NF = table[torch.from_numpy(stream[: routing.sample_tokens].astype(np.int64))].cpu().numpy()
    for i, layer in enumerate(model.moe_layers()):
        router = layer.router
        assert isinstance(router, TokenClusterRouter)
        if routing.features == Features.hidden:
            features_NF = observe(model, sample)[i].inputs_ND.numpy()
        old = [c.cpu().numpy() for c in router.centroids()[:-1]]
        fixed = np.concatenate(old) if old else None
        centroids = spherical_kmeans(features_NF, router.generations[-1], seed=seed + i, fixed_KD=fixed)
        router.set_rows(torch.from_numpy(centroids))


def fit_document_clusters(model: LanguageModel, documents: Sequence[NDArray[np.integer]], seed: int) -> None:
    """Set the newest document centroids from whole training documents; the projection is the first stage's.

    Args:
        model: With document clusters whose newest generation is not set yet.
        documents: Token ids of the stage's training documents; at most 4,096 of them, evenly spread, are used.
        seed: Of the SVD and the clustering.
    """
    clusters = model.document_clusters
    assert clusters is not None
    documents = documents[:: -(-len(documents) // FIT_DOCUMENTS)]
    projection: Tensor = clusters.projection  # type: ignore[assignment]
    if not bool(projection.any()):
        clusters.set_projection(fit_tfidf(documents, len(projection), clusters.width, seed=seed))
    features = document_features(documents, projection.cpu().numpy())
    groups: int = len(getattr(clusters, f"centroids_{clusters.generations - 1}"))
    clusters.set_centroids(balanced_kmeans(features, groups, seed=seed)[0])


def fit_clusters(
    model: LanguageModel,
    documents: Sequence[NDArray[np.integer]],
    stream: NDArray[np.integer],
    sample: Mapping[str, Tensor],
    seed: int,
) -> None:
    """Fit whatever ``routing`` asks for; nothing unless ``routing.mode=cluster``."""
    if model.architecture.routing.mode != "cluster":
        return
    if model.architecture.routing.level == Level.token:
        fit_token_clusters(model, stream, sample, seed)
    else:
        fit_document_clusters(model, documents, seed)
