"""How many looks at held-out text a stage affords, and of how many tokens."""

from __future__ import annotations

from dataclasses import dataclass

from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.cost import forward_flops_per_token, pass_flops
from lifelong_moe.plan.flops import loop_flops
from lifelong_moe.plan.products import Text
from lifelong_moe.plan.spec import StageSpec

MOST = 9
"""Looks of a stage: one after each tenth but the last, which the evaluation after the stage follows."""
LEAST_TOKENS, MOST_TOKENS = 256, 4096
"""Of a distribution in a look. Fewer say nothing, and more are for the evaluation after the stage."""


@dataclass(frozen=True)
class Looks:
    """Looks at equal distances, besides one at the stage's start."""

    number: int
    tokens: int
    """Of each distribution in each look."""

    def steps(self, of_stage: int) -> frozenset[int]:
        """Steps of the stage after which there is a look."""
        found = {round(of_stage * look / (self.number + 1)) for look in range(1, self.number + 1)}
        return frozenset(found - {0, of_stage})


def affordable_looks(budget: float, token: float, once: float, passes: int) -> Looks | None:
    """The most looks that a budget pays for, then the most tokens; None if it pays for none.

    Args:
        budget: FLOPs for all looks and the one at the start.
        token: FLOPs of a token's forward pass.
        once: FLOPs of a forward pass that do not depend on its tokens.
        passes: Forward passes of a look.
    """
    for number in range(MOST, 0, -1):
        tokens = (budget / ((number + 1) * passes) - once) / token
        if tokens >= LEAST_TOKENS:
            return Looks(number, min(int(tokens), MOST_TOKENS))
    return None


def stage_looks(
    share: float, spec: StageSpec, architecture: Architecture, parent: Architecture, distributions: int
) -> Looks | None:
    """The looks for which a share of a stage's FLOPs pays.

    Args:
        share: ``evaluate.watch``.
        spec: The stage.
        architecture: The model at its end.
        parent: The model that it continues.
        distributions: Number of distributions in a look, the stage's own among them.
    """
    return affordable_looks(
        share * loop_flops(spec, architecture, parent),
        forward_flops_per_token(architecture),
        pass_flops(architecture, Text.mixed(architecture)),
        # The text of a distribution of the stage's own is read twice: for its loss, and to compare predictions.
        distributions + 1,
    )
