"""Drop keys of other modes from a routing section, also when an override switches the mode. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lifelong_moe.config.routing.base import STORED, RoutingConfig
from lifelong_moe.config.routing.modes import ROUTERS, is_mode, keys_of, settings_of
from lifelong_moe.errors import ConfigError

GROUPS = {"expert_groups", "top_groups"}
"""Keys whose meaning differs between the modes that have them."""
FITTING = [{"top_k"}, {"balance_scope"}, {"top_k", "balance_scope"}]
"""Keys that modes share but not all values of which each mode allows."""
_SCHEMAS: dict[type, DictConfig] = {}


def drop_foreign_keys(written: DictConfig, *, is_stored: bool = False) -> DictConfig:
    """Copy a section without keys of other modes whose values ask for nothing: a coefficient of 0, ``false``, ``null``,
    or the value that earlier versions recorded for every mode.

    Args:
        written: The section, not yet validated.
        is_stored: Whether it belongs to an existing run, in which earlier versions allowed such keys without effect.

    Raises:
        ConfigError: If such a key has another value, since the mode would ignore it.
    """
    mode = written.get("mode", "learned")
    plain, own, recorded = _plain(written), keys_of(mode), STORED | settings_of(mode).stored
    for key in sorted(set(plain) - own):
        modes = [name for name in ROUTERS if key in keys_of(name)]
        if not modes and key != "options":
            continue  # no key of any mode: OmegaConf rejects it
        # A file that is used with several modes may turn off what only some of them have.
        nothing = plain[key] is None or plain[key] is False or (key.endswith("_loss") and plain[key] == 0)
        # So may the configuration that an earlier version logged for this mode.
        nothing = nothing or (key in recorded and plain[key] == recorded[key])
        if not nothing and not is_stored:
            whose = f"routing.mode={' or '.join(modes)}" if modes else "routers named by dotted path"
            raise ConfigError(f"routing.{key} is for {whose}, not for {mode}. Leave it out.")
        del plain[key]
    return OmegaConf.masked_copy(written, [key for key in written if str(key) in plain])  # type: ignore[misc]


def drop_keys_of_old_mode(raw: DictConfig, before: DictConfig, overrides: Sequence[str]) -> None:
    """Let one key switch the mode: drop the keys of the file that only fit its own mode.

    These are keys that the new mode lacks, or whose values it does not allow; its defaults apply instead. Keys set by
    an override stay. So does ``bundles``, except under ``label``, which implies it: without generations something else
    must retain old text, and that is the user's decision.

    Args:
        raw: The configuration with its overrides; changed in place.
        before: The configuration without overrides.
        overrides: ``key=value``.
    """
    old, new = _plain(before._get_node("routing")), _plain(raw._get_node("routing"))
    mode = new.get("mode", "learned")
    if mode == old.get("mode", "learned") or not is_mode(mode):
        return
    theirs = set(old) & set(new) - _asked(overrides)
    gone = {key for key in theirs if key not in keys_of(mode) or key in GROUPS or (mode, key) == ("label", "bundles")}
    # Keys that modes share stay where they can: the smallest removal that gives a valid section wins.
    for unfit in (set[str](), *FITTING):
        if valid_routing(new, gone | (unfit & theirs)) is not None:
            break
    for key in gone | (unfit & theirs):
        del raw.routing[key]


def structured(cls: type) -> DictConfig:
    """The OmegaConf schema of a dataclass, built once; merging copies it."""
    if cls not in _SCHEMAS:
        _SCHEMAS[cls] = OmegaConf.structured(cls)
    return _SCHEMAS[cls]


def valid_routing(written: Mapping[str, Any], without: Collection[str] = ()) -> RoutingConfig | None:
    """Build a section's settings without ``bundles``, as for a new run; None if they are not valid.

    Args:
        written: Plain data, not yet validated.
        without: Keys to leave out.
    """
    try:
        # Bundles stay out of the question: whether to give them up is for the user to say.
        node = drop_foreign_keys(OmegaConf.create({k: v for k, v in written.items() if k not in {"bundles", *without}}))
        cls = settings_of(node.get("mode", "learned"))
        config: RoutingConfig = OmegaConf.to_object(OmegaConf.merge(structured(cls), node))  # type: ignore[assignment]
        config.require_gate_gradient()
    except (ConfigError, OmegaConfBaseException):
        return None
    return config


def _plain(node: Any) -> dict[str, Any]:
    """The routing section as plain data; empty if it is missing or not a mapping."""
    found = OmegaConf.to_container(node, resolve=False) if isinstance(node, DictConfig) else {}
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def _asked(overrides: Sequence[str]) -> set[str]:
    """Keys of the routing section that overrides set."""
    found: set[str] = set()
    for override in overrides:
        parts = override.partition("=")[0].split(".")
        if parts[0] == "routing":
            # `routing={mode: relu}` sets several keys at once.
            node = None if len(parts) > 1 else OmegaConf.from_dotlist([override]).get("routing")
            found |= {parts[1]} if len(parts) > 1 else set(node) if isinstance(node, DictConfig) else set()
    return found
