"""What a sample of text shows of a model."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lifelong_moe.growth import observe as module
from lifelong_moe.growth.observe import observe
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel


def test_padding_is_not_observed(
    make_model: Callable[..., LanguageModel], make_batch: Callable[..., dict[str, Tensor]]
) -> None:
    """A row of 5 real tokens and one of 16: what the layers see of the first is what they see of it alone."""
    model, batch = make_model(), make_batch(blocks=2)
    short = {name: value[:1, :5] for name, value in batch.items() if value.dim() == 2}
    whole = {name: value[1:] for name, value in batch.items() if value.dim() == 2}
    batch["mask"][0, 5:] = False
    for seen, *parts in zip(*(observe(model, one, range(2)) for one in (batch, short, whole)), strict=True):
        inputs = [part.inputs_ND for part in parts if part.inputs_ND is not None]
        assert seen.inputs_ND is not None and seen.inputs_ND.shape == (21, 16) and int(seen.counts_E.sum()) == 2 * 21
        torch.testing.assert_close(seen.inputs_ND, torch.cat(inputs), rtol=0, atol=1e-5)
        assert torch.equal(seen.counts_E, parts[0].counts_E + parts[1].counts_E)


def test_layer_by_layer_shows_what_whole_passes_do(
    make_model: Callable[..., LanguageModel],
    make_batch: Callable[..., dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, and with the inputs of one layer at a time: those of all would be larger than the model."""
    monkeypatch.setattr(module, "FORWARD_TOKENS", 32)
    model, sample = make_model().eval(), make_batch(blocks=5)
    inputs: list[list[Tensor]] = [[], []]
    for layer, kept in zip(model.moe_layers(), inputs, strict=True):
        layer.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
    with torch.no_grad():
        whole = [model(TokenBatch.of(sample)[start : start + 2]).routings for start in (0, 2, 4)]
    expected = [torch.cat(kept) for kept in inputs]
    held: list[weakref.ref[Tensor]] = []
    for i, seen in enumerate(observe(model, sample, range(2))):
        gc.collect()
        assert not any(one() is not None for one in held)
        assert seen.inputs_ND is not None and torch.equal(seen.inputs_ND, expected[i])
        counts = [
            routings[i].counts_of(torch.ones(len(routings[i].expert_ids_TK), dtype=torch.bool)) for routings in whole
        ]
        assert torch.equal(seen.counts_E, sum(counts))
        held.append(weakref.ref(seen.inputs_ND))
        del seen


def test_layers_that_nobody_asks_for_are_not_computed(
    make_model: Callable[..., LanguageModel], make_batch: Callable[..., dict[str, Tensor]]
) -> None:
    model, computed = make_model().train(), []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: computed.append(i))
    layers = observe(model, make_batch(blocks=2))
    next(layers)
    assert computed == [0] and not model.training
    layers.close()
    assert model.training


def test_experts_of_the_last_layer_are_not_computed(
    make_model: Callable[..., LanguageModel], make_batch: Callable[..., dict[str, Tensor]]
) -> None:
    model, computed = make_model(), []
    for i, layer in enumerate(model.moe_layers()):
        layer.banks.register_forward_hook(lambda *_, i=i: computed.append(i))
    assert len([*observe(model, make_batch(blocks=2))]) == 2 and computed == [0]
