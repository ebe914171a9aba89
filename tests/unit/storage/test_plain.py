from __future__ import annotations

import json
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
