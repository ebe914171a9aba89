"""Drift of a batch from each distribution that the champion knows, in the champion's own eyes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.clustering.kmeans import assign, spherical_kmeans
from lifelong_moe.data.documents import Document
from lifelong_moe.data.shards import TokenShard
from lifelong_moe.data.windows import evaluation_windows
from lifelong_moe.evaluation.documents import DocumentMeasures, generation_shares, measure_documents
from lifelong_moe.retraining.config import DriftConfig
from lifelong_moe.retraining.drift import DocumentSample, Drift, choose_documents, measure_drift
from pipelines.candidates import Bench, Candidate

CLUSTERS = 16
"""Clusters of the old distribution's documents, over which the stability index is taken."""


def measure_batch(bench: Bench, candidate: Candidate, config: DriftConfig, seed: int) -> tuple[dict[str, Drift], str]:
    """Test the batch against every old distribution.

    Features are mean final hidden states of the champion over a document's first ``model.context`` tokens.

    Returns:
        The drift from each distribution, and the stage whose experts take most of the batch's tokens.
    """
    measured, sources = _beginnings(bench, candidate, bench.new, config, seed)
    drifts = {}
    for name in candidate.config.evaluated:
        if name != bench.new:
            old, old_sources = _beginnings(bench, candidate, name, config, seed)
            centroids = spherical_kmeans(old.features, min(CLUSTERS, len(old.features)), seed=seed)
            counts = [np.bincount(assign(m.features, centroids), minlength=len(centroids)) for m in (measured, old)]
            new_side, old_side = (
                DocumentSample(m.features, s, c)
                for m, s, c in zip((measured, old), (sources, old_sources), counts, strict=True)
            )
            drifts[name] = measure_drift(new_side, old_side, config, seed=seed)
    return drifts, _nearest_stage(bench, measured)


def has_drifted(drifts: dict[str, Drift]) -> bool:
    """A batch is of a new kind if it differs from every distribution there is."""
    return all(drift.drifted for drift in drifts.values())


def _beginnings(
    bench: Bench, candidate: Candidate, name: str, config: DriftConfig, seed: int
) -> tuple[DocumentMeasures, list[str]]:
    """The champion's view of the first context of some training documents, and their sources."""
    documents: list[Document] = bench.texts[name].train
    chosen = choose_documents([document.source for document in documents], config.documents, seed=seed)
    context = candidate.config.model.context
    shard = first_tokens(candidate.data.corpora[name].train, chosen, context)
    windows = evaluation_windows(shard, context, shard.num_tokens)
    model = bench.model(bench.parent, candidate)
    # Where routing goes by label, a new text's is unknown, and an old one's must not tell the two apart.
    batch_tokens = candidate.config.evaluate.batch_tokens
    measured = measure_documents(model, windows, distribution=None, batch_tokens=batch_tokens)
    return measured, [documents[chosen[i]].source for i in measured.document]


def first_tokens(shard: TokenShard, documents: NDArray[np.int64], tokens: int) -> TokenShard:
    """The beginnings of some documents."""
    rows = [shard.document(int(i))[:tokens] for i in documents]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return replace(shard, tokens=np.concatenate(rows), offsets=offsets, text_bytes=shard.text_bytes[documents])


def _nearest_stage(bench: Bench, measured: DocumentMeasures) -> str:
    shares = generation_shares(measured.expert_counts, bench.architecture)
    return max(shares, key=lambda stage: shares[stage])
