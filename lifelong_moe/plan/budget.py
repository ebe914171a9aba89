"""Token numbers at which an arm costs no more active FLOPs than the reference. Pure."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right

from lifelong_moe.errors import ConfigError
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.cost import forward_flops_per_token
from lifelong_moe.plan.flops import stage_flops
from lifelong_moe.plan.planned import PlannedStage
from lifelong_moe.plan.spec import BASE


def tokens_within(
    arm: list[PlannedStage],
    reference: list[PlannedStage],
    tokens: dict[str, int],
    base: Architecture | None = None,
) -> dict[str, int]:
    """The most tokens per stage, in whole steps, at which none costs more than the reference's of the same name.

    The teacher's forward passes count.

    Args:
        arm: Its stages as configured.
        reference: The reference's.
        tokens: Configured tokens of each of the arm's stages, by name.
        base: Of the checkpoint that the arm begins with.

    Raises:
        ConfigError: If not even one step of a stage fits, or the reference has no such stage.
    """
    allowed = {stage.spec.name: stage.flops for stage in reference if stage.spec.name in tokens}
    # An arm with one joint stage may spend what all stages of the reference do, divided in proportion to `tokens`.
    if len(arm) == 1 and arm[0].spec.name not in allowed:
        total = _steps_within(arm, 0, sum(allowed.values()), base) * arm[0].spec.optim.batch_tokens
        shares = {name: total * count // sum(tokens.values()) for name, count in tokens.items()}
        # The rounding remainder goes to the last distribution, so that the sum is whole steps.
        last = next(reversed(tokens))
        return shares | {last: shares[last] + total - sum(shares.values())}
    matched = {stage.spec.name: i for i, stage in enumerate(arm) if stage.spec.name in tokens}
    if missing := [name for name in tokens if name not in allowed or name not in matched]:
        raise ConfigError(f"budget=flops: the reference has no stage {missing[0]} to compare this arm's with.")
    batch = {name: arm[i].spec.optim.batch_tokens for name, i in matched.items()}
    return {name: _steps_within(arm, i, allowed[name], base) * batch[name] for name, i in matched.items()}


def _steps_within(arm: list[PlannedStage], index: int, flops: int, base: Architecture | None) -> int:
    """The largest number of steps whose FLOPs do not exceed ``flops``."""
    stage = arm[index]
    if stage.spec.parent == BASE:
        parent = base
    else:
        parent = None if stage.spec.parent is None else arm[stage.spec.parent].architecture

    def cost(steps: int) -> int:
        spec = dataclasses.replace(stage.spec, tokens=steps * stage.spec.optim.batch_tokens)
        return stage_flops(spec, stage.architecture, parent)

    # A step's cost depends on its phase, but is never below one forward pass: a bound for the bisection.
    least = forward_flops_per_token(stage.architecture) * stage.spec.optim.batch_tokens
    # cost() rises with the number of steps, so the last affordable number is where it passes the limit.
    steps = bisect_right(range(1, flops // least + 1), flops, key=cost)
    if not steps:
        raise ConfigError(f"budget=flops: stages[{index}] ({stage.spec.name}) would get less than one step.")
    return steps
