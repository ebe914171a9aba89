"""Which generation a text belongs to, as far as it has been read: several unigram models each, compared by likelihood.

FAISS clusters a stage's own documents, and each cluster's token frequencies become a centroid: a row of log
probabilities. The inner product of a text's token counts with it is the text's log likelihood, in nats. A generation's
centroids are fitted on its own stage's text alone, so a new one needs no old text and changes no old centroid.

Shapes: N tokens of a document, V vocabulary size, K centroids of a generation, C chunks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from lifelong_moe.clustering.balanced import balanced_kmeans
from lifelong_moe.clustering.batches import TokenIds
from lifelong_moe.clustering.documents import document_features, fit_tfidf, prefix_sums
from lifelong_moe.clustering.kmeans import Floats, Labels

UNIFORM = 0.01
"""Share of the uniform distribution in each centroid, so that a token which its generation never saw costs
``ln(V / UNIFORM)`` nats and not infinitely many."""


def fit_unigrams(documents: Sequence[TokenIds], vocab_size: int, k: int, *, width: int, seed: int) -> Floats:
    """Cluster documents by what they are about, and take each cluster's token distribution.

    Args:
        documents: Token ids of each whole document of one stage, integer ``(length,)``, without BOS.
        vocab_size: V.
        k: Clusters; of equal size, because the few odd documents of a small cluster would draw other generations' text.
        width: Dimensions of the tf-idf features, which are fitted on these documents and then forgotten.
        seed: Of the features and the clustering.

    Returns:
        Log probabilities, float32 ``(K, V)``.

    Raises:
        DataError: If fewer than ``k`` documents hold a token.
        ValueError: If a token id is outside the vocabulary.
    """
    projection_VD = fit_tfidf(documents, vocab_size, width, seed=seed)
    labels = balanced_kmeans(document_features(documents, projection_VD), k, seed=seed)[1]
    counts_KV = np.zeros((k, vocab_size))
    for label, document in zip(labels, documents, strict=True):
        counts_KV[label] += np.bincount(document, minlength=vocab_size)
    shares_KV = counts_KV / np.maximum(counts_KV.sum(axis=1, keepdims=True), 1)
    return np.asarray(np.log((1 - UNIFORM) * shares_KV + UNIFORM / vocab_size), np.float32)


def unigram_divergence(new_N: TokenIds, old_N: TokenIds, vocab_size: int) -> float:
    """How much better its own token frequencies explain new text than the old text's do, in nats per token.

    The Kullback–Leibler divergence of the new unigram distribution from the old one, both smoothed like centroids.

    Args:
        new_N: Token ids of new text, integer ``(N,)``.
        old_N: Of old text.
        vocab_size: V.
    """
    logs = []
    for ids in (new_N, old_N):
        shares_V = np.bincount(ids, minlength=vocab_size) / max(1, len(ids))
        logs.append(np.log((1 - UNIFORM) * shares_V + UNIFORM / vocab_size))
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum())


def prefix_generations(documents: Sequence[TokenIds], centroids: Sequence[Floats], chunk: int, margin: float) -> Labels:
    """The generation that explains best what precedes each chunk of a document; the choice of generations is made here.

    Oldest first, a generation takes a chunk over from the older one that holds it if its best centroid's log likelihood
    is more than ``margin`` larger. A further generation thus changes nothing but what it takes over itself.

    Args:
        documents: Token ids of each in order, integer ``(length,)``; at least one.
        centroids: Each generation's log probabilities ``(K, V)``, oldest first; at least one generation.
        chunk: Tokens per chunk, at least 1.
        margin: In nats.

    Returns:
        int64 ``(C,)``, document after document; 0 for a chunk 0, which nothing precedes. No entry changes with any
        later token, nor with the other documents.
    """
    best_C = prefix_sums(documents, centroids[0].T, chunk).max(axis=1)
    held_C = np.zeros(len(best_C), np.int64)
    for generation, centroids_KV in enumerate(centroids[1:], start=1):
        likelihood_C = prefix_sums(documents, centroids_KV.T, chunk).max(axis=1)
        # Strictly more than the margin: at a tie the older generation keeps the text.
        taken_C = likelihood_C > best_C + margin
        held_C[taken_C] = generation
        best_C = np.where(taken_C, likelihood_C, best_C)
    return held_C


def hashed_domains(token_ids_N: TokenIds, num_domains: int, chunk: int) -> Labels:
    """Random domains that read nothing: a document's first chunk, hashed, decides for all later ones; chunk 0 is in 0.

    The domain of the highest rank wins, so that a further one takes documents over and moves none between old ones.

    Returns:
        int64 ``(ceil(N / chunk),)``.

    Source:
        c-BTM's random clusters (arXiv:2303.14177), there drawn once a document; rendezvous hashing (1998).
    """
    # Little-endian whatever the machine: the hash decides which experts a document has.
    first = np.asarray(token_ids_N[:chunk], "<i8").tobytes()
    ranks = [hashlib.sha256(domain.to_bytes(4, "little") + first).digest() for domain in range(num_domains)]
    domains_C = np.full(-(-len(token_ids_N) // chunk), ranks.index(max(ranks)), np.int64)
    # Nothing precedes chunk 0, so it must not depend on its own text.
    domains_C[:1] = 0
    return domains_C
