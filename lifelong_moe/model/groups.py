"""Which group (document cluster or label) each token of a document belongs to, from the text before it alone.

Legend: N tokens of one document, V vocabulary, F feature width, G groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lifelong_moe.clustering.batches import batches
from lifelong_moe.clustering.documents import num_chunks, prefix_features
from lifelong_moe.clustering.kmeans import assign
from lifelong_moe.clustering.unigrams import hashed_domains, prefix_generations
from lifelong_moe.config.routing.base import Centroids
from lifelong_moe.config.routing.shared import TextClusterConfig
from lifelong_moe.plan.architecture import Architecture

BATCH_TOKENS = 2**16
"""Tokens whose prefixes are held at a time: at one token a chunk, as many rows of float64 ``(F,)``."""


class DocumentClusters(nn.Module):
    """FAISS centroids, as buffers, that give each chunk of a document a group by the tokens before it.

    Chunk 0, which has none before it, is in group 0. Centroids of later stages stand after the old ones, which never
    change. With ``routing.centroids=random`` a hash of chunk 0 decides for all later ones, and nothing is fitted.
    """

    def __init__(self, architecture: Architecture, width: int | None = None) -> None:
        super().__init__()
        assert isinstance(architecture.routing, TextClusterConfig)
        self.routing = architecture.routing
        self.width = width or self.routing.feature_width
        self.generations = 0

    def add(self, num_experts: int) -> None:
        """Make room for a generation's centroids, all zero until :meth:`set_centroids`."""
        groups = self.routing.num_clusters(num_experts)
        self.register_buffer(f"centroids_{self.generations}", torch.zeros(groups, self.width))
        self.generations += 1

    def all_centroids(self) -> list[Tensor]:
        """Each generation's centroids ``(G_g, F)``, oldest first; zeros where they are not fitted yet."""
        return [getattr(self, f"centroids_{i}") for i in range(self.generations)]

    def centroids(self) -> list[Tensor]:
        """Those that are fitted."""
        return [c for c in self.all_centroids() if bool(c.any())]

    def set_centroids(self, centroids_GF: NDArray[np.float32]) -> None:
        """Set the newest generation's centroids."""
        self.all_centroids()[-1].copy_(torch.from_numpy(centroids_GF))

    def domain_ids(self, token_ids_N: NDArray[np.integer]) -> NDArray[np.int64]:
        """Group of each token of one document, BOS first, int64 ``(N,)``."""
        return next(self.domain_id_batches([token_ids_N]))

    def domain_id_batches(self, documents: Iterable[NDArray[np.integer]]) -> Iterator[NDArray[np.int64]]:
        """Group of each token of many documents, BOS first each, read and yielded a batch at a time.

        Yields:
            int64, document after document; a document's groups do not depend on what it is batched with.
        """
        chunk, fitted = self.routing.chunk_tokens, [c.cpu().numpy() for c in self.centroids()]
        for batch in batches(documents, enough_tokens=BATCH_TOKENS):
            chunks_N = num_chunks(batch, chunk)
            if self.routing.centroids == Centroids.random:
                domains_C = np.concatenate([hashed_domains(one, self.num_domains(), chunk) for one in batch])
            elif fitted:
                domains_C = self.nearest(batch, fitted)
            else:
                domains_C = np.zeros(int(chunks_N.sum()), np.int64)
            lengths_C = np.full(len(domains_C), chunk)
            lengths_N, ends_N = np.array([len(one) for one in batch]), np.cumsum(chunks_N)
            last_N = lengths_N > 0  # an empty document has no last chunk
            lengths_C[ends_N[last_N] - 1] = (lengths_N - (chunks_N - 1) * chunk)[last_N]
            yield np.repeat(domains_C, lengths_C)

    def num_domains(self) -> int:
        """Groups over all generations, fitted or not."""
        raise TypeError(f"{type(self).__name__} must implement num_domains()")

    def nearest(self, documents: list[NDArray[np.integer]], centroids: list[NDArray[np.float32]]) -> NDArray[np.int64]:
        """Group of each chunk, document after document, int64 ``(C,)``, by each generation's fitted centroids."""
        raise TypeError(f"{type(self).__name__} must implement nearest(documents, centroids)")


class TfidfClusters(DocumentClusters):
    """``routing.level=document``: each centroid is a group. Features are tf-idf through the first stage's SVD."""

    projection: Tensor

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        self.register_buffer("projection", torch.zeros(architecture.vocab_size, self.width))

    def set_projection(self, projection_VF: NDArray[np.float32]) -> None:
        """Set the projection; columns that a small corpus cannot fill stay zero."""
        self.projection.zero_()
        self.projection[:, : projection_VF.shape[1]] = torch.from_numpy(projection_VF)

    def num_domains(self) -> int:
        """One a centroid."""
        return sum(len(c) for c in self.all_centroids())

    def nearest(self, documents: list[NDArray[np.integer]], centroids: list[NDArray[np.float32]]) -> NDArray[np.int64]:
        """The centroid nearest in angle; the first where nothing precedes, since a row of zeros goes there."""
        features_CF = prefix_features(documents, self.projection.cpu().numpy(), self.routing.chunk_tokens)
        return assign(features_CF, np.concatenate(centroids))


class BundleClusters(DocumentClusters):
    """``routing.bundles=cluster``: each generation is a group, and owns several centroids: log probabilities of tokens.

    A chunk goes to the bundle under which the tokens before it are most probable, or to an older one unless the newer
    is better by more than ``routing.margin``.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture, architecture.vocab_size)

    def num_domains(self) -> int:
        """One a generation."""
        return self.generations

    def nearest(self, documents: list[NDArray[np.integer]], centroids: list[NDArray[np.float32]]) -> NDArray[np.int64]:
        """The bundle that explains the text so far."""
        return prefix_generations(documents, centroids, self.routing.chunk_tokens, self.routing.margin)


def build_document_clusters(architecture: Architecture) -> DocumentClusters | None:
    """What decides a token's group from the text so far, where ``routing`` wants that."""
    if not architecture.routing.by_document:
        return None
    return BundleClusters(architecture) if architecture.routing.by_generation else TfidfClusters(architecture)


def label_domain(architecture: Architecture, distribution: str | None) -> int:
    """Group of a known distribution where routing goes by label; an unknown one goes to group 0."""
    return dict(architecture.labels).get(distribution or "", 0)
