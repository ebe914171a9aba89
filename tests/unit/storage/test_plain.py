from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import pytest

from lifelong_moe.storage.plain import PlainError, from_plain


class Kind(StrEnum):
    new = "new"


@dataclass
class Inner:
    kind: Kind = Kind.new
    numbers: tuple[int, ...] | None = None


@dataclass
class Told:
    value: int

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Told:
        return cls(data["value"] + 1)


@dataclass
class Holder:
    told: Told


@dataclass
class Outer:
    inner: Inner | None
    pairs: tuple[tuple[str, Kind], ...]
    inners: tuple[Inner, ...] = ()
    width: int | list[int] = 1
    options: Any = None
    named: Mapping[str, Inner] = field(default_factory=dict)


def test_what_asdict_writes_is_read_again() -> None:
    for made in (
        Outer(None, ()),
        Outer(
            Inner(numbers=(1, 2)),
            (("a", Kind.new),),
            (Inner(), Inner(Kind.new, ())),
            [3, 4],
            {"x": [1]},
            {"a": Inner()},
        ),
    ):
        read = from_plain(Outer, json.loads(json.dumps(asdict(made))))
        assert read == made and type(read.pairs) is tuple
        assert all(isinstance(one.kind, Kind) for one in read.inners)


def test_absent_fields_have_their_defaults_and_what_is_not_known_is_an_error() -> None:
    assert from_plain(Inner, {}) == Inner()
    for wrong in ({}, {"inner": None, "pairs": [], "more": 1}):
        with pytest.raises(PlainError):
            from_plain(Outer, wrong)
    with pytest.raises(PlainError, match="kind: must be new, not 'old'"):
        from_plain(Inner, {"kind": "old"})


def test_a_section_with_a_reader_of_its_own_reads_itself() -> None:
    assert from_plain(Holder, {"told": {"value": 1}}) == Holder(Told(2))


@dataclass
class Numbers:
    listed: list[float] = field(default_factory=list)
    rows: list[list[float]] = field(default_factory=list)
    named: Mapping[str, float] = field(default_factory=dict)


def test_many_numbers_are_each_a_finite_number() -> None:
    floats = [0.5, -1e300, 0.0]
    read = from_plain(Numbers, {"listed": floats, "rows": [floats, []], "named": {"a": 0.5}})
    assert read == Numbers(floats, [floats, []], {"a": 0.5}) and read.listed is not floats
    # An integer stays one: what is read is written again as it was.
    assert [*map(type, from_plain(Numbers, {"listed": [1, 0.5]}).listed)] == [int, float]
    assert type(from_plain(Numbers, {"named": {"a": 1, "b": 0.5}}).named["a"]) is int
    for wrong in (math.nan, math.inf, True, None, "1", [1.0], 1 << 63):
        for data, where in (
            ({"listed": [0.5, wrong]}, "listed[1]"),
            ({"listed": [wrong]}, "listed[0]"),
            ({"rows": [[0.5], [0.5, 0.5, wrong]]}, "rows[1][2]"),
            ({"named": {"a": 0.5, "b": wrong}}, "named.b"),
        ):
            with pytest.raises(PlainError, match="must be a finite number") as error:
                from_plain(Numbers, data)
            assert str(error.value).startswith(f"{where}: ")
    for data in ({"listed": {"a": 0.5}}, {"listed": 0.5}, {"named": [0.5]}, {"named": {1: 0.5}}):
        with pytest.raises(PlainError):
            from_plain(Numbers, data)
