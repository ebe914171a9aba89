"""What is left when a generation goes, by tables that can be checked by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lifelong_moe.config.routing.base import Centroids
from lifelong_moe.errors import ConfigError
from lifelong_moe.growth.remove import remove_generation, renamed, without_generation
from lifelong_moe.plan.architecture import Architecture, Generation

MakeArchitecture = Callable[..., Architecture]


@pytest.fixture
def four(make_architecture: MakeArchitecture) -> Architecture:
    """Generations a, b, c and d of 4, 2, 3 and 1 experts; b grew in layer 0 alone. Only d trains."""
    architecture = make_architecture("learned")
    generations = (Generation("a", 4), Generation("b", 2, layers=(0,)), Generation("c", 3), Generation("d", 1))
    labels = (("one", 0), ("two", 1), ("three", 2), ("four", 3), ("also two", 1))
    return replace(architecture, generations=generations, frozen=3, labels=labels)


@pytest.mark.parametrize(
    ("index", "frozen", "trains"),
    [
        (1, 3, "d"),
        (2, 3, "d"),
        (3, 3, "c"),  # the newest one left
        (1, 2, "cd"),
        (2, 2, "d"),
        (3, 2, "c"),
        (1, 1, "cd"),
        (2, 1, "bd"),
        (1, 0, "acd"),
        (3, 0, "abc"),
    ],
)
def test_what_trained_trains_on(four: Architecture, index: int, frozen: int, trains: str) -> None:
    after = without_generation(replace(four, frozen=frozen), index)
    assert [g.stage for g in after.generations] == [stage for i, stage in enumerate("abcd") if i != index]
    assert "".join(g.stage for i, g in enumerate(after.generations) if after.trains(i)) == trains


@pytest.mark.parametrize(("continued", "index", "left"), [(1, 1, None), (2, 1, 1), (1, 2, 1), (3, 1, 2), (0, 3, 0)])
def test_the_generation_that_was_continued_moves_up(
    four: Architecture, continued: int, index: int, left: int | None
) -> None:
    assert without_generation(replace(four, frozen=4, continued=continued), index).continued == left


def test_labels_move_up_and_those_of_the_generation_go(four: Architecture) -> None:
    assert dict(without_generation(four, 1).labels) == {"one": 0, "three": 1, "four": 2}
    assert dict(without_generation(four, 3).labels) == {"one": 0, "two": 1, "three": 2, "also two": 1}


@pytest.mark.parametrize(
    ("name", "new"),
    [
        # Layer 0 has experts a 0–3, b 4–5, c 6–8, d 9; layer 1 has a 0–3, c 4–6, d 7.
        ("blocks.0.moe.banks.experts.3.gate_up", "blocks.0.moe.banks.experts.3.gate_up"),
        ("blocks.0.moe.banks.experts.4.down", None),
        ("blocks.0.moe.banks.experts.5.down", None),
        ("blocks.0.moe.banks.experts.6.down", "blocks.0.moe.banks.experts.4.down"),
        ("blocks.0.moe.banks.experts.9.down", "blocks.0.moe.banks.experts.7.down"),
        ("blocks.1.moe.banks.experts.4.down", "blocks.1.moe.banks.experts.4.down"),
        ("blocks.1.moe.banks.experts.7.down", "blocks.1.moe.banks.experts.7.down"),
        ("blocks.0.moe.router.rows.0", "blocks.0.moe.router.rows.0"),
        ("blocks.0.moe.router.rows.1", None),
        ("blocks.0.moe.router.rows.2", "blocks.0.moe.router.rows.1"),
        ("blocks.1.moe.router.rows.3", "blocks.1.moe.router.rows.2"),
        ("blocks.0.moe.router.bias_2", "blocks.0.moe.router.bias_1"),
        ("document_clusters.centroids_1", None),
        ("document_clusters.centroids_3", "document_clusters.centroids_2"),
        ("blocks.0.attention.qkv.deltas.1.up", None),
        ("blocks.0.attention.qkv.deltas.3.down", "blocks.0.attention.qkv.deltas.2.down"),
        ("blocks.1.attention.qkv.weight", "blocks.1.attention.qkv.weight"),
        ("embedding.weight", "embedding.weight"),
    ],
)
def test_names_of_what_is_left(four: Architecture, name: str, new: str | None) -> None:
    assert renamed(four, name, 1) == new


def test_tensors_are_kept_as_they_are(four: Architecture) -> None:
    names = [f"blocks.0.moe.banks.experts.{i}.down" for i in range(10)]
    tensors = {name: torch.full((2,), float(i)) for i, name in enumerate(names)}
    _, left = remove_generation(four, tensors, 2)
    assert [float(left[name][0]) for name in names[:7]] == [0, 1, 2, 3, 4, 5, 9] and len(left) == 7
    assert len(tensors) == 10


def test_the_first_generation_cannot_go(four: Architecture) -> None:
    with pytest.raises(ConfigError, match="stage a is the first"):
        remove_generation(four, {}, 0)


@pytest.mark.parametrize("kind", ["hash", "document"])
def test_where_experts_are_numbered_only_the_newest_can_go(
    four: Architecture, make_architecture: MakeArchitecture, kind: str
) -> None:
    routing = make_architecture(kind).routing
    hashed = replace(four, routing=routing if kind == "hash" else replace(routing, centroids=Centroids.random))
    with pytest.raises(ConfigError, match="Remove the newest stage first"):
        remove_generation(hashed, {}, 2)
    assert len(remove_generation(hashed, {}, 3)[0].generations) == 3
    if kind == "document":  # fitted centroids are each generation's own
        assert len(remove_generation(replace(four, routing=routing), {}, 2)[0].generations) == 3


def test_what_a_router_of_one_s_own_keeps_is_unknown(four: Architecture) -> None:
    with pytest.raises(ConfigError, match="custom router"):
        remove_generation(replace(four, routing=replace(four.routing, mode="some.Router")), {}, 3)
