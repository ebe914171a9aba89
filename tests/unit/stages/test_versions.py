"""Which versions a run has served and which one serves: heads in, heads out."""

from __future__ import annotations

from typing import Any

import pytest

from lifelong_moe.errors import ConfigError
from lifelong_moe.stages.versions import (
    VersionStage,
    begin,
    champion,
    dated_until,
    describe,
    promoted,
    require_finished,
    rolled_back,
    versions,
)

A, B, C = (VersionStage(name=name, key=name * 64, data=f"{name}_text", action="base") for name in "abc")
HEAD: dict[str, Any] = {"run": "r", "names": ["a", "b"], "plan": ["a" * 64, "b" * 64], "stages": ["a" * 64, "b" * 64]}


@pytest.fixture
def head() -> dict[str, Any]:
    """Two versions: the run's own two stages on the 1st, and a third stage on the 2nd."""
    first = begin(HEAD, [A, B], "2026-01-01T00:00:00Z")
    return promoted(first, "promoted", [A, B, C], "better", "2026-01-02T00:00:00Z")


def test_versions_begin_with_a_finished_run() -> None:
    found = begin(HEAD, [A, B], "2026-01-01T00:00:00Z")
    (only,) = versions(found)
    assert (only.id, only.kind, only.before, only.stages, only.key) == (0, "base", None, (A, B), "b" * 64)
    assert found["champion"] == 0 and "versions" not in HEAD
    assert begin(found, [A, B, C], "2027-01-01T00:00:00Z") == found  # once begun it stays
    for unfinished in ({**HEAD, "stages": ["a" * 64]}, {**HEAD, "stages": [], "plan": [], "names": []}):
        with pytest.raises(ConfigError, match="run r is not finished"):
            begin(unfinished, [A], "2026-01-01T00:00:00Z")
    with pytest.raises(ConfigError, match="b to do"):
        require_finished({**HEAD, "stages": ["a" * 64]})


def test_what_is_promoted_serves_and_the_head_is_its(head: dict[str, Any]) -> None:
    old, new = versions(head)
    assert (new.id, new.before, new.reason, champion(head)) == (1, 0, "better", new)
    assert (head["names"], head["plan"]) == (["a", "b", "c"], ["a" * 64, "b" * 64, "c" * 64])
    assert head["stages"] == head["plan"] and head["stages"] is not head["plan"]
    assert describe(new) == "version 1 (promoted, 2026-01-02T00:00:00Z): a → b → c, stage cccccccccccccccc"
    assert old.stages == (A, B)


@pytest.mark.parametrize("read", [champion, lambda head: promoted(head, "promoted", [A], "", ""), rolled_back])
def test_a_run_without_versions_has_no_champion(read: Any) -> None:
    with pytest.raises(ConfigError, match="run r has no versions yet"):
        read(HEAD)


@pytest.mark.parametrize("stages", [[], [A, A]])
def test_a_version_needs_stages_of_different_names(head: dict[str, Any], stages: list[VersionStage]) -> None:
    with pytest.raises(ValueError, match="each of another name"):
        promoted(head, "promoted", stages, "", "")


def test_rolling_back_goes_to_what_served_before_and_forward_again(head: dict[str, Any]) -> None:
    back = rolled_back(head)
    assert champion(back).id == 0 and back["names"] == ["a", "b"] and back["versions"] == head["versions"]
    with pytest.raises(ConfigError, match="version 0 serves, and none served before it"):
        rolled_back(back)
    assert rolled_back(back, 1) == head and champion(rolled_back(head, 0)).id == 0
    for wrong in (-1, 2):
        with pytest.raises(ConfigError, match=f"no version {wrong}; there are 0 to 1"):
            rolled_back(head, wrong)
    again = promoted(back, "dropped", [A], "", "2026-01-03T00:00:00Z")
    assert (champion(again).id, champion(again).before) == (2, 0)  # what served then, not the newest


def test_what_is_dated_later_is_left_out(head: dict[str, Any]) -> None:
    def dated(at: str) -> list[int]:
        return [version.id for version in dated_until(head, at)]

    assert dated("2025-12-31T23:59:59Z") == []
    assert dated("2026-01-01T00:00:00Z") == dated("2026-01-01T23:59:59Z") == [0]
    assert dated("2026-01-02T00:00:00Z") == [0, 1]


def test_how_a_batch_was_split_stands_with_the_stage_or_with_the_decision_about_the_batch(
    head: dict[str, Any],
) -> None:
    assert (A.heldout_fraction, A.heldout_sources, A.batch, A.sources) == (None, 1, None, None)
    noted = VersionStage(name="n", key="n", data="n", action="grow", batch="x", heldout_fraction=0.2, heldout_sources=5)
    earlier = VersionStage(name="e", key="e", data="e", action="grow", batch="x")
    unknown = VersionStage(name="u", key="u", data="u", action="grow", batch="y")
    found = promoted(head, "promoted", [A, noted, earlier, unknown], "", "")
    found["batches"] = {"x": {"heldout_fraction": 0.3}, "": {"heldout_fraction": 0.9}}
    stages = champion(found).stages
    assert [stage.heldout_fraction for stage in stages] == [0.9, 0.2, 0.3, None]
    assert [stage.heldout_sources for stage in stages] == [1, 5, 1, 1]
