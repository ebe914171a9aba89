"""Check names in a configuration, and suggest a known one for a misspelt one. Torch-free."""

from __future__ import annotations

import difflib
import re
from typing import Any

from lifelong_moe.errors import ConfigError
from lifelong_moe.storage import grammars

# Names become folders, hence no slash, and no leading dot, which marks our temporary folders.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
SCRATCH = ".scratch"
"""Suffix of the name of a model that is trained from scratch beside a stage."""


def require_name(name: str, what: str) -> str:
    """Return a name, which becomes part of paths, once it has the form of one.

    Raises:
        ConfigError: If it has not.
    """
    # Longer than what a configuration may say: names of derived stages end in `.dropped` and the like.
    if not grammars.NAME.allows(name):
        raise ConfigError(f"{what}={name}: must be {grammars.NAME.words}, at most 128 characters.")
    return name


def require_known(name: str, known: Any, what: str) -> None:
    """Raise a ConfigError with the nearest known name unless ``name`` is known."""
    if name not in known:
        near = difflib.get_close_matches(name, list(known), n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(sorted(known))}."
        raise ConfigError(f"{what} {name} is unknown. {hint}" if what == "key" else f"{what}={name} is unknown. {hint}")
