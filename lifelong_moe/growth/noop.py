"""Prove that growth has changed nothing yet: with the new experts held down, the model is the one that it was.

Rounding must not decide. Where two experts are all but tied, a logit that differs in its last bit sends a token
elsewhere, and what follows from there differs by whole units. So decisions and all else are proved apart: each router
is asked again what it was asked before growth, and where an input that differs by rounding makes it answer otherwise,
the old answer is used, and counted.

Legend: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from torch import Tensor

from lifelong_moe.growth.observe import sample_logits
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.routing.base import Router, Routing, RoutingContext

TOLERANCE = 1e-5
"""By which logits and gate weights may differ."""


@dataclass(frozen=True)
class Behavior:
    """What a model makes of a sample, in evaluation mode."""

    logits: Tensor
    """float32 ``(B, S, V)``."""
    decisions: dict[Router, tuple[Tensor, RoutingContext, Routing]]
    """What each router was given, and what it answered, bottom to top."""


def behavior(model: LanguageModel, sample: Mapping[str, Tensor]) -> Behavior:
    """Run the model over the sample's first blocks and keep what the check compares."""
    decisions: dict[Router, tuple[Tensor, RoutingContext, Routing]] = {}

    def keep(router: Router, given: tuple[Tensor, RoutingContext], routing: Routing) -> None:
        decisions[router] = (*given, routing)

    return Behavior(_logits(model, sample, keep), decisions)


def check_noop(model: LanguageModel, sample: Mapping[str, Tensor], before: Behavior) -> int:
    """Assert that with the new experts held down the model behaves as before growth.

    Args:
        model: Grown.
        sample: As :func:`behavior` had it.
        before: What that returned before growth.

    Returns:
        Near ties: how often, over tokens and layers, rounding alone changed a token's experts.

    Raises:
        RuntimeError: If a router that is given the same as before answers otherwise, or if logits differ by more than
            1e-5 although every token uses the experts that it used.
    """
    near_ties = 0

    def decide_as_before(router: Router, _: tuple[Tensor, RoutingContext], routing: Routing) -> Routing | None:
        nonlocal near_ties
        x_TD, context, old = before.decisions[router]
        old_TE = _gates(old, router.num_experts)
        if not _drift(_gates(router.forward(x_TD, context), router.num_experts), old_TE) <= TOLERANCE:
            raise RuntimeError(f"growth changed what layer {router.layer}'s router decides with new experts held down")
        moved = int(((_gates(routing, router.num_experts) > 0) != (old_TE > 0)).any(dim=1).sum())
        near_ties += moved
        return replace(old, num_experts=router.num_experts) if moved else None

    with ExitStack() as held:
        for layer in model.moe_layers():
            held.enter_context(layer.router.holding_down())
        drift = _drift(_logits(model, sample, decide_as_before), before.logits)
    if not drift <= TOLERANCE:
        raise RuntimeError(f"growth changed the logits by {drift:.2e} with new experts held down; at most 1e-5 allowed")
    return near_ties


def _logits(model: LanguageModel, sample: Mapping[str, Tensor], hook: Callable[..., Routing | None]) -> Tensor:
    """Logits of the sample's first blocks; the hook sees, and may replace, what each router answers."""
    with ExitStack() as hooked:
        for layer in model.moe_layers():
            hooked.callback(layer.router.register_forward_hook(hook).remove)
        return sample_logits(model, sample)


def _gates(routing: Routing, num_experts: int) -> Tensor:
    """Each token's gate weights by expert, float32 ``(T, E)``; 0 where it does not use one."""
    ids_TK, weights_TK = routing.expert_ids_TK, routing.weights_TK
    gates_TE = weights_TK.new_zeros(len(ids_TK), num_experts)
    return gates_TE.scatter_add(1, ids_TK.clamp_min(0), weights_TK.masked_fill(ids_TK < 0, 0.0))


def _drift(now: Tensor, before: Tensor) -> float:
    return float((now - before).abs().max())
