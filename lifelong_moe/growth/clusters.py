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
from lifelong_moe.clustering.balanced_table import balanced_table
from lifelong_moe.clustering.bundles import fit_unigrams
from lifelong_moe.clustering.documents import document_features, evenly_spread, fit_tfidf
from lifelong_moe.clustering.kmeans import assign, spherical_kmeans, unit_rows
from lifelong_moe.clustering.tokens import token_embedding
from lifelong_moe.config.routing.base import Centroids, HashTable, Level
from lifelong_moe.config.routing.routers import ClusterConfig, HashConfig
from lifelong_moe.config.routing.shared import TextClusterConfig
from lifelong_moe.growth.observe import observe
from lifelong_moe.model.groups import BundleClusters, TfidfClusters
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.routing.routers.cluster import TokenClusterRouter

FIT_DOCUMENTS = 4096


def fit_token_clusters(
    model: LanguageModel, stream: NDArray[np.integer], sample: Mapping[str, Tensor], seed: int
) -> None:
    """Set the newest centroids of every layer; older centroids take their points first and stay as they are.

    Layers are fitted from the bottom up, and each sees what the layers below it, already clustered, make of the
    sample; with frozen embedding features they differ by their seed alone. With ``routing.centroids=random`` they are
    random directions, drawn evenly from the sphere.

    Args:
        model: With a generation whose centroids are not set yet.
        stream: Token ids of the stage's training text; the frozen embedding is made of the first stage's.
        sample: Blocks of it, for hidden states.
        seed: Of the embedding and of every clustering.
    """
    routing = model.architecture.routing
    assert isinstance(routing, ClusterConfig)
    if routing.clusters_embedding:
        table: Tensor = model.token_features  # type: ignore[assignment]
        if not bool(table.any()):
            fitted = token_embedding(stream, len(table), routing.feature_width, seed=seed)
            table[:, : fitted.shape[1]] = torch.from_numpy(fitted)
        features_NF = table[torch.from_numpy(stream[: routing.sample_tokens].astype(np.int64))].cpu().numpy()
    for i, layer in enumerate(model.moe_layers()):
        router = layer.router
        assert isinstance(router, TokenClusterRouter)
        if routing.clusters_hidden:
            features_NF = observe(model, sample)[i].inputs_ND.numpy()
        num = router.generations[-1]
        if routing.centroids == Centroids.random:
            drawn = np.random.default_rng(seed + i).standard_normal((num, router.feature_width))
            router.set_rows(torch.from_numpy(unit_rows(drawn)))
            continue
        old = [c.cpu().numpy() for c in router.centroids()[:-1]]
        fixed = np.concatenate(old) if old and not routing.has_bundles else None  # a bundle's tokens see its own alone
        centroids = spherical_kmeans(features_NF, num, seed=seed + i, fixed_KD=fixed)
        router.set_rows(torch.from_numpy(centroids))


def fit_token_tables(model: LanguageModel, stream: NDArray[np.integer], seed: int) -> None:
    """Give each token id a bucket, once for each number of experts: a later stage finds the tables as they are.

    Args:
        model: With ``routing.table`` other than ``random``.
        stream: Token ids of the first stage's training text.
        seed: Of embedding and clustering.
    """
    routing, vocab_size = model.architecture.routing, model.architecture.vocab_size
    assert isinstance(routing, HashConfig)
    tables: dict[int, Tensor] = {num: getattr(model, name) for num, name in model.table_names.items()}
    if any(bool(buckets.any()) for buckets in tables.values()):
        return
    if routing.table == HashTable.balanced:
        counts_V = np.bincount(stream, minlength=vocab_size)
    else:
        embedded_VF = token_embedding(stream, vocab_size, routing.feature_width, seed=seed)
    for num, buckets in tables.items():
        if routing.table == HashTable.balanced:
            table = balanced_table(counts_V, num)
        else:
            table = assign(embedded_VF, spherical_kmeans(embedded_VF, num, seed=seed))
        buckets.copy_(torch.from_numpy(table))


def bundle_centroids(
    documents: Sequence[NDArray[np.integer]], vocab_size: int, num: int, *, width: int, seed: int
) -> NDArray[np.float32]:
    """What tells a generation's text from others': log probabilities of tokens, float32 ``(num, V)``.

    Args:
        documents: Token ids of its training documents, BOS first; at most 4,096, evenly spread, are used.
        vocab_size: V.
        num: Centroids.
        width: Dimensions of the features that documents are clustered by.
        seed: Of features and clustering.
    """
    texts = [document[1:] for document in evenly_spread(documents, FIT_DOCUMENTS)]
    return fit_unigrams(texts, vocab_size, num, width=width, seed=seed)


def fit_document_clusters(model: LanguageModel, documents: Sequence[NDArray[np.integer]], seed: int) -> None:
    """Set the newest document centroids from whole training documents.

    Those of bundles come from this stage's text alone; other clusters share the first stage's projection.

    Args:
        model: With document clusters whose newest generation is not set yet.
        documents: Token ids of the stage's training documents, BOS first; at most 4,096, evenly spread, are used.
        seed: Of the SVD and the clustering.
    """
    clusters, routing = model.document_clusters, model.architecture.routing
    assert clusters is not None and isinstance(routing, TextClusterConfig)
    if routing.centroids == Centroids.random:
        return
    groups, vocab_size = len(clusters.all_centroids()[-1]), model.architecture.vocab_size
    if isinstance(clusters, BundleClusters):
        width = routing.feature_width
        clusters.set_centroids(bundle_centroids(documents, vocab_size, groups, width=width, seed=seed))
        return
    assert isinstance(clusters, TfidfClusters)
    documents = evenly_spread(documents, FIT_DOCUMENTS)
    projection = clusters.projection
    if not bool(projection.any()):
        clusters.set_projection(fit_tfidf(documents, len(projection), clusters.width, seed=seed))
    features = document_features(documents, projection.cpu().numpy())
    clusters.set_centroids(balanced_kmeans(features, groups, seed=seed)[0])


def fit_clusters(
    model: LanguageModel,
    documents: Sequence[NDArray[np.integer]],
    stream: NDArray[np.integer],
    sample: Mapping[str, Tensor],
    seed: int,
) -> None:
    """Fit whatever ``routing`` asks for; nothing unless it is clustered."""
    routing = model.architecture.routing
    if routing.by_document:
        fit_document_clusters(model, documents, seed)
    if routing.has_table:
        fit_token_tables(model, stream, seed)
    if isinstance(routing, ClusterConfig) and routing.level == Level.token:
        fit_token_clusters(model, stream, sample, seed)
