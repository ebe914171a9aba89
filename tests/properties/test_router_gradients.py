"""Whatever trains in a router learns from the task's loss alone, with no help of auxiliary losses: in every mode, at
every level of a hierarchy, in every generation that trains, and in every preset."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lifelong_moe.config.load import read_config
from lifelong_moe.config.model import ModelConfig
from lifelong_moe.config.routing.modes import FOR_ENCODERS, ROUTERS
from lifelong_moe.errors import ConfigError
from lifelong_moe.model.encoder import Encoder
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel, initialize
from lifelong_moe.plan.architecture import Architecture, Generation, first_generation
from tests.conftest import ROUTER_KINDS, VOCAB, routing_of

PRESETS = sorted((Path(__file__).resolve().parents[2] / "configs/presets").glob("*.yaml"))
TINY = ("model.width=16", "model.expert_width=8", "model.head_width=4", "model.context=32", "model.init_std=0.3")
Batch = Callable[..., dict[str, Tensor]]


def learn(model: LanguageModel, batch: dict[str, Tensor]) -> None:
    """The task's gradient of everything: the next token's cross-entropy, and nothing else."""
    torch.manual_seed(0)
    output = model(TokenBatch.of(batch))
    hidden, target = output.hidden_BSD.flatten(0, 1), batch["target_ids"].flatten()
    model.head.cross_entropy(hidden, target, batch["domain_ids"].flatten()).backward()


def assert_routers_learn(model: LanguageModel) -> int:
    """Each tensor of a router has a gradient that is no rounding error; returns how many there are."""
    experts = [p.grad.abs().max() for n, p in model.named_parameters() if ".banks." in n and p.grad is not None]
    scale, found = float(torch.stack(experts).max()), 0
    for name, parameter in model.named_parameters():
        if ".router." in name and parameter.requires_grad and parameter.numel():
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
            assert float(parameter.grad.abs().max()) > 1e-5 * scale, f"{name} learns nothing from the task"
            found += 1
    return found


@pytest.mark.parametrize("generations", [(4,), (8,), (8, 4)], ids=str)
def test_every_mode(
    any_router_kind: str, generations: tuple[int, ...], make_model: Callable[..., LanguageModel], make_batch: Batch
) -> None:
    model = make_model(any_router_kind, generations)
    model.train()
    learn(model, make_batch(16, domains=len(generations)))
    found = assert_routers_learn(model)
    assert (found == 0) == (model.architecture.routing.mode in ("cluster", "label", "hash"))


def test_no_mode_is_left_out() -> None:
    modes = {kind.get("mode", "learned") for kind in ROUTER_KINDS.values()}
    assert modes == set(ROUTERS) - {"soft"}


def test_an_encoders_mode() -> None:
    shape = ModelConfig(layers=2, width=16, heads=4, kv_heads=4, expert_width=8, experts=4, context=16, init_std=0.3)
    routing = routing_of(mode="soft", balance_loss=0.0, z_loss=0.0)
    encoder = Encoder(Architecture(shape, routing, 10, 0, (Generation("a", 4),)), 4)
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    encoder(torch.randn(3, 16, 4, generator=generator))[0].square().sum().backward()
    for name, parameter in encoder.named_parameters():
        if ".router." in name:
            assert parameter.grad is not None and float(parameter.grad.abs().max()) > 1e-6, name


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset(path: Path, make_batch: Batch) -> None:
    config = read_config(path, list(TINY)).config
    made = Architecture(config.model, config.routing, VOCAB, 0, (first_generation("a", config.model),))
    added = config.stages[1].grow.experts
    for one in [made, made.grown(Generation("b", added, config.model.moe_layers))] if added else [made]:
        model = LanguageModel(one)
        initialize(model, 0)
        learn(model, make_batch(16, 32))
        assert (assert_routers_learn(model) == 0) == (config.routing.mode in ("cluster", "label", "hash"))


@pytest.mark.parametrize("mode", sorted({*ROUTERS} - {*FOR_ENCODERS, "cluster", "label", "hash"}))
def test_every_modes_defaults(mode: str, make_run: Callable[..., object], make_batch: Batch) -> None:
    """One key switches from one system to another, and what it brings trains."""
    permission = ["routing.allow_noncausal=true"] if mode in ("base", "expert_choice", "vmoe") else []
    config = make_run(f"routing.mode={mode}", *permission)
    made = Architecture(config.model, config.routing, VOCAB, 0, (first_generation("a", config.model),))  # type: ignore[attr-defined]
    model = LanguageModel(dataclasses.replace(made, model=dataclasses.replace(made.model, init_std=0.3)))
    initialize(model, 0)
    learn(model, make_batch(16))
    assert assert_routers_learn(model) > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("hierarchical", "top_k=2", "top_groups=2"), "two experts in each"),
        (("hierarchical", "top_k=4", "top_groups=1"), "two groups"),
        (("hierarchical", "top_k=4", "top_groups=4", "expert_groups=4"), "two experts in each"),
        (("noisy_topk", "top_k=1"), "no gradient. Set routing.top_k=2."),
        (("noisy_topk", "top_k=1", "renormalize=false"), "no gradient. Set routing.top_k=2."),
        (("learned", "top_k=1"), "the router gets no gradient"),
        (("switch", "renormalize=true"), "is for routing.mode=learned or gshard, not for switch"),
    ],
)
def test_a_gate_with_nothing_to_learn_is_refused(
    overrides: tuple[str, ...], message: str, make_run: Callable[..., object]
) -> None:
    mode, *keys = overrides
    with pytest.raises(ConfigError, match=message):
        make_run(f"routing.mode={mode}", *(f"routing.{key}" for key in keys))
