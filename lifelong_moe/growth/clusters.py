"""Fit a stage's centroids and bucket tables before it trains. FAISS clusters; routers only assign.

Legend: N tokens, V vocabulary, F feature width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lifelong_moe.clustering.balanced import balanced_kmeans
from lifelong_moe.clustering.batches import TokenIds
from lifelong_moe.clustering.documents import document_features, evenly_spread, fit_tfidf
from lifelong_moe.clustering.kmeans import assign, spherical_kmeans, unit_rows
from lifelong_moe.clustering.tables import balanced_table
from lifelong_moe.clustering.tokens import pieces, token_embedding
from lifelong_moe.clustering.unigrams import fit_unigrams
from lifelong_moe.config.routing.base import Centroids, HashTable, Level
from lifelong_moe.config.routing.routers import ClusterConfig, HashConfig
from lifelong_moe.config.routing.shared import TextClusterConfig
from lifelong_moe.growth.observe import observe
from lifelong_moe.model.domains import GenerationClusters, TfidfClusters
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.routing.routers.cluster import TokenClusterRouter

FIT_DOCUMENTS = 4096
"""Documents that centroids are fitted on, evenly spread over the training data."""


def fit_token_clusters(
    model: LanguageModel, parts: Sequence[TokenIds], sample: Mapping[str, Tensor], seed: int
) -> None:
    """Fit the newest centroids of every layer; older centroids stay fixed, and keep the points nearest to them.

    Layers are fitted bottom up, on hidden states that the already fitted layers below produce; with frozen embedding
    features, layers differ by their seed only. With ``routing.centroids=random`` centroids are random directions,
    uniform on the sphere.

    Args:
        model: Its newest centroids are not fitted yet.
        parts: Token ids of the stage's training text, in consecutive parts; the first stage's determine the frozen
            embedding.
        sample: Blocks of it, for hidden states.
        seed: For the embedding and every clustering.
    """
    routing = model.architecture.routing
    assert isinstance(routing, ClusterConfig)
    if routing.clusters_embedding:
        table: Tensor = model.token_features  # type: ignore[assignment]
        if not bool(table.any()):  # only in the first stage: later ones keep its embedding
            fitted = token_embedding(parts, len(table), routing.feature_width, seed=seed)
            table[:, : fitted.shape[1]] = torch.from_numpy(fitted)
        features_NF = table[torch.from_numpy(_first(parts, routing.sample_tokens))].cpu().numpy()
    for i, layer in enumerate(model.moe_layers()):
        router = layer.router
        assert isinstance(router, TokenClusterRouter)
        # A dense layer, of which no token asks the router.
        if not (num := router.generations[-1]):
            continue
        # Observed anew for each layer: the layers below route by the centroids that were just fitted.
        if routing.clusters_hidden:
            with closing(observe(model, sample, [i])) as layers:
                inputs_ND = next(islice(layers, i, None)).inputs_ND
            assert inputs_ND is not None
            features_NF = inputs_ND.numpy()
        if routing.centroids == Centroids.random:
            drawn = np.random.default_rng(seed + i).standard_normal((num, router.feature_width))
            router.set_rows(torch.from_numpy(unit_rows(drawn)))
            continue
        old = [c.cpu().numpy() for c in router.centroids()[:-1]]
        # With bundles a token sees its own generation's centroids only.
        fixed = np.concatenate(old) if old and not routing.by_generation else None
        centroids = spherical_kmeans(features_NF, num, seed=seed + i, fixed_KD=fixed)
        router.set_rows(torch.from_numpy(centroids))


def fit_token_tables(model: LanguageModel, parts: Sequence[TokenIds], seed: int) -> None:
    """Assign each token id to a bucket, in one table per number of experts; later stages keep the tables.

    Args:
        model: With ``routing.table`` other than ``random``.
        parts: Token ids of the first stage's training text, in consecutive parts.
        seed: For embedding and clustering.
    """
    routing, vocab_size = model.architecture.routing, model.architecture.vocab_size
    assert isinstance(routing, HashConfig)
    tables: dict[int, Tensor] = {num: getattr(model, name) for num, name in model.table_names.items()}
    if any(bool(buckets.any()) for buckets in tables.values()):
        return
    if routing.table == HashTable.balanced:
        counts_V = np.zeros(vocab_size, np.int64)
        for piece in pieces(parts, vocab_size):
            counts_V += np.bincount(piece, minlength=vocab_size)
    else:
        embedded_VF = token_embedding(parts, vocab_size, routing.feature_width, seed=seed)
    for num, buckets in tables.items():
        if routing.table == HashTable.balanced:
            table = balanced_table(counts_V, num)
        else:
            table = assign(embedded_VF, spherical_kmeans(embedded_VF, num, seed=seed))
        buckets.copy_(torch.from_numpy(table))


def unigram_centroids(
    documents: Sequence[NDArray[np.integer]], vocab_size: int, num: int, *, width: int, seed: int
) -> NDArray[np.float32]:
    """Unigram log probabilities by which a generation's text is recognized, float32 ``(num, V)``.

    Args:
        documents: Token ids of its training documents, BOS first; at most ``FIT_DOCUMENTS`` are used.
        vocab_size: V.
        num: Number of centroids.
        width: Dimensions of the features by which documents are clustered.
        seed: For features and clustering.
    """
    # Every document begins with BOS, which tells nothing.
    texts = [document[1:] for document in evenly_spread(documents, FIT_DOCUMENTS)]
    return fit_unigrams(texts, vocab_size, num, width=width, seed=seed)


def fit_document_clusters(model: LanguageModel, documents: Sequence[NDArray[np.integer]], seed: int) -> None:
    """Fit the newest document centroids on whole training documents.

    Unigram centroids depend on this stage's text only; tf-idf centroids share the first stage's projection.

    Args:
        model: Its newest document centroids are not fitted yet.
        documents: Token ids of the stage's training documents, BOS first; at most ``FIT_DOCUMENTS`` are used.
        seed: For the SVD and the clustering.
    """
    clusters, routing = model.document_clusters, model.architecture.routing
    assert clusters is not None and isinstance(routing, TextClusterConfig)
    if routing.centroids == Centroids.random:  # a hash decides, and centroids stay zero
        return
    num, vocab_size = len(clusters.all_centroids()[-1]), model.architecture.vocab_size
    if isinstance(clusters, GenerationClusters):
        width = routing.feature_width
        clusters.set_centroids(unigram_centroids(documents, vocab_size, num, width=width, seed=seed))
        return
    assert isinstance(clusters, TfidfClusters)
    documents = evenly_spread(documents, FIT_DOCUMENTS)
    projection = clusters.projection
    # Fitted once: centroids of different stages compare only under one projection.
    if not bool(projection.any()):
        clusters.set_projection(fit_tfidf(documents, len(projection), clusters.width, seed=seed))
    # Balanced, so that a generation's experts get similar shares of its text.
    features = document_features(documents, projection.cpu().numpy())
    clusters.set_centroids(balanced_kmeans(features, num, seed=seed)[0])


def fit_clusters(
    model: LanguageModel,
    documents: Sequence[NDArray[np.integer]],
    parts: Sequence[TokenIds],
    sample: Mapping[str, Tensor],
    seed: int,
) -> None:
    """Fit all centroids and tables that ``routing`` needs, if any; only those of hidden states read the sample."""
    routing = model.architecture.routing
    if routing.by_document:
        fit_document_clusters(model, documents, seed)
    if routing.has_table:
        fit_token_tables(model, parts, seed)
    if isinstance(routing, ClusterConfig) and routing.level == Level.token:
        fit_token_clusters(model, parts, sample, seed)


def _first(parts: Sequence[TokenIds], num: int) -> NDArray[np.int64]:
    """The first ``num`` tokens of all parts, or all that there are."""
    found = np.zeros(0, np.int64)
    for part in parts:
        found = np.concatenate([found, part[: num - len(found)].astype(np.int64)])
    return found
