from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lifelong_moe.config.model import ModelConfig
from lifelong_moe.config.parts import Part
from lifelong_moe.config.routing import own
from lifelong_moe.config.routing.base import Bundles, Level, RoutingConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Architecture, Generation
from lifelong_moe.routing.base import Causality, Router, Routing, RoutingContext
from lifelong_moe.routing.registry import build_router
from lifelong_moe.routing.routers.learned import LearnedRouter
from tests.conftest import routing_of

NOWHERE = {"nowhere.at.All", ".All", "..All"}


class FirstExperts(Router):
    """Sends every token to the first experts from ``skip`` on."""

    trained = False

    def __init__(self, config: RoutingConfig, *, width: int, layer: int, skip: int = 0) -> None:
        super().__init__(config, width=width, layer=layer)
        self.skip = skip

    def add_experts(self, num: int) -> None:
        self.generations.append(num)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        top_k = self.config.top_k
        ids = (self.skip + torch.arange(top_k)).expand(len(x_TD), top_k)
        return Routing(ids, torch.full((len(x_TD), top_k), 1 / top_k), self.num_experts)


class TwoLayers(FirstExperts):
    """Has a network for each generation, a vector each, and a network for all of them."""

    def __init__(self, config: RoutingConfig, *, width: int, layer: int) -> None:
        super().__init__(config, width=width, layer=layer)
        self.networks, self.offsets = nn.ModuleList(), nn.ParameterList()
        self.of_all = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def add_experts(self, num: int) -> None:
        super().add_experts(num)
        self.networks.append(nn.Sequential(nn.Linear(self.width, 3), nn.ReLU(), nn.Linear(3, num)))
        self.offsets.append(nn.Parameter(torch.zeros(num, 1)))


class Earlier(FirstExperts):
    """Written for an earlier version."""

    def begin(self, generator: torch.Generator | None = None) -> None:
        """Nothing calls this any more."""


class Capacity(FirstExperts):
    causality = Causality.leaks_when_full


class ExpertChoice(FirstExperts):
    causality = Causality.leaks


class Ordered(FirstExperts):
    causality = Causality.ordered


@pytest.fixture(autouse=True)
def my_package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The classes above, importable as ``mine.routers.NAME``."""
    module = ModuleType("mine.routers")
    vars(module).update(First=FirstExperts, Two=TwoLayers, C=Capacity, E=Earlier, D=ExpertChoice, B=Ordered)
    vars(module).update(number=3, make=lambda *a, **k: 3)
    monkeypatch.setitem(sys.modules, "mine", ModuleType("mine"))
    monkeypatch.setitem(sys.modules, "mine.routers", module)
    monkeypatch.setattr(own, "_allowed", {f"mine.routers.{name}" for name in (*vars(module), "Missing")} | NOWHERE)
    yield


def build(**config: Any) -> Router:
    return build_router(routing_of(**config), width=4, layer=1)


def test_built_in_names() -> None:
    assert isinstance(build(), LearnedRouter)
    names = {mode: type(build(mode=mode)).__name__ for mode in ("label", "cluster", "hash")}
    assert names == {"label": "LabelRouter", "cluster": "TokenClusterRouter", "hash": "HashRouter"}


@pytest.mark.parametrize(("mode", "near"), [("lerned", "learned"), ("clusters", "cluster"), ("lable", "label")])
def test_a_typo_names_what_was_meant(mode: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"routing\.mode={mode} is unknown; .* Did you mean {near}\?"):
        routing_of(mode=mode)


def test_what_a_generation_trains_in_a_router_of_your_own() -> None:
    """Modules that a router has for each generation freeze, train on and have their rates as its Parameters do."""
    config = ModelConfig(layers=1, width=4, heads=1, kv_heads=1, expert_width=4, experts=2, context=8)
    born = (Generation("a", 2), Generation("b", 3), Generation("c", 2))
    model = LanguageModel(Architecture(config, routing_of(mode="mine.routers.Two"), 16, 0, born))
    router = "blocks.0.moe.router"
    own = {f"{router}.networks.1.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")} | {f"{router}.offsets.1"}
    assert set(model.parameters_of(Part.router, 1)) == own
    shared = set(model.parameters_of(Part.router)) - {n for g in range(3) for n in model.parameters_of(generation=g)}
    assert shared == {f"{router}.of_all.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}
    model.freeze_generations(but=1)
    assert {name for name, p in model.parameters_of(Part.router).items() if p.requires_grad} == own


def test_a_router_of_your_own() -> None:
    router = build(mode="mine.routers.First", options={"skip": 1})
    router.add_experts(4)
    context = RoutingContext(torch.zeros(3, dtype=torch.int64), torch.ones(3).bool(), torch.zeros(3).long())
    routing = router(torch.zeros(3, 4), context)
    assert routing.counts_E.tolist() == [0, 3, 3, 0] and router.layer == 1
    assert build(mode="mine.routers.B").causality == "B"


@pytest.mark.parametrize("letter", ["C", "D"])
def test_what_leaks_the_future_is_refused(letter: str) -> None:
    message = rf"routing\.mode=mine\.routers\.{letter} lets later tokens change earlier ones \(class {letter}\)"
    with pytest.raises(ConfigError, match=message):
        build(mode=f"mine.routers.{letter}")


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("mine.routers.Missing", {}, "has no attribute 'Missing'"),
        ("nowhere.at.All", {}, "No module named 'nowhere'"),
        (".All", {}, "cannot be built"),
        ("..All", {}, "cannot be built"),
        ("mine.routers.number", {}, "not callable"),
        ("mine.routers.First", {"jump": 1}, "unexpected keyword argument 'jump'"),
        ("mine.routers.E", {}, "defines begin, which is initialize now"),
        ("mine.routers.make", {}, "must build a lifelong_moe.routing.base.Router"),
    ],
)
def test_what_cannot_be_built_costs_one_line(mode: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(mode=mode, options=options)
    assert str(caught.value).startswith(f"routing.mode={mode} ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"top_k": 0}, "routing.top_k=0 must be at least 1"),
        ({"top_k": 1}, "routing.renormalize=true with routing.top_k=1"),
        ({"balance_loss": -0.1}, "routing.balance_loss=-0.1 must not be negative"),
        ({"z_loss": -1.0}, "routing.z_loss=-1.0 must not be negative"),
        ({"mode": "cluster", "scale": 0.0}, "routing.scale=0.0 must be positive"),
        ({"chunk_tokens": 0}, "routing.chunk_tokens=0 must be positive"),
        ({"mode": "cluster", "sample_tokens": -5}, "routing.sample_tokens=-5 must be positive"),
        ({"feature_width": 0}, "routing.feature_width=0 must be positive"),
        ({"clusters": 0}, "routing.clusters=0 must be at least 1"),
        ({"margin": -1.0}, "routing.margin=-1.0 must not be negative"),
        (
            {"mode": "label", "bundles": Bundles.cluster},
            "routing.bundles=cluster needs routing.mode=learned, or cluster",
        ),
    ],
)
def test_values_out_of_range(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        routing_of(**keys)


def test_one_expert_a_token_where_the_router_is_not_trained_or_not_renormalized() -> None:
    assert routing_of(top_k=1, renormalize=False).top_k == 1
    assert routing_of(top_k=1, mode="label").top_k == 1


def test_an_unfinished_router_says_what_is_missing() -> None:
    router = Router(routing_of(), width=4, layer=0)
    with pytest.raises(TypeError, match=r"Router must implement add_experts\(num\)"):
        router.add_experts(1)
    with pytest.raises(ConfigError, match=r"set grow\.router=random"):
        router.set_rows(torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("keys", "by_label", "by_document", "is_clustered", "by_generation"),
    [
        ({}, False, False, False, False),
        ({"mode": "hash"}, False, False, False, False),
        ({"mode": "label"}, True, False, False, True),
        ({"mode": "cluster"}, False, False, True, False),
        ({"mode": "cluster", "level": Level.document}, False, True, True, False),
        ({"bundles": Bundles.label}, True, False, False, True),
        ({"bundles": Bundles.cluster}, False, True, True, True),
    ],
)
def test_where_groups_come_from(
    keys: dict[str, Any], by_label: bool, by_document: bool, is_clustered: bool, by_generation: bool
) -> None:
    config = routing_of(**keys)
    assert (config.by_label, config.by_document) == (by_label, by_document)
    assert (config.is_clustered, config.by_generation) == (is_clustered, by_generation)


def test_clusters_of_a_generation() -> None:
    document = routing_of(mode="cluster", level=Level.document)
    assert [document.num_clusters(experts) for experts in (1, 4, 7)] == [1, 2, 3]
    assert [routing_of(bundles=Bundles.cluster).num_clusters(experts) for experts in (1, 4)] == [8, 8]
    assert routing_of(bundles=Bundles.cluster, clusters=3).num_clusters(4) == 3
