"""Drift of a batch from each distribution that the champion learned, in features of the champion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.clustering.kmeans import assign, spherical_kmeans
from lifelong_moe.config.retraining.policy import DriftConfig
from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.text.jsonl import own_unit
from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.data.tokens.windows import evaluation_windows
from lifelong_moe.evaluation.documents import DocumentMeasures, generation_shares, measure_documents
from lifelong_moe.retraining.drift import DocumentSample, choose_documents, measure_drift
from lifelong_moe.retraining.drifted import Drift
from lifelong_moe.retraining.looks import Looks, look_at
from lifelong_moe.retraining.mixtures import draw_mixture, nearest_shares
from pipelines.versions.candidates import Candidate, CandidateTrainer

CLUSTERS = 16
"""Clusters of the old distribution's documents, the bins of the stability index."""
# With a space: no distribution can have this name.
TOGETHER = "all together"
"""Key of the drift from the nearest mixture of old distributions."""


@dataclass(frozen=True)
class _View:
    """Documents of one distribution as the champion sees them: the first context of each."""

    measured: DocumentMeasures
    documents: list[Document]
    """The measured documents, in the order of the measures."""

    @property
    def sample(self) -> DocumentSample:
        """Features and sources; :func:`_compare` fills in the clusters."""
        return _sample(self.measured.features, [document.source for document in self.documents])


def measure_batch(
    trainer: CandidateTrainer, candidate: Candidate, config: DriftConfig, seed: int
) -> tuple[dict[str, Drift], str]:
    """Test the batch for drift from every old distribution and from their nearest mixture.

    Features are the mean final hidden states of the champion over a document's first ``model.context`` tokens.

    Returns:
        The drift from each distribution and, if there are several, from ``TOGETHER``; and the stage whose experts are
        nearest: they get most of the batch's tokens or, where labels decide, are those of the most alike distribution.
    """
    new = _view(trainer, candidate, trainer.new, config, seed)
    views = {
        name: _view(trainer, candidate, name, config, seed)
        for name in candidate.measurements.measurable(without=[trainer.new])
    }
    drifts = {}
    for name, view in views.items():
        # One test for each distribution, at its own level: a batch must differ from all to count as drifted.
        drift = _compare(new.sample, view.sample, config, seed)
        note = f" The documents of {name} name no source: each counts as one of its own."
        gone = " Its training text is gone: held-out text was compared."
        words = drift.words + note * name_no_source(view.documents) + gone * (name in candidate.data.gone)
        drifts[name] = replace(drift, words=words)
    if len(views) > 1:
        drifts[TOGETHER] = _from_mixture(new.sample, {name: view.sample for name, view in views.items()}, config, seed)
    return drifts, _nearest_stage(trainer, new.measured, drifts)


def has_drifted(drifts: Mapping[str, Drift]) -> bool:
    """Whether a batch is of a new kind: it drifted from every old distribution, and from their nearest mixture."""
    return all(drift.drifted for drift in drifts.values())


def untested(drifts: Mapping[str, Drift]) -> str | None:
    """Why it is unknown whether a batch is of a new kind; None if it is known."""
    unknown = _unanswered(drifts)
    # One tested distribution that the batch does not differ from is an answer, whatever the others would say.
    if _alike(drifts) or not unknown:
        return None
    return f"whether it is a new kind of text could not be tested against {', '.join(unknown)}: too few sources"


def _alike(drifts: Mapping[str, Drift]) -> list[str]:
    """Distributions that the batch was tested against and did not drift from."""
    return [name for name, drift in drifts.items() if drift.null_quantile is not None and not drift.drifted]


def _unanswered(drifts: Mapping[str, Drift]) -> list[str]:
    """Distributions with too few sources for a test."""
    return [name for name, drift in drifts.items() if drift.null_quantile is None]


def name_no_source(documents: Sequence[Document]) -> bool:
    """Whether no document names a source, so that each counts as one of its own."""
    return all(document.source == own_unit(document.text) for document in documents)


def drift_notes(documents: Sequence[Document], drifts: Mapping[str, Drift]) -> list[str]:
    """Notes on the drift test for the operator: unnamed sources, and why growing is not considered."""
    notes = []
    if name_no_source(documents):
        notes.append(
            f"The batch's {len(documents)} documents name no source, so each counts as one of its own; if they come "
            f"from one place, drift may be nothing but what that place has in common."
        )
    return notes + _why_no_growth(drifts)


def look_at_batch(trainer: CandidateTrainer, documents: int, seed: int) -> Looks:
    """Describe the batch's text, from at most so many documents of each distribution."""
    texts = {}
    for name in trainer.texts.heldout:
        there = trainer.texts.at_hand(name)
        chosen = choose_documents([document.source for document in there], documents, seed=seed)
        texts[name] = [there[i].text for i in chosen]
    return look_at(texts.pop(trainer.new), texts)


def _why_no_growth(drifts: Mapping[str, Drift]) -> list[str]:
    """Why growing is not considered, a sentence; empty if it is."""
    alike, unanswered = _alike(drifts), _unanswered(drifts)
    if not alike and not unanswered:
        return []
    if alike == [TOGETHER] and not unanswered:
        return ["Growing is not considered: the new data differs from each known kind, but not from a mixture of them."]
    if alike:
        return ["Growing is not considered: the new data did not drift."]
    return [
        f"Growing is not considered: whether the new data drifted could not be tested against {', '.join(unanswered)}; "
        f"there are too few sources."
    ]


def _compare(new: DocumentSample, old: DocumentSample, config: DriftConfig, seed: int) -> Drift:
    """The drift test, with the stability index over clusters of the old documents."""
    centroids = spherical_kmeans(old.features_ND, min(CLUSTERS, len(old.features_ND)), seed=seed)
    new, old = (
        replace(side, counts_K=np.bincount(assign(side.features_ND, centroids), minlength=len(centroids)))
        for side in (new, old)
    )
    return measure_drift(new, old, config, seed=seed)


def _from_mixture(new: DocumentSample, old: Mapping[str, DocumentSample], config: DriftConfig, seed: int) -> Drift:
    """Drift from the mixture of old distributions that is nearest to the new documents."""
    shares = nearest_shares(new, old)
    rows = draw_mixture(old, shares, seed=seed)
    drift = _compare(
        new,
        _sample(
            np.concatenate([old[name].features_ND[chosen] for name, chosen in rows.items()]),
            # Prefixed: sources of the same name in two distributions are two sources.
            [f"{name} {old[name].sources[row]}" for name, chosen in rows.items() for row in chosen],
        ),
        config,
        seed,
    )
    mixture = ", ".join(f"{shares[name]:.0%} {name}" for name in rows)
    return replace(drift, words=f"{drift.words} The nearest mixture is {mixture}.")


def _sample(features_ND: NDArray[np.float64], sources: list[str]) -> DocumentSample:
    # One cluster stands in until _compare has clustered the old documents.
    return DocumentSample(features_ND, sources, np.array([len(sources)]))


def _view(trainer: CandidateTrainer, candidate: Candidate, name: str, config: DriftConfig, seed: int) -> _View:
    """Run the champion over the beginnings of some documents of a distribution."""
    documents = trainer.texts.at_hand(name)
    chosen = choose_documents([document.source for document in documents], config.documents, seed=seed)
    context = candidate.config.model.context
    shard = first_tokens(candidate.data.at_hand(name), chosen, context)
    windows = evaluation_windows(shard, context, shard.num_tokens)
    model = trainer.load(trainer.parent.key)
    # Without labels, also for old text: where routing depends on them, the new text has none, and labels of the old
    # text alone would tell the two apart.
    batch_tokens = candidate.config.evaluate.batch_tokens
    measured = measure_documents(model, windows, distribution=None, batch_tokens=batch_tokens)
    return _View(measured, [documents[chosen[i]] for i in measured.document])


def first_tokens(shard: TokenShard, documents: NDArray[np.int64], tokens: int) -> TokenShard:
    """Truncate some documents of a shard to their first tokens."""
    rows = [shard.document(int(i))[:tokens] for i in documents]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return replace(shard, tokens=np.concatenate(rows), offsets=offsets, text_bytes=shard.text_bytes[documents])


def _nearest_stage(trainer: CandidateTrainer, measured: DocumentMeasures, drifts: Mapping[str, Drift]) -> str:
    """The stage whose generation the batch is nearest to; see :func:`measure_batch`."""
    architecture = trainer.architecture
    if architecture.routing.by_label:
        # A batch has no label yet, so all of it was read by the first generation, whatever it is like.
        labels = dict(architecture.labels)
        aucs = {name: one.auc for name, one in drifts.items() if name in labels and one.auc is not None}
        if aucs:
            return architecture.generations[labels[min(aucs, key=lambda name: aucs[name])]].stage
    shares = generation_shares(measured.expert_counts, architecture)
    return max(shares, key=lambda stage: shares[stage])
