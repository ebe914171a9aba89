"""The published size of a preset's system: its parameters as counted here, and as its authors state them."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

from lifelong_moe.config.names import require_known
from lifelong_moe.config.run import PublishedConfig, RunConfig
from lifelong_moe.plan.architecture import Architecture, first_generation
from lifelong_moe.plan.cost import ParameterCount, count_parameters


def published_architecture(config: RunConfig) -> Architecture:
    """The architecture at published size.

    Args:
        config: With ``published``.

    Raises:
        ConfigError: If its model or routing is not one.
    """
    published = config.published
    assert published is not None
    for section, keys in (("model", published.model), ("routing", published.routing)):
        known = {field.name for field in dataclasses.fields(getattr(config, section))}
        for key in keys:
            require_known(str(key), known, f"published.{section}")
    model = replace(config.model, **published.model)
    routing = replace(config.routing, **published.routing)
    # The id of BOS has no influence on the count.
    return Architecture(model, routing, published.vocab_size, 0, (first_generation("published", model),))


def published_count(config: RunConfig) -> ParameterCount:
    """Parameters of the published architecture."""
    architecture, published = published_architecture(config), config.published
    count = count_parameters(architecture)
    if published is None or published.attention is None:
        return count
    model = architecture.model
    # Where the authors' attention is of another kind, their count of it replaces ours.
    ours = 2 * model.layers * model.width * model.attention_width * (model.heads + model.kv_heads)
    more = round(published.attention * 1e9) - ours
    return dataclasses.replace(count, total=count.total + more, active=count.active + more)


def sentence(config: RunConfig) -> str | None:
    """One sentence that compares both counts; None without a published size."""
    published: PublishedConfig | None = config.published
    if published is None:
        return None
    count = published_count(config)
    active = "" if published.active is None else f" / {published.active:g}B active"
    return (
        f"published size ({published.source}): {published.total:g}B{active}; counted here: "
        f"{count.total / 1e9:.2f}B / {count.active / 1e9:.2f}B active"
    )
