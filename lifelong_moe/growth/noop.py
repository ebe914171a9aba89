"""Verify that growth is a no-op at first: with the new experts masked, the model computes what it did before.

Near ties need care. Where two experts score almost the same, a difference in the last bit sends a token to the other
expert, and all later activations differ by far more than rounding. Routing and arithmetic are therefore verified
separately: each router must decide the same on its recorded inputs from before growth, and where rounding alone flips
a decision in the new forward pass, the old decision is used, and counted.

Legend: B batch, S sequence, T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from lifelong_moe.model.head import LinearHead
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.routing.base import Router, Routing, RoutingContext

TOLERANCE = 1e-5
"""Largest allowed difference of logits and of gate weights."""
BLOCKS = 4
"""Of the sample that are compared."""
CHUNK = 256
"""Tokens whose logits are compared in one go: those of a large vocabulary take more memory than the rest of the pass.
"""


@dataclass(frozen=True)
class Behavior:
    """What a model computes on a sample, in evaluation mode."""

    hidden_BSD: Tensor
    """What the head reads."""
    head: LinearHead
    """A copy of the head, which growth changes; logits of every token would be larger."""
    decisions: dict[Router, tuple[Tensor, RoutingContext, Routing]]
    """Each router's inputs and its answer, bottom to top."""


def behavior(model: LanguageModel, sample: Mapping[str, Tensor]) -> Behavior:
    """Run the model on the sample's first blocks and record what :func:`check_noop` compares."""
    decisions: dict[Router, tuple[Tensor, RoutingContext, Routing]] = {}

    def keep(router: Router, given: tuple[Tensor, RoutingContext], routing: Routing) -> None:
        decisions[router] = (*given, routing)

    # Frozen changes, as many as generations, are not copied: that they stay is proved bit for bit at the commit.
    frozen = [one for one in model.head.deltas.values() if not any(p.requires_grad for p in one.parameters())]
    head = copy.deepcopy(model.head, {id(one): one for one in frozen})
    return Behavior(_hidden(model, sample, keep), head, decisions)


@torch.no_grad()
def check_noop(model: LanguageModel, sample: Mapping[str, Tensor], before: Behavior) -> int:
    """Verify that with the new experts masked the model behaves as before growth.

    Args:
        model: After growth.
        sample: The one that :func:`behavior` was given.
        before: The result of :func:`behavior` before growth.

    Returns:
        Near ties: the number of decisions, over tokens and layers, that rounding alone changed.

    Raises:
        RuntimeError: If a router decides differently on the same inputs, or logits differ by more than 1e-5 although
            every token uses the same experts as before.
    """
    near_ties = 0

    def decide_as_before(router: Router, _: tuple[Tensor, RoutingContext], routing: Routing) -> Routing | None:
        nonlocal near_ties
        x_TD, context, old = before.decisions[router]
        # shape: (T, E), of the new experts too, whose gates were 0
        old_TE = _gates(old, router.num_experts)
        # `forward`, not a call, which would run this hook again. `not <=`, so that NaN fails.
        if not _drift(_gates(router.forward(x_TD, context), router.num_experts), old_TE) <= TOLERANCE:
            raise RuntimeError(f"growth changed what layer {router.layer}'s router decides with new experts masked")
        # Tokens whose set of experts differs, though their weights may be almost the same.
        moved = int(((_gates(routing, router.num_experts) > 0) != (old_TE > 0)).any(dim=1).sum())
        near_ties += moved
        return replace(old, num_experts=router.num_experts) if moved else None

    with ExitStack() as masked:
        for layer in model.moe_layers():
            masked.enter_context(layer.router.masking_newest())
        hidden_BSD, domain_ids_BS = _hidden(model, sample, decide_as_before), _first(sample).domain_ids_BS
        for block, start in product(range(len(hidden_BSD)), range(0, hidden_BSD.shape[1], CHUNK)):
            part = slice(block, block + 1), slice(start, start + CHUNK)
            domain_ids = None if domain_ids_BS is None else domain_ids_BS[part]
            logits = model.head.logits(hidden_BSD[part], domain_ids).float()
            expected = before.head.logits(before.hidden_BSD[part], domain_ids).float()
            # Without tokens that the new generation added, which the sample's generations do not predict.
            if not (drift := _drift(logits[..., : expected.shape[-1]], expected)) <= TOLERANCE:
                raise RuntimeError(
                    f"growth changed the logits by {drift:.2e} with new experts masked; at most 1e-5 is allowed"
                )
    return near_ties


def _first(sample: Mapping[str, Tensor]) -> TokenBatch:
    """The blocks of a sample that are compared."""
    return TokenBatch.of(sample)[:BLOCKS]


@torch.no_grad()
def _hidden(model: LanguageModel, sample: Mapping[str, Tensor], hook: Callable[..., Routing | None]) -> Tensor:
    """What the head reads of the sample's first blocks, in evaluation mode.

    The hook sees each router's answer, and may replace it.
    """
    training = model.training
    model.eval()
    with ExitStack() as hooked:
        hooked.callback(model.train, training)
        for layer in model.moe_layers():
            hooked.callback(layer.router.register_forward_hook(hook).remove)
        return model(_first(sample)).hidden_BSD


def _gates(routing: Routing, num_experts: int) -> Tensor:
    """Each token's gate weights by expert, float32 ``(T, E)``; 0 where it does not use one."""
    ids_TK, weights_TK = routing.expert_ids_TK, routing.weights_TK
    gates_TE = weights_TK.new_zeros(len(ids_TK), num_experts)
    # An unused slot has expert -1: it adds 0 to expert 0.
    return gates_TE.scatter_add(1, ids_TK.clamp_min(0), weights_TK.masked_fill(ids_TK < 0, 0.0))


def _drift(now: Tensor, before: Tensor) -> float:
    # Equal infinities, of tokens that a generation does not predict, have no difference.
    return float((now - before).masked_fill(now == before, 0.0).abs().max())
