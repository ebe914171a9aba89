"""From ``routing.mode`` to a router: built-in names and dotted paths alike."""

from __future__ import annotations

from importlib import import_module

from lifelong_moe.config.routing.base import RoutingConfig
from lifelong_moe.config.routing.modes import ROUTERS
from lifelong_moe.config.routing.own import require_allowed
from lifelong_moe.config.routing.topk import CustomRouterConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.routing.base import Causality, Router

_RENAMED = {
    "begin": "initialize",
    "begun_parameters": "preset_parameters",
    "holding_down": "masking_newest",
    "choosable": "available",
    "num_choosable": "num_available",
}
"""Methods of a router under the names of earlier versions, which nothing calls any more."""


def build_router(config: RoutingConfig, *, width: int, layer: int, causal: bool = True) -> Router:
    """Build one layer's router.

    Args:
        config: The run's routing.
        width: D.
        layer: The layer's index, from 0.
        causal: Whether it is for a decoder, where a token must not see what follows.

    Raises:
        ConfigError: If a dotted path was not named by the user, cannot be imported, is no :class:`Router` or one of an
            earlier version, or breaks causality.
    """
    if isinstance(config, CustomRouterConfig):
        require_allowed(config.mode)
    options = config.options if isinstance(config, CustomRouterConfig) else {}
    path = config.mode if isinstance(config, CustomRouterConfig) else ROUTERS[config.mode].router
    module, _, name = path.rpartition(".")
    try:
        build = getattr(import_module(module), name)
        router = build(config, width=width, layer=layer, **options)
    # A class of the user may fail in each of these ways; the configuration named it, so the error names the key.
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"routing.mode={config.mode} cannot be built: {error}.") from None
    if not isinstance(router, Router):
        raise ConfigError(f"routing.mode={config.mode} must build a lifelong_moe.routing.base.Router.")
    # Under its old name an override would be ignored without a word.
    for old in (name for name in _RENAMED if hasattr(router, name)):
        raise ConfigError(f"routing.mode={config.mode} defines {old}, which is {_RENAMED[old]} now. Rename it there.")
    # In an encoder every token may see all others, so only a decoder is held to causality.
    if causal and not config.allow_noncausal and router.causality in (Causality.leaks_when_full, Causality.leaks):
        raise ConfigError(
            f"routing.mode={config.mode} lets later tokens change earlier ones (class "
            f"{router.causality}); a decoder must not. Set routing.allow_noncausal=true to try it nevertheless."
        )
    return router
