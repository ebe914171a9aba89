from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from threadpoolctl import threadpool_limits

from lifelong_moe.config.routing.base import Centroids
from lifelong_moe.model.domains import DocumentClusters, GenerationClusters, TfidfClusters, build_document_clusters
from lifelong_moe.plan.architecture import Architecture

MakeArchitecture = Callable[..., Architecture]
VOCAB = 61


def log_probabilities(likely: int) -> NDArray[np.float32]:
    """One centroid: half of the probability on one token, the rest spread evenly."""
    shares = np.full((1, VOCAB), 0.5 / (VOCAB - 1))
    shares[0, likely] = 0.5
    return np.log(shares).astype(np.float32)


@pytest.fixture
def bundles(make_architecture: MakeArchitecture) -> DocumentClusters:
    """Three bundles with one centroid each; token g + 1 speaks for bundle g."""
    return built(make_architecture("bundles", routing={"clusters": 1, "margin": 4.0, "chunk_tokens": 2}), 3)


def built(architecture: Architecture, generations: int) -> DocumentClusters:
    clusters = build_document_clusters(architecture)
    assert clusters is not None
    for g in range(generations):
        clusters.add(2)
        if isinstance(clusters, GenerationClusters):
            clusters.set_centroids(log_probabilities(g + 1))
    return clusters


def test_only_routing_by_document_has_clusters(make_architecture: MakeArchitecture) -> None:
    kinds = {
        "learned": None,
        "label": None,
        "hash": None,
        "labelled_bundles": None,
        "document": TfidfClusters,
        "bundles": GenerationClusters,
    }
    found = {kind: build_document_clusters(make_architecture(kind)) for kind in kinds}
    assert {kind: None if made is None else type(made) for kind, made in found.items()} == kinds


def test_domains_by_hand(bundles: DocumentClusters) -> None:
    # One token that speaks for a bundle is worth ln(0.5 / (0.5 / 60)) = 4.09 nats over each other bundle, just above
    # the margin; chunks are decided at 0, 2, 4, … from what stands before.
    assert bundles.domain_ids(np.array([0, 2, 9, 9, 3])).tolist() == [0, 0, 1, 1, 1]
    assert bundles.domain_ids(np.array([0, 1, 2, 9, 9])).tolist() == [0, 0, 0, 0, 0]  # a tie goes to the older
    assert bundles.domain_ids(np.array([0, 3, 1, 1, 9, 9])).tolist() == [0, 0, 2, 2, 0, 0]
    assert bundles.domain_ids(np.array([0])).tolist() == [0]


def test_a_generation_that_is_not_fitted_yet_takes_nothing(bundles: DocumentClusters) -> None:
    document = np.array([0, 3, 3, 3, 3])
    before = bundles.domain_ids(document)
    bundles.add(2)
    assert bundles.domain_ids(document).tolist() == before.tolist() == [0, 0, 2, 2, 2]
    assert [len(c) for c in bundles.all_centroids()] == [1] * 4 and len(bundles.centroids()) == 3
    assert bundles.num_domains() == 4


def test_before_the_first_fit_all_is_in_group_0(make_architecture: MakeArchitecture) -> None:
    for kind in ("document", "bundles"):
        clusters = build_document_clusters(make_architecture(kind))
        assert clusters is not None
        clusters.add(4)
        assert clusters.domain_ids(np.arange(20)).tolist() == [0] * 20


def test_the_same_after_save_and_load_and_with_any_threads(
    make_architecture: MakeArchitecture, bundles: DocumentClusters
) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(6, size=30) for _ in range(20)]
    expected = [bundles.domain_ids(document).tolist() for document in documents]
    assert {group for ids in expected for group in ids} == {0, 1, 2}
    architecture = make_architecture("bundles", routing={"clusters": 1, "margin": 4.0, "chunk_tokens": 2})
    again = built(Architecture.from_json(architecture.to_json()), 3)
    for buffer in again.buffers():
        buffer.zero_()
    again.load_state_dict(load(save(bundles.state_dict())))
    for threads in (1, 2):
        with threadpool_limits(limits=threads):
            assert [again.domain_ids(document).tolist() for document in documents] == expected


@pytest.mark.parametrize(("kind", "num_domains"), [("bundles", 3), ("document", 4)])
def test_random_domains_need_no_fit(make_architecture: MakeArchitecture, kind: str, num_domains: int) -> None:
    documents = [np.random.default_rng(seed).integers(1, VOCAB, size=12) for seed in range(60)]
    clusters = build_document_clusters(make_architecture(kind, routing={"centroids": Centroids.random}))
    assert clusters is not None
    for experts in (4, 2, 2):  # two clusters of two experts, then one and one; or a bundle each time
        clusters.add(experts)
    assert clusters.num_domains() == num_domains
    ids = [clusters.domain_ids(document) for document in documents]
    assert {int(domains[-1]) for domains in ids} == set(range(num_domains))
    assert all(domains[:4].tolist() == [0] * 4 for domains in ids)
    assert not any(bool(torch.any(buffer)) for buffer in clusters.buffers())
