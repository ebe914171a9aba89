"""What a mode brings, what a key may be at most and at least, and what follows from keys, by tables."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from lifelong_moe.config.routing.base import (
    STORED,
    BalanceCounts,
    BalanceOver,
    BalanceScope,
    Bundles,
    Centroids,
    Features,
    HashTable,
    Level,
    Score,
    SecondExpert,
)
from lifelong_moe.config.routing.capacity import CapacityConfig, Counts, Overflow, Priority, Rounding
from lifelong_moe.config.routing.mixture import MixtureConfig
from lifelong_moe.config.routing.modes import keys_of, stored_routing
from lifelong_moe.errors import ConfigError
from tests.conftest import build_run, routing_of

NO_LOSSES = {"balance_loss": 0.0, "z_loss": 0.0}
BROUGHT: dict[str, dict[str, Any]] = {
    # Switch (arXiv:2101.03961), section 2.2: a coefficient of 0.01.
    "switch": {"top_k": 1, "renormalize": False, "jitter": 0.01, "balance_loss": 0.01, "z_loss": 0.0},
    "gshard": {
        "top_k": 2, "second": SecondExpert.random, "balance_counts": BalanceCounts.first, "balance_loss": 0.01,
        "z_loss": 0.0,
    },
    # Shazeer et al. (arXiv:1701.06538), appendix C.1: both 0.1.
    "noisy_topk": {"top_k": 2, "importance_loss": 0.1, "load_loss": 0.1, **NO_LOSSES},
    # V-MoE (arXiv:2106.05974), appendix A: 0.01 times the mean of the two.
    "vmoe": {"top_k": 2, "renormalize": False, "importance_loss": 0.005, "load_loss": 0.005, **NO_LOSSES},
    "hierarchical": {"top_k": 4, "expert_groups": 2, "top_groups": 2, "z_loss": 0.0, "balance_loss": 0.0025},
    "dense": NO_LOSSES,
    "relu": {"top_k": 2, "renormalize": False, **NO_LOSSES},
    "base": {"top_k": 1, "renormalize": False, **NO_LOSSES},
    "expert_choice": {"top_k": 2, "renormalize": False, **NO_LOSSES},
    "learned": {"top_k": 2, "renormalize": True, "balance_loss": 0.0025, "z_loss": 0.00025, "jitter": 0.0},
}  # fmt: skip
ROOM: dict[str, CapacityConfig | None] = {
    "switch": CapacityConfig(factor=1.25, eval_factor=2.0, least=4),
    "gshard": CapacityConfig(factor=2.0, eval_factor=2.0, least=4),
    "vmoe": CapacityConfig(
        factor=1.05, eval_factor=1.05, counts=Counts.assignments, rounding=Rounding.up, multiple=4, least=1,
        priority=Priority.batch,
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", BROUGHT)
def test_a_mode_brings_its_authors_values(mode: str) -> None:
    permission = ["routing.allow_noncausal=true"] if mode in ("base", "expert_choice", "vmoe") else []
    routing = build_run(f"routing.mode={mode}", *permission).routing
    brought = routing.to_json()  # also what it has no key for
    assert {key: brought[key] for key in BROUGHT[mode]} == BROUGHT[mode]
    assert routing.capacity == ROOM.get(mode)


@pytest.mark.parametrize(
    ("key", "legal", "refused"),
    [
        ("top_k", [1, 2], [0, -1]),
        ("clusters", [None, 1], [0]),
        ("jitter", [0.0, 0.99], [-0.01, 1.0]),
        ("bias_rate", [0.0, 1e-9], [-0.1]),
        ("balance_loss", [0.0], [-1e-9]),
        ("z_loss", [0.0], [-1e-9]),
        ("margin", [0.0], [-1e-9]),
        ("gate_scale", [1e-9], [0.0]),
        ("chunk_tokens", [1], [0]),
        ("feature_width", [1], [0]),
        ("expert_groups", [1, 2], [0]),
        ("top_groups", [1, 4], [0, 5]),
    ],
)
def test_the_ends_of_a_range(key: str, legal: list[Any], refused: list[Any]) -> None:
    more = {"expert_groups": 4} if key == "top_groups" else {}
    for value in legal:
        assert getattr(routing_of(**{"renormalize": False, **more, key: value}), key) == value
    for value in refused:
        with pytest.raises(ConfigError, match=rf"routing\.{key}={value} must"):
            routing_of(**{"renormalize": False, **more, key: value})


@pytest.mark.parametrize(("key", "least"), [("factor", 1e-9), ("eval_factor", 1e-9), ("multiple", 1), ("least", 1)])
def test_the_least_room(key: str, least: float) -> None:
    values: dict[str, Any] = {key: least}
    assert getattr(CapacityConfig(**values), key) == least
    with pytest.raises(ConfigError, match=rf"routing\.capacity\.{key}=0 must"):
        CapacityConfig(**{key: 0})


def test_one_expert_may_not_be_divided_by_itself() -> None:
    with pytest.raises(ConfigError, match="the router gets no gradient"):
        routing_of(top_k=1, renormalize=True)
    routing_of(top_k=1, renormalize=False)
    with pytest.raises(ConfigError, match="the router gets no gradient"):
        routing_of(mode="noisy_topk", top_k=1).require_gate_gradient()


def test_options_are_for_a_router_of_ones_own() -> None:
    assert routing_of(mode="some.Router", options={"x": 1}).settings()["options"] == {"x": 1}


def test_many_hashes_use_one_expert_of_each_group() -> None:
    routing_of(mode="hash", expert_groups=2, top_k=2)
    routing_of(mode="hash", expert_groups=1, top_k=3)
    routing_of(expert_groups=2, top_k=3)
    with pytest.raises(ConfigError, match=r"routing\.top_k=3 must be routing\.expert_groups=2"):
        routing_of(mode="hash", expert_groups=2, top_k=3)


@pytest.mark.parametrize("table", list(HashTable))
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_table_gives_one_expert(table: HashTable, top_k: int) -> None:
    if table != HashTable.random and top_k > 1:
        with pytest.raises(ConfigError, match=r"gives each token id one expert: set routing\.top_k=1"):
            routing_of(mode="hash", table=table, top_k=top_k)
    else:
        routing = routing_of(mode="hash", table=table, top_k=top_k)
        assert (routing.has_table, routing.is_clustered) == (table != HashTable.random,) * 2
        assert routing.fixed_by == (f"routing.table={table}" if routing.has_table else None)


@pytest.mark.parametrize(
    ("values", "varies_by_process"),
    [
        ({}, False),
        ({"jitter": 0.01}, True),
        ({"mode": "noisy_topk"}, True),
        ({"mode": "vmoe"}, True),
        ({"mode": "gshard", "second": SecondExpert.random}, True),
        ({"mode": "gshard", "second": SecondExpert.threshold}, False),
        ({"capacity": CapacityConfig(priority=Priority.random)}, True),
        ({"capacity": CapacityConfig(priority=Priority.choice)}, False),
        ({"mode": "base", "top_k": 1}, True),
        ({"mode": "expert_choice"}, False),
        ({"mode": "hash"}, False),
        ({"mode": "some.Router"}, True),
    ],
)
def test_who_depends_on_the_number_of_processes(values: dict[str, Any], varies_by_process: bool) -> None:
    assert routing_of(**values).varies_by_process is varies_by_process


@pytest.mark.parametrize(
    ("values", "by_document", "is_clustered", "by_generation", "by_label"),
    [
        ({}, False, False, False, False),
        ({"mode": "cluster"}, False, True, False, False),
        ({"mode": "cluster", "level": Level.document}, True, True, False, False),
        ({"bundles": Bundles.cluster}, True, True, True, False),
        ({"bundles": Bundles.label}, False, False, True, True),
        ({"mode": "label"}, False, False, True, True),
        ({"mode": "hash"}, False, False, False, False),
        ({"mode": "cluster", "bundles": Bundles.cluster}, True, True, True, False),
    ],
)
def test_what_a_tokens_group_is(
    values: dict[str, Any], by_document: bool, is_clustered: bool, by_generation: bool, by_label: bool
) -> None:
    routing = routing_of(**values)
    found = (routing.by_document, routing.is_clustered, routing.by_generation, routing.by_label)
    assert found == (by_document, is_clustered, by_generation, by_label)


@pytest.mark.parametrize(
    ("values", "noncausal_by"),
    [
        ({}, None),
        ({"capacity": CapacityConfig()}, None),
        ({"capacity": CapacityConfig(priority=Priority.batch)}, "routing.capacity.priority=batch"),
        ({"capacity": CapacityConfig(overflow=Overflow.next_choice)}, "routing.capacity.overflow=next_choice"),
        (
            {"capacity": CapacityConfig(overflow=Overflow.next_choice, priority=Priority.choice)},
            "routing.capacity.priority=choice",
        ),
        ({"mode": "base", "top_k": 1}, "routing.mode=base"),
        ({"mode": "expert_choice"}, "routing.mode=expert_choice"),
    ],
)
def test_by_what_later_tokens_change_earlier_ones(values: dict[str, Any], noncausal_by: str | None) -> None:
    assert routing_of(**values).noncausal_by == noncausal_by


@pytest.mark.parametrize(("top_k", "top_groups", "groups", "experts", "expected"), [
    (4, 2, 2, 8, 2), (4, 2, 3, 8, 3), (4, 2, 8, 8, 4), (4, 2, 2, 3, 1), (6, 2, 4, 6, 2), (4, 2, 2, 1, 0),
])  # fmt: skip
def test_groups_of_a_generation(top_k: int, top_groups: int, groups: int, experts: int, expected: int) -> None:
    routing = routing_of(mode="hierarchical", top_k=top_k, top_groups=top_groups, expert_groups=groups)
    assert routing.groups_of(experts) == expected


def test_clusters_of_a_generation() -> None:
    documents = {"mode": "cluster", "level": Level.document}
    assert [routing_of(**documents, top_k=2).num_clusters(n) for n in (1, 2, 5, 8)] == [1, 1, 2, 4]  # type: ignore[arg-type]
    assert routing_of(**documents, clusters=3).num_clusters(8) == 3  # type: ignore[arg-type]
    assert routing_of(bundles=Bundles.cluster).num_clusters(2) == 8
    assert routing_of(bundles=Bundles.cluster, clusters=5).num_clusters(2) == 5


EVERYTHING: dict[str, Any] = {
    "balance_loss": 0.5, "z_loss": 0.5, "balance_over": BalanceOver.active, "balance_scope": BalanceScope.sequence,
    "margin": 1.0, "scale": 2.0, "centroids": Centroids.random, "clusters": 3, "chunk_tokens": 7, "feature_width": 9,
    "sample_tokens": 11, "features": Features.hidden, "level": Level.document, "mixture": MixtureConfig(drop=0.5),
}  # fmt: skip
"""Of each key another value than its default."""


@pytest.mark.parametrize(
    ("values", "grown", "keeps"),
    [
        ({"mode": "learned"}, True, {"balance_loss", "z_loss", "balance_over", "balance_scope"}),
        ({"mode": "learned"}, False, {"balance_loss", "z_loss", "balance_scope"}),
        ({"mode": "learned", "balance_loss": 0.0}, True, {"balance_loss", "z_loss"}),
        ({"mode": "label"}, True, set()),
        ({"mode": "hash"}, True, set()),
        ({"mode": "cluster", "level": Level.token}, True, {"features", "scale", "centroids", "sample_tokens"}),
        (
            {"mode": "cluster", "level": Level.token, "features": Features.embedding},
            True,
            {"scale", "centroids", "sample_tokens", "feature_width"},
        ),
        ({"mode": "cluster"}, True, {"level", "centroids", "clusters", "chunk_tokens"}),
        (
            {"mode": "cluster", "centroids": Centroids.fitted},
            True,
            {"level", "clusters", "chunk_tokens", "feature_width"},
        ),
        (
            {"bundles": Bundles.cluster, "centroids": Centroids.fitted},
            True,
            {"balance_loss", "z_loss", "balance_over", "balance_scope", "margin", "clusters", "chunk_tokens",
             "feature_width", "sample_tokens", "mixture"},
        ),
        ({"bundles": Bundles.label}, True, {"balance_loss", "z_loss", "balance_over", "balance_scope"}),
        ({"mode": "hash", "table": HashTable.clustered, "top_k": 1}, True, {"feature_width"}),
        ({"mode": "hash", "table": HashTable.balanced, "top_k": 1}, True, set()),
    ],
)  # fmt: skip
def test_keys_that_shape_something_are_kept_and_no_others(values: dict[str, Any], grown: bool, keeps: set[str]) -> None:
    own = keys_of(values.get("mode", "learned"))
    written = routing_of(**{key: value for key, value in {**EVERYTHING, **values}.items() if key in own})
    found = written.effective(grown=grown).to_json()
    assert {key for key in EVERYTHING if key in found and found[key] != STORED.get(key)} == keeps
    assert all(found[key] == asdict(written)[key] for key in keeps)


def test_stages_of_earlier_versions_select_a_generation() -> None:
    routing = {"mode": "learned", "bundles": "cluster"}
    assert stored_routing(routing).mixture is None
    assert routing_of(bundles=Bundles.cluster).mixture == MixtureConfig()
    # Their keys and records stay as they are.
    assert "mixture" not in stored_routing(routing).to_json()
    again = stored_routing(routing_of(bundles=Bundles.cluster).to_json())
    assert again == routing_of(bundles=Bundles.cluster)


def test_what_is_read_has_the_types_that_were_written() -> None:
    capacity = CapacityConfig(priority=Priority.batch, overflow=Overflow.next_choice, rounding=Rounding.up)
    written = routing_of(score=Score.sigmoid, bias_rate=0.1, capacity=capacity, balance_scope=BalanceScope.sequence)
    plain = written.to_json() | {"score": "sigmoid", "balance_scope": "sequence"}
    read = stored_routing(plain)
    assert read == written
    for key in ("score", "balance_scope", "balance_counts"):
        assert type(getattr(read, key)) is type(getattr(written, key)), key
    assert read.capacity is not None and type(read.capacity.priority) is Priority
