"""Decide the domain of each chunk of a document from the preceding text only.

With bundles a domain is a generation, whose experts and deltas the chunk uses. Whatever reads text asks
:func:`shard_domain_ids`, and training, which reads whole corpora again and again, :class:`CorpusDomains`; a kind of
clusters decides in :meth:`DocumentClusters.nearest`.

Legend: N tokens of one document, C chunks of a batch, V vocabulary, F feature width, G centroids of a generation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lifelong_moe.clustering.batches import batches
from lifelong_moe.clustering.chunks import ChunkDomains, DomainFile, chunk_begins, domain_dtype
from lifelong_moe.clustering.documents import num_chunks, prefix_features
from lifelong_moe.clustering.kmeans import assign
from lifelong_moe.clustering.unigrams import hashed_domains, prefix_generations
from lifelong_moe.config.routing.base import Centroids
from lifelong_moe.config.routing.shared import TextClusterConfig
from lifelong_moe.data.tokens.shards import ShardDocuments, TokenShard
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.storage.keys import content_key

BATCH_TOKENS = 2**16
"""Tokens whose prefixes are held at a time: at one token a chunk, as many rows of float64 ``(F,)``."""
ASSIGNMENT_VERSION = 1
"""To be counted up when :meth:`DocumentClusters.nearest` decides otherwise: what earlier versions kept is then not
found."""


class DocumentClusters(nn.Module):
    """FAISS centroids, as buffers, by which each chunk of a document is assigned to a domain.

    Chunk 0, which no text precedes, is in domain 0. Centroids of later stages stand after the old ones, which never
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
        num_centroids = self.routing.num_clusters(num_experts)
        self.register_buffer(f"centroids_{self.generations}", torch.zeros(num_centroids, self.width))
        self.generations += 1

    def all_centroids(self) -> list[Tensor]:
        """Each generation's centroids ``(G_g, F)``, oldest first; zeros where they are not fitted yet."""
        return [getattr(self, f"centroids_{i}") for i in range(self.generations)]

    def centroids(self) -> list[Tensor]:
        """Each generation's centroids, without generations whose centroids are not fitted yet."""
        return [c for c in self.all_centroids() if bool(c.any())]

    def set_centroids(self, centroids_GF: NDArray[np.float32]) -> None:
        """Set the newest generation's centroids."""
        self.all_centroids()[-1].copy_(torch.from_numpy(centroids_GF))

    def domain_ids(self, token_ids_N: NDArray[np.integer]) -> NDArray[np.int64]:
        """Domain of each token of one document, BOS first, int64 ``(N,)``."""
        return next(self.domain_id_batches([token_ids_N]))

    def domain_id_batches(self, documents: Iterable[NDArray[np.integer]]) -> Iterator[NDArray[np.int64]]:
        """Domain of each token of many documents, BOS first each, read and yielded a batch at a time.

        Yields:
            int64, document after document; a document's domains do not depend on the others in its batch.
        """
        chunk = self.routing.chunk_tokens
        for batch, domains_C in self._chunk_batches(documents):
            chunks_N = num_chunks(batch, chunk)
            # Every chunk has the same length but the last of a document.
            lengths_C = np.full(len(domains_C), chunk)
            lengths_N, ends_N = np.array([len(one) for one in batch]), np.cumsum(chunks_N)
            last_N = lengths_N > 0  # an empty document has no last chunk
            lengths_C[ends_N[last_N] - 1] = (lengths_N - (chunks_N - 1) * chunk)[last_N]
            yield np.repeat(domains_C, lengths_C)

    def chunk_batches(self, documents: Iterable[NDArray[np.integer]]) -> Iterator[NDArray[np.int64]]:
        """As :meth:`domain_id_batches`, the domain of each chunk in place of each token."""
        return (domains_C for _, domains_C in self._chunk_batches(documents))

    def _chunk_batches(
        self, documents: Iterable[NDArray[np.integer]]
    ) -> Iterator[tuple[list[NDArray[np.integer]], NDArray[np.int64]]]:
        """Some documents, and the domain of each of their chunks."""
        chunk, fitted = self.routing.chunk_tokens, [c.cpu().numpy() for c in self.centroids()]
        for batch in batches(documents, enough_tokens=BATCH_TOKENS):
            if self.routing.centroids == Centroids.random:
                domains_C = np.concatenate([hashed_domains(one, self.num_domains(), chunk) for one in batch])
            elif fitted:
                domains_C = self.nearest(batch, fitted)
            else:
                domains_C = np.zeros(int(num_chunks(batch, chunk).sum()), np.int64)
            yield batch, domains_C

    def chosen_among(self) -> int:
        """Domains that a chunk may be assigned to now: the numbers are below it."""
        return self.num_domains() if self.routing.centroids == Centroids.random else self.num_fitted()

    def decided_by(self) -> dict[str, object]:
        """All that decides the domains of a text, as plain JSON data; large arrays by their hash."""
        routing = self.routing
        return {
            "version": ASSIGNMENT_VERSION,
            "kind": type(self).__name__,
            "chunk_tokens": routing.chunk_tokens,
            "domains": self.chosen_among(),
            "random": routing.centroids == Centroids.random,
            "centroids": [_array_key(centroids) for centroids in self.centroids()],
        }

    def num_fitted(self) -> int:
        """Domains of the generations whose centroids are fitted."""
        raise TypeError(f"{type(self).__name__} must implement num_fitted()")

    def num_domains(self) -> int:
        """Domains over all generations, fitted or not."""
        raise TypeError(f"{type(self).__name__} must implement num_domains()")

    def nearest(self, documents: list[NDArray[np.integer]], centroids: list[NDArray[np.float32]]) -> NDArray[np.int64]:
        """Domain of each chunk, document after document, int64 ``(C,)``, by each generation's fitted centroids."""
        raise TypeError(f"{type(self).__name__} must implement nearest(documents, centroids)")


class TfidfClusters(DocumentClusters):
    """``routing.level=document``: each centroid is a domain. Features are tf-idf through the first stage's SVD."""

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

    def num_fitted(self) -> int:
        """One a centroid."""
        return sum(len(c) for c in self.centroids())

    def decided_by(self) -> dict[str, object]:
        """Also the projection."""
        return {**super().decided_by(), "projection": _array_key(self.projection)}

    def nearest(self, documents: list[NDArray[np.integer]], centroids: list[NDArray[np.float32]]) -> NDArray[np.int64]:
        """The centroid nearest in angle."""
        # A chunk that no text precedes has features of zero, which go to the first centroid.
        features_CF = prefix_features(documents, self.projection.cpu().numpy(), self.routing.chunk_tokens)
        return assign(features_CF, np.concatenate(centroids))


class GenerationClusters(DocumentClusters):
    """``routing.bundles=cluster``: each generation is a domain with several centroids: log probabilities of tokens.

    A chunk goes to the generation under which the preceding tokens are most probable; a newer generation must beat an
    older one by more than ``routing.margin``.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture, architecture.vocab_size)

    def num_domains(self) -> int:
        """One a generation."""
        return self.generations

    def num_fitted(self) -> int:
        """One a generation."""
        return len(self.centroids())

    def decided_by(self) -> dict[str, object]:
        """Also the margin."""
        return {**super().decided_by(), "margin": self.routing.margin}

    def nearest(self, documents: list[NDArray[np.integer]], centroids: list[NDArray[np.float32]]) -> NDArray[np.int64]:
        """The generation under which the preceding tokens are most probable."""
        return prefix_generations(documents, centroids, self.routing.chunk_tokens, self.routing.margin)


def _array_key(tensor: Tensor) -> str:
    """Hash of a tensor's shape, type and numbers."""
    array = tensor.cpu().contiguous().numpy()
    return hashlib.sha256(f"{array.shape} {array.dtype.str}\n".encode() + array.tobytes()).hexdigest()


def build_document_clusters(architecture: Architecture) -> DocumentClusters | None:
    """The clusters that decide a chunk's domain, if ``routing`` uses the text for that."""
    if not architecture.routing.by_document:
        return None
    return GenerationClusters(architecture) if architecture.routing.by_generation else TfidfClusters(architecture)


def label_domain(architecture: Architecture, distribution: str | None) -> int:
    """Domain of a distribution under routing by label; an unknown distribution is in domain 0."""
    return architecture.label(distribution)


def shard_domain_ids(
    architecture: Architecture, clusters: DocumentClusters | None, shard: TokenShard, distribution: str | None
) -> NDArray[np.integer] | None:
    """Domain of every token of a shard, from the text before it in its document; None if routing has no domains.

    Args:
        architecture: Of the model.
        clusters: The model's, from :func:`build_document_clusters`.
        shard: Whole documents.
        distribution: Theirs, if it is known; only routing by label looks at it.

    Returns:
        ``(num_tokens,)``. Clusters give the smallest unsigned integers that hold them: a byte per token up to 255
        domains.
    """
    if clusters is not None:
        ids, filled = np.empty(shard.num_tokens, np.min_scalar_type(clusters.num_domains())), 0
        for batch in clusters.domain_id_batches(ShardDocuments([shard])):
            ids[filled : filled + len(batch)] = batch
            filled += len(batch)
        return ids
    if architecture.routing.by_label:
        return np.full(shard.num_tokens, label_domain(architecture, distribution), dtype=np.int64)
    return None


class CorpusDomains:
    """Domains of whole corpora by one model, whose centroids stay as they are meanwhile.

    What clusters decide is kept in a file beside the tokens, found again by tokens and centroids, and mapped: a resume,
    another phase, a teacher with the same centroids and another arm read it. The numbers are those of
    :func:`shard_domain_ids`, bit for bit.

    Args:
        architecture: Of the model.
        clusters: The model's, from :func:`build_document_clusters`.
    """

    def __init__(self, architecture: Architecture, clusters: DocumentClusters | None) -> None:
        self._architecture, self._clusters = architecture, clusters

    def of(self, shard: TokenShard, distribution: str | None) -> NDArray[np.integer] | ChunkDomains | None:
        """Domain of each token, ``(num_tokens,)``; None if routing has no domains; arguments as of the function."""
        clusters = self._clusters
        if clusters is None:
            if not self._architecture.routing.by_label:
                return None
            return same_domain(label_domain(self._architecture, distribution), shard.num_tokens)
        chunk, domains = clusters.routing.chunk_tokens, clusters.chosen_among()
        chunks = int(chunk_begins(shard.offsets, chunk)[-1])
        # Where there is one domain, nothing is decided and nothing is kept.
        if domains <= 1:
            return ChunkDomains(shard.offsets, chunk, same_domain(0, chunks))
        if (files := shard.kept_in) is not None:
            key = content_key({"tokens": files.key, "decided_by": self._decided_by})
            kept = DomainFile(files.folder, key, chunks, domains)
            if (ids_C := kept.find()) is None:
                # A cache that cannot be written to, or not read again, is done without.
                with suppress(OSError):
                    kept.write(clusters.chunk_batches(ShardDocuments([shard])))
                    ids_C = kept.find()
            if ids_C is not None:
                return ChunkDomains(shard.offsets, chunk, ids_C, file=kept)
        ids_C, filled = np.empty(chunks, domain_dtype(domains)), 0
        for batch in clusters.chunk_batches(ShardDocuments([shard])):
            ids_C[filled : filled + len(batch)] = batch
            filled += len(batch)
        return ChunkDomains(shard.offsets, chunk, ids_C)

    @cached_property
    def _decided_by(self) -> dict[str, object]:
        # Once for all corpora: the centroids of a hundred generations are as large as many a corpus.
        assert self._clusters is not None
        return self._clusters.decided_by()


def same_domain(domain: int, length: int) -> NDArray[np.unsignedinteger]:
    """One number, as often as it is asked for, ``(length,)`` and read-only; it takes the memory of one."""
    return np.broadcast_to(np.array(domain, np.min_scalar_type(domain)), (length,))
