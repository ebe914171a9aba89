"""Routers of the user's own, which are code: this process imports only those that its user has named. Torch-free."""

from __future__ import annotations

from lifelong_moe.errors import ConfigError

# Of the process and not of a call: models are built in many places, all of which must ask.
_allowed: set[str] = set()


def allow_router(path: str | None) -> None:
    """Let this process import a router, as the user of a command does by naming it.

    Args:
        path: Its dotted path, as in ``routing.mode`` of a configuration that the user gave to the command, or in
            ``--router``; never one that was read from a store. Nothing happens for None and for built-in modes.
    """
    if path is not None:
        _allowed.add(path)


def require_allowed(path: str) -> None:
    """Refuse to import a router that only a stored stage names: a store from somebody else would run its code.

    Raises:
        ConfigError: Naming the router, and how to allow it.
    """
    if path not in _allowed:
        raise ConfigError(
            f"routing.mode={path} of a stored stage is code of somebody's own, which is imported only if you name it. "
            f"If you trust it, add --router {path}."
        )
