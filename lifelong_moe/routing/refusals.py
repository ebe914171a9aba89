"""What a new run may not ask of its routing, though a stage of an earlier version may hold it. Torch-free."""

from __future__ import annotations

import dataclasses

from lifelong_moe.errors import ConfigError
from lifelong_moe.routing.config import DEFAULTS, FOR_ENCODERS, ROUTERS, UNTRAINED, RoutingConfig


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


def refuse_what_groups_lack(routing: RoutingConfig, num_experts: int, key: str, *, is_first: bool) -> None:
    """Refuse experts that do not form the groups that are asked for, and groups that hold less than a token uses.

    Args:
        routing: How many groups, and how many of them a token uses.
        num_experts: Of one layer, that a generation has.
        key: What sets their number.
        is_first: Whether it is the first generation.
    """
    groups = routing.expert_groups
    if routing.mode == "hierarchical":
        groups = groups if is_first else routing.groups_of(num_experts)
        least = routing.top_k // routing.top_groups
        if num_experts < least * max(1, groups) or num_experts % groups:
            raise ConfigError(
                f"{key}={num_experts} must be a multiple of {max(1, groups)} group(s) of at least {least} experts "
                f"(routing.expert_groups, and routing.top_k / routing.top_groups)."
            )
    elif groups > 1 and num_experts % groups:
        raise ConfigError(f"{key}={num_experts} must be a multiple of routing.expert_groups={groups}.")
    elif groups > 1 and routing.mode == "learned" and routing.top_k > num_experts // groups * routing.top_groups:
        held = num_experts // groups * routing.top_groups
        raise ConfigError(
            f"routing.top_k={routing.top_k} is more than the {held} experts that routing.top_groups="
            f"{routing.top_groups} of {groups} groups of {key}={num_experts} hold. Set top_k to {held} or less, or "
            f"more top_groups."
        )


LOSSES = ("learned", "switch", "gshard", "noisy_topk", "vmoe", "hierarchical", "relu")
"""Modes whose loads can be uneven, so that a loss can balance them; and ``balance_loss`` moves their rows."""
USED = {
    "top_k": [mode for mode in ROUTERS if mode not in ("dense", *FOR_ENCODERS)],
    "renormalize": ["learned", "gshard"],
    "gate_scale": ["learned", "switch", "gshard"],
    "top_groups": ["learned", "hierarchical"],
    "balance_loss": LOSSES,
    "balance_counts": ["learned", "gshard", "noisy_topk", "vmoe", "hierarchical"],
    "balance_scope": LOSSES,
    "balance_over": LOSSES,
    # A hierarchy's logits are logarithms of probabilities: their exponentials always sum to 1.
    "z_loss": ["learned", "switch", "gshard", "noisy_topk", "vmoe", "dense", "relu", "base", "expert_choice"],
    "margin": ["learned", "cluster"],
    "level": ["cluster"],
    "features": ["cluster"],
    "scale": ["cluster"],
    "centroids": ["cluster", "learned"],
    "clusters": ["cluster", "learned"],
    "chunk_tokens": ["cluster", "learned"],
    "feature_width": ["cluster", "learned", "hash"],
    "sample_tokens": ["cluster"],
    "allow_noncausal": ["base", "expert_choice", "learned", "switch", "gshard", "vmoe"],
}
"""Modes in which a key can change something; of keys that :class:`RoutingConfig` itself does not keep to some modes."""
OFF = {"balance_loss": 0, "z_loss": 0}
"""Values that say that there is no such thing, which is as true of a mode that cannot have it."""


def refuse_idle_keys(routing: RoutingConfig) -> None:
    """Refuse a value that the mode would not act on, lest somebody believe it does something.

    What a mode sets by itself may stand, and so may what says the same: a coefficient of 0, or that one fixed weight
    of 1 is not divided by itself.
    """
    if routing.mode not in ROUTERS or routing.mode in FOR_ENCODERS:
        return  # a router of the user's own may read any key
    standard = {f.name: f.default for f in dataclasses.fields(routing)} | DEFAULTS.get(routing.mode, {})
    for key, modes in USED.items():
        value, true = getattr(routing, key), [standard[key], *([OFF[key]] if key in OFF else [])]
        if key == "renormalize" and routing.top_k == 1 and routing.mode in UNTRAINED:
            true.append(False)
        if routing.mode not in modes and value not in true:
            raise ConfigError(
                f"routing.{key}={as_yaml(value)} does nothing with routing.mode={routing.mode}. Set "
                f"routing.{key}={as_yaml(OFF.get(key, standard[key]))}."
            )


def as_yaml(value: object) -> str:
    """As YAML has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
