"""Verify that growth is a no-op at first: with the new experts masked, the model computes what it did before.

Near ties need care. Where two experts score almost the same, a difference in the last bit sends a token to the other
expert, and all later activations differ by far more than rounding. Routing and arithmetic are therefore verified
separately: each router must decide the same on its recorded inputs from before growth, and where rounding alone flips
a decision in the new forward pass, the old decision is used, and counted.

Legend: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from torch import Tensor

from lifelong_moe.growth.observe import sample_logits
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.routing.base import Router, Routing, RoutingContext

TOLERANCE = 1e-5
"""Largest allowed difference of logits and of gate weights."""


@dataclass(frozen=True)
class Behavior:
    """What a model computes on a sample, in evaluation mode."""

    logits: list[Tensor]
    """Of each block, float32 ``(S, V)``."""
    decisions: dict[Router, tuple[Tensor, RoutingContext, Routing]]
    """Each router's inputs and its answer, bottom to top."""


def behavior(model: LanguageModel, sample: Mapping[str, Tensor]) -> Behavior:
    """Run the model on the sample's first blocks and record what :func:`check_noop` compares."""
    decisions: dict[Router, tuple[Tensor, RoutingContext, Routing]] = {}

    def keep(router: Router, given: tuple[Tensor, RoutingContext], routing: Routing) -> None:
        decisions[router] = (*given, routing)

    return Behavior([*_logits(model, sample, keep)], decisions)


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
        for now_SV, before_SV in zip(_logits(model, sample, decide_as_before), before.logits, strict=True):
            # Without tokens that the new generation added, which the sample's generations do not predict.
            if not (drift := _drift(now_SV[:, : before_SV.shape[1]], before_SV)) <= TOLERANCE:
                raise RuntimeError(
                    f"growth changed the logits by {drift:.2e} with new experts masked; at most 1e-5 is allowed"
                )
    return near_ties


def _logits(
    model: LanguageModel, sample: Mapping[str, Tensor], hook: Callable[..., Routing | None]
) -> Iterator[Tensor]:
    """Logits of each of the sample's first blocks; the hook sees each router's answer, and may replace it."""
    with ExitStack() as hooked:
        for layer in model.moe_layers():
            hooked.callback(layer.router.register_forward_hook(hook).remove)
        yield from sample_logits(model, sample)


def _gates(routing: Routing, num_experts: int) -> Tensor:
    """Each token's gate weights by expert, float32 ``(T, E)``; 0 where it does not use one."""
    ids_TK, weights_TK = routing.expert_ids_TK, routing.weights_TK
    gates_TE = weights_TK.new_zeros(len(ids_TK), num_experts)
    # An unused slot has expert -1: it adds 0 to expert 0.
    return gates_TE.scatter_add(1, ids_TK.clamp_min(0), weights_TK.masked_fill(ids_TK < 0, 0.0))


def _drift(now: Tensor, before: Tensor) -> float:
    # Equal infinities, of tokens that a generation does not predict, have no difference.
    return float((now - before).masked_fill(now == before, 0.0).abs().max())
