"""The one registry of modes: ``routing.mode`` → its settings and its router. Torch-free: routers are imported on use.

A new router is found in three places: a class in a file of its own (``routing/routers/<name>.py``, a subclass of
:class:`~lifelong_moe.routing.base.Router`, or of ``routing/linear.py``'s where it has trained rows), a dataclass of the
keys that it reads with its authors' values (``config/routing/routers.py``), and a line of :data:`ROUTERS`.

The dataclass derives from :class:`~lifelong_moe.config.routing.shared.ChoosingConfig` if a token has a number of
experts, else from :class:`~lifelong_moe.config.routing.base.RoutingConfig`, and from a mixin for each of these
(``config/routing/shared.py``): ``ZLossConfig`` for logits, ``BalancedConfig`` for a balance loss, ``CapacityKeys`` for
a capacity, ``GroupsConfig`` for groups of experts. The mixins bring these keys with their checks.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from lifelong_moe.config.routing.base import ABSENT, STORED, BalanceScope, RoutingConfig
from lifelong_moe.config.routing.routers import (
    BaseConfig,
    ClusterConfig,
    DenseConfig,
    ExpertChoiceConfig,
    HashConfig,
    HierarchicalConfig,
    LabelConfig,
    NoisyConfig,
    ReluConfig,
    SoftConfig,
    VMoEConfig,
)
from lifelong_moe.config.routing.topk import CustomRouterConfig, GShardConfig, LearnedConfig, SwitchConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.storage.plain import PlainError, from_plain


class Mode(NamedTuple):
    """A value of ``routing.mode``: its settings and its router."""

    settings: type[RoutingConfig]
    """Dataclass of the mode's keys, with their defaults and properties."""
    router: str
    """Dotted path of the class (or function) that builds a layer's router; imported on use."""


# Paths and not classes: to read a configuration must not import torch.
HERE = "lifelong_moe.routing.routers"
ROUTERS = {
    "learned": Mode(LearnedConfig, f"{HERE}.learned.LearnedRouter"),
    "switch": Mode(SwitchConfig, f"{HERE}.switch.SwitchRouter"),
    "gshard": Mode(GShardConfig, f"{HERE}.gshard.GShardRouter"),
    "noisy_topk": Mode(NoisyConfig, f"{HERE}.noisy.NoisyRouter"),
    "vmoe": Mode(VMoEConfig, f"{HERE}.vmoe.VMoERouter"),
    "hierarchical": Mode(HierarchicalConfig, f"{HERE}.hierarchical.HierarchicalRouter"),
    "dense": Mode(DenseConfig, f"{HERE}.dense.DenseRouter"),
    "relu": Mode(ReluConfig, f"{HERE}.relu.ReluRouter"),
    "base": Mode(BaseConfig, f"{HERE}.balanced.BalancedRouter"),
    "expert_choice": Mode(ExpertChoiceConfig, f"{HERE}.expert_choice.ExpertChoiceRouter"),
    "soft": Mode(SoftConfig, f"{HERE}.soft.SoftRouter"),
    "cluster": Mode(ClusterConfig, f"{HERE}.cluster.build_cluster_router"),
    "label": Mode(LabelConfig, f"{HERE}.domain.LabelRouter"),
    "hash": Mode(HashConfig, f"{HERE}.hashing.HashRouter"),
}
"""Registry of all modes; a new router gets a line here."""

FOR_ENCODERS = ("soft",)
"""Modes that no run can have: for the encoder of ``lifelong_moe/model/encoder.py``, which no pipeline trains."""


def is_mode(mode: object) -> bool:
    """Whether something names a mode: one of the registry, or by dotted path a router of the user's own."""
    # Not imported: plans are made without torch, and `build_router` finds out whether it exists.
    return isinstance(mode, str) and (mode in ROUTERS or "." in mode)


def settings_of(mode: object) -> type[RoutingConfig]:
    """The dataclass of a mode's settings.

    Raises:
        ConfigError: If there is no such mode.
    """
    if isinstance(mode, str) and mode in ROUTERS:
        return ROUTERS[mode].settings
    if is_mode(mode):
        return CustomRouterConfig
    modes = [mode for mode in ROUTERS if mode not in FOR_ENCODERS]
    near = difflib.get_close_matches(str(mode), modes, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(f"routing.mode={mode} is unknown; there are {', '.join(modes)}, or a dotted path.{hint}")


def keys_of(mode: object) -> set[str]:
    """Names of a mode's keys."""
    return {f.name for f in fields(settings_of(mode))}


def stored_routing(data: Any) -> RoutingConfig:
    """Read what :meth:`RoutingConfig.to_json` or an earlier version wrote; keys that the mode lacks have no effect.

    Raises:
        PlainError: If it is something else.
    """
    try:
        cls = settings_of(data.get("mode", "learned")) if isinstance(data, Mapping) else None
    except ConfigError as error:
        raise PlainError(str(error), ".routing") from None
    if cls is None:
        raise PlainError("must be an object with named fields", ".routing")
    own = {f.name for f in fields(cls)}
    # Earlier versions wrote every key for every mode; those that a mode does not read are left out.
    values = {key: value for key, value in (STORED | ABSENT | dict(data)).items() if key in own}
    if values.get("capacity") and values.get("balance_scope") != BalanceScope.sequence:
        # An earlier version's scope may contradict its capacity; such a stage no longer trains.
        values["balance_scope"] = None
    try:
        return from_plain(cls, values)
    except PlainError as error:
        raise error.within(".routing") from None
