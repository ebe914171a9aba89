"""Whatever can be written of routing has a form without the keys that change nothing, which can be written as well."""

from __future__ import annotations

import dataclasses
import typing
from enum import Enum
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from lifelong_moe.config.routing.base import RoutingConfig
from lifelong_moe.config.routing.capacity import CapacityConfig
from lifelong_moe.config.routing.modes import ROUTERS, stored_routing
from lifelong_moe.errors import ConfigError
from tests.conftest import routing_of

TYPES = typing.get_type_hints(RoutingConfig)


def values(key: str) -> st.SearchStrategy[Any]:
    """Some values of a key, alone perhaps not valid."""
    kind, optional = TYPES[key], type(None) in typing.get_args(TYPES[key])
    if optional:
        kind = next(one for one in typing.get_args(kind) if one is not type(None))
    if key == "capacity":
        return st.sampled_from([None, CapacityConfig()])
    if key == "options":
        return st.just({})
    if isinstance(kind, type) and issubclass(kind, Enum):
        members: list[Any] = list(kind)
        return st.sampled_from([*members, None] if optional else members)
    if optional:
        return st.sampled_from([None, 2])
    return st.sampled_from({bool: [True, False], int: [1, 2, 4], float: [0.0, 0.1, 1.0]}[kind])


KEYS = [field.name for field in dataclasses.fields(RoutingConfig) if field.name != "mode"]
SETTINGS = st.lists(st.sampled_from(KEYS), max_size=5, unique=True).flatmap(
    lambda keys: st.fixed_dictionaries({key: values(key) for key in keys})
)


@given(mode=st.sampled_from(list(ROUTERS)), settings=SETTINGS, grown=st.booleans())
def test_every_routing_has_an_effective_form(mode: str, settings: dict[str, Any], grown: bool) -> None:
    try:
        written = routing_of(mode=mode, **settings)
    except ConfigError:
        assume(False)
    found = written.effective(grown=grown)
    assert found.effective(grown=grown) == found
    assert stored_routing(found.to_json()) == found


def test_one_expert_with_noise() -> None:
    """The default of ``renormalize``, which this mode does not read, cannot be written there."""
    noisy = routing_of(mode="noisy_topk", top_k=1, renormalize=False)
    assert noisy.effective(grown=False) == noisy
