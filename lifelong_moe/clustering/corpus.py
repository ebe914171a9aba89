"""Cluster a corpus of any size in two passes: one counts, one assigns. What is fitted in between is fitted on a sample.

Memory holds the sample and one batch of documents.
Shapes: N documents, V vocabulary size, D feature width, K clusters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lifelong_moe.clustering.balanced import balanced_kmeans
from lifelong_moe.clustering.balanced_stream import assign_in_order, sample_prices
from lifelong_moe.clustering.batches import TokenIds, batches
from lifelong_moe.clustering.documents import count_frequencies, document_features, feature_batches, fit_tfidf
from lifelong_moe.clustering.kmeans import Floats, Labels

SAMPLE_DOCUMENTS = 32_768
"""Documents that features, centroids and prices are fitted on."""


@dataclass(frozen=True, eq=False)
class CorpusClusters:
    """What places a document among balanced clusters."""

    projection_VD: Floats
    """Feature row of each token, float32 ``(V, D)``."""
    centroids_KD: Floats
    """Float32 ``(K, D)``, of unit length."""
    prices_K: Labels
    """What each cluster costs, int64 ``(K,)``; see `balanced_stream.sample_prices`."""


def evenly_spread(documents: Sequence[TokenIds], most: int) -> list[TokenIds]:
    """At most ``most`` documents, every n-th from the first on; the others are not read."""
    return [documents[i] for i in range(0, len(documents), max(1, -(-len(documents) // most)))]


def fit_corpus(
    documents: Sequence[TokenIds], vocab_size: int, k: int, *, width: int, seed: int, sample: int = SAMPLE_DOCUMENTS
) -> CorpusClusters:
    """Fit tf-idf features, balanced centroids and prices; document frequencies are those of the whole corpus.

    Args:
        documents: Token ids of each whole document, integer ``(length,)``; read one after another.
        vocab_size: V.
        k: Clusters.
        width: D; see `documents.fit_tfidf`.
        seed: Of the SVD and the clustering. Same seed, same bits.
        sample: Documents at most that the SVD and the clustering see, evenly spread.

    Raises:
        DataError: If fewer than ``k`` of the sample hold a token.
        ValueError: If a token id is outside the vocabulary.
    """
    frequencies = count_frequencies(iter(documents), vocab_size)
    sampled = evenly_spread(documents, sample)
    projection_VD = fit_tfidf(sampled, vocab_size, width, seed=seed, frequencies=frequencies)
    features_MD = document_features(sampled, projection_VD)
    centroids_KD = balanced_kmeans(features_MD, k, seed=seed)[0]
    return CorpusClusters(projection_VD, centroids_KD, sample_prices(features_MD, centroids_KD))


def assign_corpus(documents: Iterable[TokenIds], num_documents: int, clusters: CorpusClusters) -> Iterator[Labels]:
    """Cluster of each document in order, none with more than ``ceil(num_documents / K)``; memory holds one batch.

    Args:
        documents: Token ids of each whole document; any iterable, read once.
        num_documents: How many there are.
        clusters: From `fit_corpus`.

    Yields:
        int64 ``(N,)`` for each batch; the same labels however long the batches are.

    Raises:
        ValueError: If a token id is outside the vocabulary, or there are more documents than that.
    """
    features = feature_batches(batches(documents), clusters.projection_VD)
    return assign_in_order(features, clusters.centroids_KD, clusters.prices_K, num_documents)
