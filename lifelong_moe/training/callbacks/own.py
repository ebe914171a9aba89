"""Callbacks and loggers that the user's configuration names by class path.

They are code, so this process builds only those of a configuration that its user gave to a command. A configuration
that comes with a store, perhaps somebody else's, imports nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

from lifelong_moe.config.training import OwnClass, TrainerConfig
from lifelong_moe.errors import ConfigError

log = logging.getLogger(__name__)
# With its arguments: another store may name the same class with arguments of its own.
_allowed: set[str] = set()


def allow_own(config: TrainerConfig) -> None:
    """Let this process build what a configuration names, which its user has just given to a command."""
    _allowed.update(map(_identity, [*config.callbacks, *config.logger]))


def only_allowed(config: TrainerConfig) -> TrainerConfig:
    """The configuration without the classes that this process must not build."""
    callbacks, loggers = ([one for one in named if _is_allowed(one)] for named in (config.callbacks, config.logger))
    return replace(config, callbacks=callbacks, logger=loggers)


def build_own(named: Sequence[OwnClass], kind: type, where: str) -> list[Any]:
    """Build instances of the classes; those that were not allowed are left out, with a warning.

    Args:
        named: Classes and their arguments.
        kind: What each must be, a callback or a logger.
        where: Key of the configuration, for errors.

    Raises:
        ConfigError: If a class cannot be imported or built, or is of another kind.
    """
    built = []
    for i, one in enumerate(named):
        if not _is_allowed(one):
            log.warning("%s: %s is code that a stored configuration names, and is left out", where, one.class_path)
            continue
        module, _, name = one.class_path.rpartition(".")
        try:
            made = getattr(import_module(module), name)(**one.init_args)
        # A class of the user may fail in any way; the configuration named it, so the error names the key.
        except Exception as error:
            raise ConfigError(f"{where}[{i}]: {one.class_path} cannot be built: {error}.") from error
        if not isinstance(made, kind):
            raise ConfigError(f"{where}[{i}]: {one.class_path} must be a {kind.__module__}.{kind.__name__}.")
        built.append(made)
    return built


def _is_allowed(named: OwnClass) -> bool:
    return _identity(named) in _allowed


def _identity(named: OwnClass) -> str:
    return json.dumps([named.class_path, named.init_args], sort_keys=True, default=str)
