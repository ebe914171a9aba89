"""The size that a system's authors built, from a preset: what it would be here, and what they say it is."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

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
    model = replace(config.model, **published.model)
    routing = replace(config.routing, **published.routing)
    return Architecture(model, routing, published.vocab_size, 0, (first_generation("published", model),))


def published_count(config: RunConfig) -> ParameterCount:
    """Its parameters, with the authors' attention where ours is of another kind."""
    architecture, published = published_architecture(config), config.published
    counted = count_parameters(architecture)
    if published is None or published.attention is None:
        return counted
    model = architecture.model
    ours = 2 * model.layers * model.width * model.attention_width * (model.heads + model.kv_heads)
    more = round(published.attention * 1e9) - ours
    return dataclasses.replace(counted, total=counted.total + more, active=counted.active + more)


def sentence(config: RunConfig) -> str | None:
    """For people; None if nothing was published."""
    published: PublishedConfig | None = config.published
    if published is None:
        return None
    counted = published_count(config)
    active = "" if published.active is None else f" / {published.active:g}B active"
    return (
        f"published size ({published.source}): {published.total:g}B{active}; counted here: "
        f"{counted.total / 1e9:.2f}B / {counted.active / 1e9:.2f}B active"
    )
