"""A routing section that was written for one mode, under another: what can stand there. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lifelong_moe.routing.config import DEFAULTS, FOR_ENCODERS, KNOWN, LEAKING, ROUTERS, SINGLE, RoutingConfig
from lifelong_moe.routing.refusals import OFF, USED

CHOOSES_BUNDLES = ("learned", "cluster")
"""Modes that choose among the experts of a bundle; in ``label`` the known distribution names the stage."""
GROUPS = ("expert_groups", "top_groups")
"""Keys that mean another thing in each mode that has them."""


def leave_behind(raw: DictConfig, before: DictConfig, overrides: Sequence[str]) -> None:
    """Let one key switch the mode: take out of a configuration what its file wrote for its own mode alone.

    That is what the other mode does not know, has no use for, or cannot have; the mode's values stand there instead.
    What an override says stays, whatever it is, and so do ``bundles`` (but for ``label``, which is bundles by itself):
    without them something else has to hold old knowledge, which is for the user to say.

    Args:
        raw: The configuration with its overrides; changed.
        before: The same without.
        overrides: ``key=value``.
    """
    old, new = _section(before), _section(raw)
    mode = new.get("mode", "learned")
    if mode == old.get("mode", "learned") or not _is_ours(mode):
        return
    asked = _asked(overrides)
    gone = {key for key in GROUPS if key in old and key not in asked}
    if mode == "label" and "bundles" not in asked:
        gone.add("bundles")
    for key in old:
        if key not in asked and key in unfit({k: v for k, v in new.items() if k not in gone}):
            gone.add(key)
    for key in gone & set(new):
        del raw.routing[key]


def _section(raw: DictConfig) -> dict[str, Any]:
    """The routing section as plain data; empty if there is none, or it is not one."""
    node = raw._get_node("routing")
    found = OmegaConf.to_container(node, resolve=False) if isinstance(node, DictConfig) else {}
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def _asked(overrides: Sequence[str]) -> set[str]:
    """Keys of the section that overrides set."""
    found: set[str] = set()
    for override in overrides:
        parts = override.partition("=")[0].split(".")
        if parts[0] == "routing":
            node = None if len(parts) > 1 else OmegaConf.from_dotlist([override]).get("routing")
            found |= {parts[1]} if len(parts) > 1 else set(node) if isinstance(node, DictConfig) else set()
    return found


def unfit(written: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a section as written that cannot stand under its mode, each with the value that can.

    Args:
        written: The section, plain data, not yet validated.
    """
    mode = written.get("mode", "learned")
    if not _is_ours(mode) or mode in FOR_ENCODERS:
        return {}
    plain: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(RoutingConfig)}
    own = plain | DEFAULTS.get(mode, {})
    value = own | dict(written)
    found = {key: plain[key] for key, modes in KNOWN.items() if mode not in modes and value[key] != plain[key]}
    for key, modes in USED.items():
        if mode not in modes and value[key] not in (own[key], OFF.get(key, own[key])):
            found[key] = OFF.get(key, own[key])
    if not _can_choose(mode, value):
        found["top_k"] = own["top_k"]
    everywhere = value["balance_scope"] == "global_batch" and mode not in ("learned", "switch", "gshard")
    if everywhere or (value["capacity"] and value["balance_scope"] not in (None, "sequence")):
        found["balance_scope"] = None
    return {key: one for key, one in found.items() if key in written}


def _is_ours(mode: object) -> bool:
    """Whether a mode as written is one of this package's; what is no name at all is told elsewhere."""
    return isinstance(mode, str) and mode in ROUTERS


def _can_choose(mode: str, value: Mapping[str, Any]) -> bool:
    """Whether a token can use as many experts; what is no number is told elsewhere."""
    top_k, groups = value["top_k"], value["top_groups"]
    if not isinstance(top_k, int):
        return True
    match mode:
        case "gshard":
            return top_k == 2
        case "noisy_topk":
            return top_k > 1
        case "learned":
            return top_k > 1 or not value["renormalize"]
        case "hierarchical":
            return not isinstance(groups, int) or groups < 1 or (top_k % groups == 0 and top_k // groups > 1)
        case _:
            return mode not in SINGLE or top_k == 1


def is_noncausal(written: Mapping[str, Any]) -> bool:
    """Whether a section as written needs ``allow_noncausal``, and does not have it."""
    mode = written.get("mode", "learned")
    if not _is_ours(mode):
        return False
    room = written.get("capacity", DEFAULTS.get(mode, {}).get("capacity"))
    room = room if isinstance(room, Mapping) and mode in KNOWN["capacity"] else {}
    ordered = room.get("priority", "token") == "token" and room.get("overflow", "residual") == "residual"
    return (mode in LEAKING or not ordered) and not written.get("allow_noncausal")
