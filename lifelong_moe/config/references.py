"""References such as ``${oc.env:TOKEN}``: a user's may be secrets, a stored configuration's stay text. Torch-free."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from lifelong_moe.redaction import is_setting, note, note_variable, say_openly

log = logging.getLogger(__name__)

OF_THE_MACHINE = ("trainer", "evaluate")
"""Sections that say how a machine works, not what is learned: a stored one does without what it cannot know."""

_TO_A_VALUE = re.compile(r"\$\{([\w.]+)\}")
"""A text that is nothing but a reference to another key."""

_KEY = re.compile(r"\$\{(?:oc\.[\w.]+:)?([^{}:,$]*)")
"""The key that a reference names, also as the first argument of a resolver such as ``oc.select``."""

MOST_RESOLVED = 1 << 20
"""Characters and values of a configuration whose references are resolved: sixteen times the longest file."""
MOST_STEPS = 64
"""Most containers and references behind one another."""

_UNKNOWN = "$ {"
"""How a reference that is not resolved begins where it is text."""


def _environment(key: str, *default: Any) -> str | None:
    """OmegaConf's resolver ``oc.env``, which notes what it finds: nobody knows whether it is a secret."""
    note_variable(key)
    return oc.env(key, *default)


OmegaConf.register_resolver("oc.env", _environment, replace=True)


def require_bounded(raw: Node) -> None:
    """Reject references that multiply, such as ``a: ${b}${b}, b: ${c}${c}, …``: resolved, they would take all memory.

    Nothing is resolved here, so what a resolver such as ``oc.env`` will find counts as nothing.

    Raises:
        ValueError: With the key, and the most that is resolved.
    """
    sizes: dict[int, tuple[int, int]] = {}

    def measured(node: Any) -> tuple[int, int]:
        """Characters and values of a resolved node, and how many nodes stand behind one another in it."""
        if not isinstance(node, Node):
            return 0, 0
        if id(node) in sizes:
            return sizes[id(node)]
        sizes[id(node)] = 0, 0  # meanwhile: a circle, which OmegaConf reports
        value, inner = node._value(), list[Any]()
        if isinstance(value, str) and "${" in value:
            inner = [_target(node, key) for key in _KEY.findall(value)]
        elif isinstance(value, dict | list):
            inner = list(value.values() if isinstance(value, dict) else value)
        found = [measured(one) for one in inner]
        total = 1 + (len(value) if isinstance(value, str) else 0) + sum(size for size, _ in found)
        depth = 1 + max((below for _, below in found), default=0)
        if total > MOST_RESOLVED or depth > MOST_STEPS:
            what = f"over {MOST_RESOLVED:,} characters" if total > MOST_RESOLVED else f"over {MOST_STEPS} steps"
            raise ValueError(f"with its references {node._get_full_key(None) or 'the whole'} comes to {what}")
        sizes[id(node)] = total, depth
        return total, depth

    measured(raw)


def _target(node: Any, key: str) -> Any:
    """The node that a reference within another node names, or the reference on the way to it; None without one."""
    # A dot at the beginning is the node's own container, each further one the next.
    ups = len(key) - len(key.lstrip("."))
    found = node if ups else node._get_root()
    for _ in range(ups):
        found = found and found._get_parent()
    for step in filter(None, re.split(r"[.\[\]]+", key)):
        if not isinstance(found, DictConfig | ListConfig) or found._is_interpolation():
            break
        content = found._content
        is_there = step in content if isinstance(content, dict) else step.isdigit() and int(step) < len(content or ())
        found = content[step if isinstance(content, dict) else int(step)] if is_there else None  # type: ignore[index]
    return found


def note_secrets(raw: DictConfig) -> None:
    """Note as secrets all texts that a user's configuration gets through resolvers; what it says openly is none."""
    # A literal address may hold a secret itself.
    say_openly(text for text in _texts(OmegaConf.to_container(raw, resolve=False)) if not _is_kept(text))
    for node, key, written in _references(raw):
        if ":" not in written:
            continue  # a key of this file, which holds a secret only if it refers to one itself
        try:
            found = node[key]
        except OmegaConfBaseException:  # whoever needs the value reports this
            continue
        for text in _texts(OmegaConf.to_container(found) if OmegaConf.is_config(found) else found):
            note(text, written)


def with_numbers(raw: DictConfig) -> Any:
    """A configuration as plain data: references stay as they are written, but for those to numbers and truth values.

    Those are settings, without which a stored configuration would be of no use where nothing is resolved.
    """
    plain = raw.copy()
    for node, key, _ in _references(plain):
        try:
            found = node[key]
        except OmegaConfBaseException:  # the variable is not set here
            continue
        if isinstance(found, int | float) or (isinstance(found, str) and is_setting(found)):
            node[key] = found
    return OmegaConf.to_container(plain, resolve=False)


def stored_config(config: Mapping[str, Any]) -> DictConfig:
    """A stored configuration as OmegaConf reads it, in which nothing is resolved.

    A store may come from somebody else, and a reference in it would put a secret of this machine where they want it.
    What it says is plain text here, but for a whole value that refers to a plain value of the same configuration. In
    the sections of :data:`OF_THE_MACHINE` a text would be no valid value: there the key's default applies, with a
    warning.

    Args:
        config: As in a run's head.
    """
    found = _without_references(config, config)
    for name in OF_THE_MACHINE:
        if isinstance(section := found.get(name), dict):
            unknown = [key for key, value in section.items() if any(_UNKNOWN in text for text in _texts(value))]
            for key in unknown:
                del section[key]
                log.warning("%s.%s of the stored run refers to its own machine; the default is used.", name, key)
    return OmegaConf.create(found)


def as_text(value: Any) -> Any:
    """Plain data as part of a configuration in which nothing is resolved, such as names that a store holds."""
    return _without_references(value, {})


def _without_references(value: Any, root: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_references(child, root) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_without_references(child, root) for child in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    # One step to a scalar: references to references could grow without bound.
    if match := _TO_A_VALUE.fullmatch(value):
        found: Any = root
        for part in match[1].split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if isinstance(found, int | float) or (isinstance(found, str) and "${" not in found):
            return found
    # No escape: OmegaConf removes it where a text stands for a section, and then resolves what is left.
    return value.replace("${", _UNKNOWN)


def _references(node: Any) -> Iterator[tuple[Any, Any, str]]:
    """All references within a configuration: container, key and text."""
    if not isinstance(node, DictConfig | ListConfig) or node._is_none() or node._is_missing():
        return
    for key in range(len(node)) if isinstance(node, ListConfig) else list(node.keys()):
        # The node and not its value, which would be resolved.
        child: Any = node._get_node(key)  # type: ignore[arg-type]
        if child._is_interpolation():
            yield node, key, str(child._value())
        else:
            yield from _references(child)


def _is_kept(text: str) -> bool:
    """Whether a text of a configuration may hold a secret, or refers to one."""
    return "://" in text or "${" in text


def _texts(value: Any) -> Iterator[str]:
    """All texts within plain data: keys too, and numbers."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for child in value:
            yield from _texts(child)
    elif value is not None:
        yield str(value)
