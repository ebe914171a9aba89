"""Inspect what experts specialize in, from observed routing. Pure: plain JSON data out.

Keys of ``inspection.json`` (schema 1):

====================  =========================================================================================
``schema``            1
``tokens``            {distribution: held-out tokens read}
``layers``            a list, one object a layer:
``·layer``            its number
``·experts``          names, ``STAGE/L<layer>/E<index>``
``·counts``           {distribution: assignments per expert}
``·token``            mutual information of expert and token id: ``nats``, ``null_mean``, ``null_95``
``·distribution``     the same of expert and distribution; null if there is one distribution only
``·leak``             {distribution: share of assignments to experts born after the stage that learned it}
``·dead``             names of experts that almost no token reaches
``·top_tokens``       {expert: [{``token_id``, ``text``, ``count``, ``lift``}]}
``·coactivation``     row i: share of expert i's tokens that expert j gets too; null on the diagonal and where
                      i has none
``·similarity``       mean cosine of the outputs of experts i and j
``saturation``        {earlier stage: {distribution: per layer, share of chosen experts that are the last model's}}
``shuffled``          {distribution: {``nats_per_token``, ``shuffled_nats_per_token``}}: held-out loss, and what it
                      becomes when the experts of each layer swap places
====================  =========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.evaluation.probing import Observation, expert_names
from lifelong_moe.evaluation.routing import DEAD_SHARE, routing_statistics
from lifelong_moe.evaluation.specialization import (
    Information,
    agreement,
    coactivation,
    information,
    joint_counts,
    top_tokens,
)
from lifelong_moe.plan.architecture import Architecture

SCHEMA = 1


@dataclass(frozen=True, eq=False)
class Readings:
    """Observations of a model and its earlier stages on the same held-out text."""

    observed: Mapping[str, Observation]
    """Its routing, by distribution."""
    earlier: Mapping[str, Mapping[str, Observation]]
    """The routing of each earlier stage."""
    similarities: Sequence[NDArray[Any]]
    """For each layer the cosines between its experts' outputs ``(E, E)``."""
    losses: Mapping[str, tuple[float, float]]
    """For each distribution nats per token, and the same with shuffled experts."""


@dataclass(frozen=True)
class _Layer:
    """Measures of one layer; the table above lists them."""

    experts: list[str]
    counts: dict[str, list[int]]
    token: Information
    distribution: Information | None
    dead: list[str]
    top_tokens: dict[str, list[dict[str, object]]]
    coactivation: list[list[float | None]]


def build_inspection(
    architecture: Architecture,
    readings: Readings,
    *,
    stages: Sequence[str],
    learned_in: Mapping[str, int],
    name_token: Callable[[int], str],
) -> dict[str, Any]:
    """Inspect each layer.

    Args:
        architecture: Of the model that was observed.
        readings: Its observations.
        stages: Names of the stages that led to it, oldest first.
        learned_in: Index of the last stage that learned each distribution, if any did.
        name_token: Text of a token id.
    """
    index = {name: i for i, name in enumerate(stages)}
    layers = []
    for layer, similarity_EE in enumerate(readings.similarities):
        if not len(similarity_EE):
            continue  # a dense layer
        births_E = [index[name] for name in architecture.expert_births(layer)]
        measured = _layer(expert_names(architecture, layer), layer, readings.observed, name_token)
        # A distribution that no stage learned counts as learned after the last: nothing leaks from it.
        leak = {
            name: routing_statistics([counts], [births_E], learned_in.get(name, len(stages))).leak
            for name, counts in measured.counts.items()
        }
        layers.append({"layer": layer, **asdict(measured), "leak": leak, "similarity": _json_matrix(similarity_EE)})
    return {
        "schema": SCHEMA,
        "tokens": {name: len(seen) for name, seen in readings.observed.items()},
        "layers": layers,
        "saturation": {stage: _saturation(before, readings.observed) for stage, before in readings.earlier.items()},
        "shuffled": {
            name: {"nats_per_token": loss, "shuffled_nats_per_token": shuffled}
            for name, (loss, shuffled) in readings.losses.items()
        },
    }


def _layer(
    names: Sequence[str], layer: int, observed: Mapping[str, Observation], name_token: Callable[[int], str]
) -> _Layer:
    """Measure one layer over all distributions together."""
    experts = len(names)
    ids_TK = np.concatenate([seen.expert_ids[layer] for seen in observed.values()])
    token_ids_T = np.concatenate([seen.token_ids_T for seen in observed.values()])
    # All distributions together: an expert that serves one of them alone shows only beside the others. shape: (T,)
    distribution_T = np.repeat(np.arange(len(observed)), [len(seen) for seen in observed.values()])
    # shape: (E, J), a column per distribution
    counts_EJ, _ = joint_counts(ids_TK, distribution_T, experts)
    # Pooled over distributions: an expert is dead only if none of them uses it.
    share_E = counts_EJ.sum(axis=1) / counts_EJ.sum()
    tops = top_tokens(ids_TK, token_ids_T, experts)
    return _Layer(
        experts=list(names),
        counts=dict(zip(observed, counts_EJ.T.tolist(), strict=True)),
        token=information(ids_TK, token_ids_T, experts),
        distribution=information(ids_TK, distribution_T, experts) if len(observed) > 1 else None,
        dead=[name for name, share in zip(names, share_E, strict=True) if share < DEAD_SHARE / experts],
        top_tokens={
            name: [asdict(token) | {"text": name_token(token.token_id)} for token in tokens]
            for name, tokens in zip(names, tops, strict=True)
        },
        coactivation=_json_matrix(coactivation(ids_TK, experts)),
    )


def _saturation(before: Mapping[str, Observation], now: Mapping[str, Observation]) -> dict[str, list[float]]:
    return {
        name: [
            agreement(first_TK, second_TK)
            for first_TK, second_TK in zip(before[name].expert_ids, seen.expert_ids, strict=True)
            # Dense layers choose nothing.
            if second_TK.shape[1]
        ]
        for name, seen in now.items()
    }


def _json_matrix(matrix: NDArray[Any]) -> list[list[float | None]]:
    """Rows of a matrix, NaN as None."""
    # JSON has no NaN; six decimals keep the file small and its figures unchanged.
    return [[None if np.isnan(value) else round(float(value), 6) for value in row] for row in matrix]
