from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lifelong_moe.config.growth import GrowConfig
from lifelong_moe.config.routing.base import Bundles, Centroids, HashTable
from lifelong_moe.growth.clusters import fit_clusters
from lifelong_moe.growth.grow import grow
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel, initialize
from lifelong_moe.plan.architecture import Architecture, Generation
from lifelong_moe.routing.routers.cluster import TokenClusterRouter

MakeArchitecture = Callable[..., Architecture]
Batch = Callable[..., dict[str, Tensor]]
CLUSTERED = ["token_embedding", "token_hidden", "document", "bundles"]


def corpus(low: int, high: int) -> list[NDArray[np.int64]]:
    """Forty documents of BOS and tokens from a range; even ones use its lower half, odd ones its upper."""
    rng, middle = np.random.default_rng(low), (low + high) // 2
    bounds = [(low, middle), (middle, high)]
    return [np.append(0, rng.integers(*bounds[i % 2], size=30)) for i in range(40)]


def unfitted(architecture: Architecture) -> LanguageModel:
    model = LanguageModel(architecture)
    initialize(model, 0)
    return model


def fit(model: LanguageModel, documents: list[NDArray[np.int64]], sample: dict[str, Tensor], seed: int = 0) -> None:
    fit_clusters(model, documents, documents, sample, seed)


def fitted_buffers(model: LanguageModel) -> dict[str, Tensor]:
    """Centroids and projections; what routers derive from their generations is not kept."""
    buffers = dict(model.named_buffers())
    return {name: buffers[name] for name in model.state_dict() if name in buffers}


@pytest.mark.parametrize("kind", CLUSTERED)
def test_a_second_stage_leaves_the_first_one_s_clusters_alone(
    make_architecture: MakeArchitecture, make_batch: Batch, kind: str
) -> None:
    model, sample = unfitted(make_architecture(kind)), make_batch()
    fit(model, corpus(1, 31), sample)
    first = {name: tensor.clone() for name, tensor in fitted_buffers(model).items()}
    assert first and all(tensor.any() for tensor in first.values())
    grow(model, Generation("new", 2), GrowConfig(experts=2), sample, seed=0)
    fit(model, corpus(31, 61), sample, seed=1)
    after = fitted_buffers(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in first.items())
    new = {name: tensor for name, tensor in after.items() if name not in first}
    assert new and all(torch.isfinite(tensor).all() and tensor.any() for tensor in new.values())


@pytest.mark.parametrize("bundles", list(Bundles))
def test_later_centroids_are_of_what_older_ones_leave_to_them(
    make_architecture: MakeArchitecture, make_batch: Batch, bundles: Bundles
) -> None:
    """Each is the mean direction of its own tokens, where older ones take theirs first; a bundle's see no older ones.

    Half of the second stage's text is of the first one's kind.
    """
    model, sample = unfitted(make_architecture("token_embedding", routing={"bundles": bundles})), make_batch()
    fit(model, corpus(1, 31), sample)
    grow(model, Generation("new", 3), GrowConfig(experts=3), sample, seed=0)
    both = [*corpus(1, 31)[:20], *corpus(31, 61)[:20]]
    fit(model, both, sample, seed=1)
    assert model.token_features is not None
    features_NF = model.token_features.double()[torch.from_numpy(np.concatenate(both))]
    for layer in model.moe_layers():
        assert isinstance(layer.router, TokenClusterRouter)
        old_EF, new_EF = (centroids.double() for centroids in layer.router.centroids())
        rivals_EF = torch.cat([old_EF, new_EF]) if bundles == Bundles.none else new_EF
        owners_N = (features_NF @ rivals_EF.t()).argmax(dim=1) - (len(rivals_EF) - len(new_EF))
        for i, centroid_F in enumerate(new_EF):
            mean_F = features_NF[owners_N == i].mean(dim=0)
            torch.testing.assert_close(centroid_F, mean_F / mean_F.norm(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", CLUSTERED)
def test_fitting_is_a_function_of_the_seed(make_architecture: MakeArchitecture, make_batch: Batch, kind: str) -> None:
    models = [unfitted(make_architecture(kind)) for _ in range(2)]
    for model in models:
        fit(model, corpus(1, 31), make_batch())
    first, second = (dict(model.named_buffers()) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_documents_of_one_kind_share_experts(make_architecture: MakeArchitecture, make_batch: Batch) -> None:
    model = unfitted(make_architecture("document"))
    documents = corpus(1, 31)
    fit(model, documents, make_batch())
    assert model.document_clusters is not None
    domains = [model.document_clusters.domain_ids(document) for document in documents]
    assert all(domain[:4].tolist() == [0] * 4 for domain in domains)  # chunk 0 goes by the fixed prior
    late = np.array([domain[-1] for domain in domains])
    assert len(set(late[::2])) == len(set(late[1::2])) == 1 and late[0] != late[1]


def test_each_chunk_s_group_is_that_of_the_text_before_it(
    make_architecture: MakeArchitecture, make_batch: Batch
) -> None:
    model = unfitted(make_architecture("document"))
    documents = corpus(1, 31)
    fit(model, documents, make_batch())
    clusters = model.document_clusters
    assert clusters is not None
    mixed = np.concatenate([documents[0], documents[1][1:]])
    whole = clusters.domain_ids(mixed)
    for length in range(1, len(mixed) + 1):
        assert clusters.domain_ids(mixed[:length]).tolist() == whole[:length].tolist()
    assert len(set(whole)) == 2


@pytest.mark.parametrize("kind", ["learned", "label", "hash", "labelled_bundles"])
def test_other_routing_fits_nothing(make_architecture: MakeArchitecture, make_batch: Batch, kind: str) -> None:
    model = unfitted(make_architecture(kind))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit(model, corpus(1, 31), make_batch())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_each_stage_s_text_goes_to_its_bundle(make_architecture: MakeArchitecture, make_batch: Batch) -> None:
    model, sample = unfitted(make_architecture("bundles", routing={"margin": 1.0})), make_batch()
    old, new = corpus(1, 31), corpus(31, 61)
    fit(model, old, sample)
    clusters = model.document_clusters
    assert clusters is not None
    assert all(clusters.domain_ids(document).tolist() == [0] * 31 for document in new)
    before = [clusters.domain_ids(document) for document in old]
    grow(model, Generation("new", 2), GrowConfig(experts=2), sample, seed=0)
    fit(model, new, sample, seed=1)
    assert all((clusters.domain_ids(document) == ids).all() for document, ids in zip(old, before, strict=True))
    assert all(clusters.domain_ids(document).tolist() == [0] * 4 + [1] * 27 for document in new)


@pytest.mark.parametrize("kind", ["token_embedding", "token_hidden"])
def test_random_centroids_are_unit_directions_that_read_nothing(
    make_architecture: MakeArchitecture, make_batch: Batch, kind: str
) -> None:
    routers = []
    for low in (1, 31):
        model = unfitted(make_architecture(kind, routing={"centroids": Centroids.random}))
        fit(model, corpus(low, low + 30), make_batch(seed=low))
        routers.append([layer.router for layer in model.moe_layers()])
    for first, second in zip(*routers, strict=True):
        assert isinstance(first, TokenClusterRouter) and isinstance(second, TokenClusterRouter)
        (centroids,) = first.centroids()
        torch.testing.assert_close(centroids.norm(dim=1), torch.ones(4))
        assert torch.equal(centroids, second.centroids()[0]) and not first.hashing
    (lower,), (upper,) = (router.centroids() for router in routers[0])  # type: ignore[operator]
    assert not torch.equal(lower, upper)


@pytest.mark.parametrize(("kind", "domains"), [("document", [2, 3]), ("bundles", [1, 2])])
def test_random_clusters_of_documents(
    make_architecture: MakeArchitecture, make_batch: Batch, kind: str, domains: list[int]
) -> None:
    architecture = make_architecture(kind, routing={"centroids": Centroids.random})
    model, sample, documents = unfitted(architecture), make_batch(), corpus(1, 31)
    fit(model, documents, sample)
    clusters = model.document_clusters
    assert clusters is not None and not any(buffer.any() for buffer in clusters.buffers())
    before = [clusters.domain_ids(document) for document in documents]
    assert {int(ids[-1]) for ids in before} == set(range(domains[0]))
    assert all(ids[:4].tolist() == [0] * 4 and len(set(ids[4:])) == 1 for ids in before)
    grow(model, Generation("new", 2), GrowConfig(experts=2), sample, seed=0)
    after = [clusters.domain_ids(document) for document in documents]
    moved = [(a != b).any() for a, b in zip(before, after, strict=True)]
    assert 0 < sum(moved) < 40
    assert all(ids[-1] == domains[1] - 1 for ids, new in zip(after, moved, strict=True) if new)


@pytest.mark.parametrize("kind", ["document", "bundles", "unfitted", "random"])
def test_domains_of_many_documents_are_those_of_each(
    make_architecture: MakeArchitecture, make_batch: Batch, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = unfitted(make_architecture("bundles" if kind == "bundles" else "document"))
    if kind in ("document", "bundles"):
        fit(model, corpus(1, 31), make_batch())
    if kind == "bundles":  # one bundle alone leaves nothing to decide
        grow(model, Generation("new", 2), GrowConfig(experts=2), make_batch(), seed=0)
        fit(model, corpus(31, 61), make_batch(), seed=1)
    clusters = model.document_clusters
    assert clusters is not None
    if kind == "random":
        clusters.routing = replace(clusters.routing, centroids=Centroids.random)
    lengths = [31, 0, 1, 4, 5, 8, 31, 30, 2]
    documents = [one[:length] for one, length in zip([*corpus(1, 31), *corpus(31, 61)][::9], lengths, strict=True)]
    alone = [clusters.domain_ids(document) for document in documents]
    assert [len(ids) for ids in alone] == lengths
    assert (
        len(set(np.concatenate(alone).tolist())) == 1 if kind == "unfitted" else max(map(max, filter(len, alone))) > 0
    )
    monkeypatch.setattr("lifelong_moe.model.domains.BATCH_TOKENS", 40)
    parts = list(clusters.domain_id_batches(iter(documents)))
    assert len(parts) > 1 and max(len(part) for part in parts) < 40 + 31
    np.testing.assert_array_equal(np.concatenate(parts), np.concatenate(alone))


def greedy_loads(counts: list[int], num: int) -> list[int]:
    """Text of each bucket where each id, the most frequent first, goes where least is so far."""
    loads = [0] * num
    for count in sorted(counts, reverse=True):
        loads[loads.index(min(loads))] += count
    return sorted(loads)


def text_of_many_frequencies() -> NDArray[np.int64]:
    rng = np.random.default_rng(0)
    return rng.permutation(np.repeat(np.arange(61), (200 / np.arange(1, 62)).astype(np.int64) + rng.integers(0, 5, 61)))


TABLE = {"mode": "hash", "top_k": 1, "renormalize": False}


@pytest.mark.parametrize("experts", [[3, 4], [4, 3], [2, 5], [4, 4]])
def test_a_balanced_table_is_balanced_in_every_layer(make_architecture: MakeArchitecture, experts: list[int]) -> None:
    made = make_architecture("hash", model={"experts": experts}, routing={**TABLE, "table": HashTable.balanced})
    made = replace(made, generations=(Generation("s0", max(experts), (0, 1), by_layer=tuple(experts)),))
    model, stream = unfitted(made).eval(), text_of_many_frequencies()
    fit_clusters(model, [], [stream], {}, 0)
    counts = np.bincount(stream, minlength=61)
    routings = model(TokenBatch(torch.from_numpy(stream).unsqueeze(0))).routings
    for num, routing in zip(experts, routings, strict=True):
        loads = sorted(routing.counts_E.tolist())
        assert loads[-1] - loads[0] <= counts.max()
        assert loads == greedy_loads(counts.tolist(), num)
    again = LanguageModel(made)
    again.load_state_dict(model.state_dict(), strict=True)
    tables = {name: table.clone() for name, table in again.named_buffers() if "token_buckets" in name}
    assert len(tables) == len(set(experts))
    fit_clusters(again, [], [stream[:5]], {}, 0)  # a later stage finds them as they are
    assert all(torch.equal(dict(again.named_buffers())[name], table) for name, table in tables.items())


def test_a_clustered_table_has_a_clustering_for_each_number(make_architecture: MakeArchitecture) -> None:
    made = make_architecture("hash", routing={**TABLE, "table": HashTable.clustered})
    made = replace(made, generations=(Generation("s0", 4, (0, 1), by_layer=(3, 4)),))
    model = unfitted(made)
    fit_clusters(model, [], [text_of_many_frequencies()], {}, 0)
    of_three, of_four = (getattr(model, name) for name in ("token_buckets_3", "token_buckets"))
    assert set(of_three.tolist()) == {0, 1, 2} and set(of_four.tolist()) == {0, 1, 2, 3}
    assert not torch.equal(of_three, of_four % 3)


def test_a_clustered_table_puts_tokens_of_one_company_together(make_architecture: MakeArchitecture) -> None:
    model = unfitted(make_architecture("hash", (2,), routing={**TABLE, "table": HashTable.clustered}))
    fit(model, corpus(1, 31), {})
    lower, upper = (set(model.token_buckets[ids].tolist()) for ids in (slice(1, 16), slice(16, 31)))  # type: ignore[index, operator]
    assert len(lower) == len(upper) == 1 and lower != upper


def test_one_table_of_an_earlier_version_means_what_it_meant(make_architecture: MakeArchitecture) -> None:
    made = make_architecture("hash", routing={**TABLE, "table": HashTable.balanced})
    made = replace(made, generations=(Generation("s0", 4, (0, 1), by_layer=(3, 4)),))
    model, kept = LanguageModel(made), torch.arange(61) * 7 % 4
    state = {name: tensor for name, tensor in unfitted(made).state_dict().items() if name != "token_buckets_3"}
    model.load_state_dict({**state, "token_buckets": kept}, strict=True)
    ids = torch.arange(61).unsqueeze(0)
    for layer, (num, routing) in enumerate(zip((3, 4), model.eval()(TokenBatch(ids)).routings, strict=True)):
        assert torch.equal(routing.expert_ids_TK.squeeze(1), (kept + layer) % num)
