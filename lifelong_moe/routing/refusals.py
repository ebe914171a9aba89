"""What a new run may not ask of its routing, though a stage of an earlier version may hold it. Torch-free."""

from __future__ import annotations

from lifelong_moe.errors import ConfigError
from lifelong_moe.routing.config import RoutingConfig


def refuse_lone_choices(routing: RoutingConfig) -> None:
    """Refuse a gate that chooses one by a softmax over what it chose: its weight is 1, and the task teaches it nothing.

    Source:
        Sparsely-gated mixture of experts (arXiv:1701.06538), section 2.1: gates have gradients where k > 1.
    """
    if routing.mode == "hierarchical" and min(routing.top_groups, routing.top_k // routing.top_groups) < 2:
        raise ConfigError(
            f"routing.top_k={routing.top_k} with routing.top_groups={routing.top_groups}: a gate of a hierarchy that "
            f"chooses one weighs it 1 and learns nothing. Set top_groups=2 and top_k=4 at least: two groups, and two "
            f"experts in each."
        )
    if routing.mode == "noisy_topk" and routing.top_k == 1:
        raise ConfigError(
            "routing.top_k=1 with routing.mode=noisy_topk: the softmax over one expert is 1, so the router learns "
            "nothing from the task. Set routing.top_k=2."
        )
