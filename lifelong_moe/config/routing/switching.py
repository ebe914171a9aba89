"""A routing section as written, and a mode: what stands there of another one. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lifelong_moe.config.routing.base import RoutingConfig
from lifelong_moe.config.routing.modes import ROUTERS, keys_of, settings_of
from lifelong_moe.errors import ConfigError

GROUPS = {"expert_groups", "top_groups"}
"""Keys that mean another thing in each mode that has them."""
FITTING = [{"top_k"}, {"balance_scope"}, {"top_k", "balance_scope"}]
"""Keys that modes share, with values that not all can have."""


def drop_foreign_keys(written: DictConfig, *, is_stored: bool = False) -> DictConfig:
    """A section without keys of other modes, where they say nothing: a coefficient of 0, ``false``, ``null``.

    Args:
        written: The section, not yet validated.
        is_stored: Whether it is of a run that exists: an earlier version let it say more, which did nothing.

    Raises:
        ConfigError: If such a key says something, lest somebody believe that it does something.
    """
    mode = written.get("mode", "learned")
    plain, own = _plain(written), keys_of(mode)
    for key in set(plain) - own:
        modes = [name for name in ROUTERS if key in keys_of(name)]
        if not modes and key != "options":
            continue  # no key at all: the section itself says so
        # What asks for nothing may stand in a file that is used with several modes.
        nothing = plain[key] is None or plain[key] is False or (key.endswith("_loss") and plain[key] == 0)
        if not nothing and not is_stored:
            whose = f"routing.mode={' or '.join(modes)}" if modes else "routers named by dotted path"
            raise ConfigError(f"routing.{key} is for {whose}, not for {mode}. Leave it out.")
        del plain[key]
    return OmegaConf.masked_copy(written, [key for key in written if str(key) in plain])  # type: ignore[misc]


def drop_keys_of_old_mode(raw: DictConfig, before: DictConfig, overrides: Sequence[str]) -> None:
    """Let one key switch the mode: take out of a configuration what its file wrote for its own mode alone.

    That is what the other mode has no key for, or cannot have; the mode's values stand there instead.
    What an override says stays, whatever it is, and so do ``bundles`` (but for ``label``, which is bundles by itself):
    without them something else has to hold old knowledge, which is for the user to say.

    Args:
        raw: The configuration with its overrides; changed.
        before: The same without.
        overrides: ``key=value``.
    """
    old, new = _plain(before._get_node("routing")), _plain(raw._get_node("routing"))
    mode = new.get("mode", "learned")
    if mode == old.get("mode", "learned") or not (isinstance(mode, str) and mode in ROUTERS):
        return
    theirs = set(old) & set(new) - _asked(overrides)
    gone = {key for key in theirs if key not in keys_of(mode) or key in GROUPS or (mode, key) == ("label", "bundles")}
    # Keys that modes share stay where they can: the smallest removal that gives a valid section wins.
    for unfit in (set[str](), *FITTING):
        if valid_routing(new, gone | (unfit & theirs)) is not None:
            break
    for key in gone | (unfit & theirs):
        del raw.routing[key]


def valid_routing(written: Mapping[str, Any], without: Collection[str] = ()) -> RoutingConfig | None:
    """A section's settings as a new run may have them, but for bundles; None if it cannot.

    Args:
        written: Plain data, not yet validated.
        without: Keys that are left out.
    """
    try:
        # Bundles stay out of the question: whether to give them up is for the user to say.
        node = drop_foreign_keys(OmegaConf.create({k: v for k, v in written.items() if k not in {"bundles", *without}}))
        cls = settings_of(node.get("mode", "learned"))
        config: RoutingConfig = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), node))  # type: ignore[assignment]
        config.require_gate_gradient()
    except (ConfigError, OmegaConfBaseException):
        return None
    return config


def _plain(node: Any) -> dict[str, Any]:
    """The routing section as plain data; empty if there is none, or it is not one."""
    found = OmegaConf.to_container(node, resolve=False) if isinstance(node, DictConfig) else {}
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def _asked(overrides: Sequence[str]) -> set[str]:
    """Keys of the section that overrides set."""
    found: set[str] = set()
    for override in overrides:
        parts = override.partition("=")[0].split(".")
        if parts[0] == "routing":
            # `routing={mode: relu}` sets several keys at once.
            node = None if len(parts) > 1 else OmegaConf.from_dotlist([override]).get("routing")
            found |= {parts[1]} if len(parts) > 1 else set(node) if isinstance(node, DictConfig) else set()
    return found
