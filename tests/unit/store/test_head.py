"""What a run's name stands for: heads on disk, of today and of earlier versions, and how one becomes another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lifelong_moe.config.data import KeepText
from lifelong_moe.data.tokens.records import TextRecord
from lifelong_moe.errors import ConfigError
from lifelong_moe.storage.plain import PlainError
from lifelong_moe.store.head import MlflowState, RunHead
from lifelong_moe.store.ticks import BestLoss, LastTick, SettledBatch
from lifelong_moe.store.versions import VersionStage, describe

A, B, C = (VersionStage(name=name, key=name * 64, data=f"{name}_text", action="base") for name in "abc")
KEYS = ("a" * 64, "b" * 64)
BATCH = "d" * 64
HEAD = RunHead(run="r", method="lifelong", seed=0, config={"x": {}}, plan=KEYS, names=("a", "b"), stages=KEYS)
EARLIER = Path(__file__).parents[2] / "integration/earlier/mlruns/runs/old/head.json"
TEXT = TextRecord(
    train_hash="1" * 64, heldout_hash="2" * 64, split_hash="3" * 64, documents=3, tokens=9, bytes_per_token=2.5,
    heldout_documents=1, heldout_tokens=2, duplicates=0, left_out=("0f",),
)  # fmt: skip


@pytest.fixture
def head() -> RunHead:
    """Two versions: the run's own two stages on the 1st, and a third stage on the 2nd."""
    return HEAD.with_base([A, B], "2026-01-01T00:00:00Z").promoted(
        "promoted", [A, B, C], "better", "2026-01-02T00:00:00Z"
    )


def written(head: RunHead) -> dict[str, Any]:
    """As it stands on disk."""
    return json.loads(json.dumps(head.to_json()))  # type: ignore[no-any-return]


def test_a_batch_of_the_first_versions_has_no_fraction() -> None:
    old = written(replace(HEAD, batches={BATCH: SettledBatch(name="n", outcome="skipped", reason="", at="")}))
    del old["batches"][BATCH]["heldout_fraction"]
    assert RunHead.from_json(old).batches[BATCH].heldout_fraction is None


def test_a_head_comes_back_from_disk_as_it_was(head: RunHead) -> None:
    whole = replace(
        head,
        trained=KEYS,
        data={"a": "4" * 64},
        texts={"a": TEXT},
        tokenizer="5" * 64,
        centroids="6" * 64,
        mlflow=MlflowState(
            run="m", stages={KEYS[0]: "n"}, logged={KEYS[0]: {"loss": 1.5}}, ticks={BATCH: "o"}, replaced=("p",)
        ),
        batches={
            BATCH: SettledBatch(name="n", outcome="skipped", reason="", at="", heldout_fraction=0.5, sources="5a")
        },
        waiting="e" * 64,
        open=(BATCH, "e" * 64),
        keep_text=KeepText.never,
        best={"a": BestLoss(key=KEYS[0], heldout="2" * 64, nats=2.5)},
        last_tick=LastTick(at="2026", outcome="idle", reason="nothing"),
    )
    for one in (HEAD, head, whole):
        assert RunHead.from_json(written(one)) == one
    assert written(whole)["champion"] == 1 and "champion_id" not in written(whole)
    assert set(written(HEAD)) == {
        "schema", "run", "method", "seed", "config", "plan", "names", "stages", "mlflow"
    }  # fmt: skip


def test_heads_of_earlier_versions_say_the_same_and_then_have_a_schema() -> None:
    stored = json.loads(EARLIER.read_text(encoding="utf-8"))
    head = RunHead.from_json(stored)
    assert "schema" not in stored
    again = written(head)
    assert {name: again[name] for name in stored if name != "mlflow"} == {
        name: value for name, value in stored.items() if name != "mlflow"
    }
    assert stored["mlflow"].items() <= again["mlflow"].items() and again["schema"] == 1
    assert RunHead.from_json({**stored, "of": "nobody"}) == head


def test_a_configuration_of_an_earlier_version_is_read_under_today_s_keys() -> None:
    stored = written(HEAD)
    config = {"run": "one", "trainer": {"gradient_clip_val": 0.5, "devices": 2}}
    head = RunHead.from_json({**stored, "config": config})
    assert head.config == {"run": "one", "trainer": {"gradient_clip": 0.5, "devices": 2}}


def test_what_is_no_head_or_one_of_a_later_version_is_said() -> None:
    stored = written(HEAD)
    for name in ("run", "method", "seed", "config", "plan", "names", "stages"):
        with pytest.raises(PlainError, match=r"^not the head of a run$"):
            RunHead.from_json({key: value for key, value in stored.items() if key != name})
    for other in ([], "head"):
        with pytest.raises(PlainError, match=r"^not the head of a run$"):
            RunHead.from_json(other)
    version = {"id": 0, "at": "", "kind": "base", "reason": "", "before": None, "stages": [vars(A)]}
    damaged: list[tuple[dict[str, Any], str]] = [
        ({"plan": 5}, "plan: must be a list, not 5"),
        ({"plan": [KEYS[0], "../" + KEYS[1]]}, r"plan\[1\]: must be 64 hexadecimal digits"),
        ({"plan": KEYS[:1]}, "names: 2 for the 1 stages"),
        ({"run": "x/../../evil"}, "run: must be a name"),
        ({"seed": True}, "seed: must be a whole number, not true"),
        ({"seed": 1e400}, "seed: must be a whole number"),
        ({"seed": 1 << 63}, "seed: must be a number of at most 64 bits"),
        ({"versions": [{}]}, r"versions\[0\]\.id: missing"),
        ({"versions": [version | {"id": 3}]}, r"versions\[0\]: not a version"),
        ({"versions": [version | {"stages": []}]}, r"versions\[0\]: not a version"),
        ({"versions": [version], "champion": 1}, "champion: 1, but there are 1 versions"),
        ({"versions": [version | {"stages": [vars(A) | {"key": "k"}]}]}, r"versions\[0\]\.stages\[0\]\.key: must"),
        ({"texts": []}, "texts: must be an object"),
        ({"data": {"../x": KEYS[0]}}, r"data\.\.\./x: must be a name"),
        ({"mlflow": None}, "mlflow: must be an object"),
        (
            {"mlflow": {"logged": {KEYS[0]: {"loss": float("nan")}}}},
            rf"mlflow\.logged\.{KEYS[0]}\.loss: must be a finite",
        ),
        ({"config": []}, "config: must be an object"),
    ]
    for changes, message in damaged:
        with pytest.raises(PlainError, match=f"^{message}"):
            RunHead.from_json(stored | changes)
    with pytest.raises(PlainError, match=r"^written by a later version of lifelong-moe \(schema 2; this one reads 1\)"):
        RunHead.from_json({"schema": 2, "runs": []})


def test_committed_stages_come_in_the_order_of_the_plan() -> None:
    first, neither = replace(HEAD, stages=KEYS[:1]), replace(HEAD, stages=())
    assert first.committed == {"a": KEYS[0]} and first.with_committed(KEYS[1]) == HEAD
    assert list(replace(HEAD, stages=KEYS[::-1]).committed) == ["a", "b"]
    assert (HEAD.require_stage(), HEAD.require_stage("a"), first.require_stage()) == (KEYS[1], KEYS[0], KEYS[0])
    assert (HEAD.is_finished, first.is_finished, replace(neither, plan=(), names=()).is_finished) == (
        True,
        False,
        False,
    )
    with pytest.raises(ConfigError, match="no committed stage b; there are a"):
        first.require_stage("b")
    with pytest.raises(ConfigError, match="no committed stage yet"):
        neither.require_stage()


def test_versions_begin_with_a_finished_run() -> None:
    found = HEAD.with_base([A, B], "2026-01-01T00:00:00Z")
    (only,) = found.versions
    assert (only.id, only.kind, only.before, only.stages, only.key) == (0, "base", None, (A, B), "b" * 64)
    assert found.champion == only and not HEAD.versions and written(found)["champion"] == 0
    assert found.with_base([A, B, C], "2027-01-01T00:00:00Z") == found  # once begun it stays
    for unfinished in (replace(HEAD, stages=KEYS[:1]), replace(HEAD, stages=(), plan=(), names=())):
        with pytest.raises(ConfigError, match="run r is not finished"):
            unfinished.with_base([A], "2026-01-01T00:00:00Z")
    with pytest.raises(ConfigError, match="b missing"):
        replace(HEAD, stages=KEYS[:1]).require_finished()


def test_what_is_promoted_serves_and_the_head_is_its(head: RunHead) -> None:
    old, new = head.versions
    assert (new.id, new.before, new.reason, head.champion) == (1, 0, "better", new)
    assert head.names == ("a", "b", "c") and head.stages == head.plan == ("a" * 64, "b" * 64, "c" * 64)
    assert describe(new) == "version 1 (promoted, 2026-01-02T00:00:00Z): a → b → c, stage cccccccccccccccc"
    assert old.stages == (A, B)


@pytest.mark.parametrize(
    "read", [lambda head: head.champion, lambda head: head.promoted("promoted", [A], "", ""), RunHead.rolled_back]
)
def test_a_run_without_versions_has_no_champion(read: Any) -> None:
    with pytest.raises(ConfigError, match="run r has no versions yet"):
        read(HEAD)


@pytest.mark.parametrize("stages", [[], [A, A]])
def test_a_version_needs_stages_of_different_names(head: RunHead, stages: list[VersionStage]) -> None:
    with pytest.raises(ValueError, match="distinct names"):
        head.promoted("promoted", stages, "", "")


def test_rolling_back_goes_to_what_served_before_and_forward_again(head: RunHead) -> None:
    back = head.rolled_back()
    assert back.champion.id == 0 and back.names == ("a", "b") and back.versions == head.versions
    with pytest.raises(ConfigError, match="version 0 serves, and none served before it"):
        back.rolled_back()
    assert back.rolled_back(1) == head and head.rolled_back(0).champion.id == 0
    for wrong in (-1, 2):
        with pytest.raises(ConfigError, match=f"no version {wrong}; there are 0 to 1"):
            head.rolled_back(wrong)
    again = back.promoted("dropped", [A], "", "2026-01-03T00:00:00Z")
    assert (again.champion.id, again.champion.before) == (2, 0)  # what served then, not the newest


BEST = {"b_text": BestLoss(key=B.key, heldout="h" * 64, nats=1.0)}


def test_a_candidate_has_a_number_and_serves_once_it_is_approved(head: RunHead) -> None:
    number, before = len(head.versions), head.champion
    waits = head.with_candidate([A, B], "better", "2026-02-01T00:00:00Z", BEST)
    assert (waits.candidate, waits.champion, waits.plan) == (waits.versions[number], before, head.plan)
    assert (waits.versions[number].before, waits.best) == (before.id, head.best)
    assert waits.versions_until("2027") == list(head.versions)
    with pytest.raises(ConfigError, match=rf"version {number} .* approval is awaited. lifelong-moe promote"):
        waits.rolled_back(number)
    after = waits.approved("2026-02-03T00:00:00Z")
    assert (after.champion.id, after.champion.at, after.candidate) == (number, "2026-02-03T00:00:00Z", None)
    assert (after.best, after.candidate_best, after.plan) == (BEST, {}, (A.key, B.key))
    assert after.rolled_back().champion == before
    with pytest.raises(ConfigError, match=r"no version of run .* awaits approval"):
        after.approved("2026-02-04T00:00:00Z")


def test_what_is_refused_never_serves(head: RunHead) -> None:
    number = len(head.versions)
    refused = head.with_candidate([A, B], "", "2026-02-01T00:00:00Z", BEST).refused()
    assert (refused.candidate, refused.champion, refused.candidate_best) == (None, head.champion, {})
    with pytest.raises(ConfigError, match=rf"version {number} of run .* its approval is refused\."):
        refused.rolled_back(number)
    # A number is never another's, and a second candidate takes the place of the first.
    again = refused.with_candidate([A, C], "", "2026-02-01T00:00:00Z", {})
    third = again.with_candidate([A, B], "", "2026-02-02T00:00:00Z", {})
    assert again.candidate is not None and again.candidate.id == number + 1
    assert [version.approval for version in third.versions[number:]] == ["refused", "refused", "awaited"]
    assert RunHead.from_json(written(third)) == third


def test_a_candidate_for_another_champion_cannot_be_approved(head: RunHead) -> None:
    waits = head.with_candidate([A, B], "", "2026-02-01T00:00:00Z", {})
    other = waits.promoted("dropped", [A], "", "2026-02-02T00:00:00Z")
    with pytest.raises(ConfigError, match="was measured against version"):
        other.approved("2026-02-03T00:00:00Z")


def test_a_champion_that_nobody_approved_is_refused(head: RunHead) -> None:
    stored = written(head.with_candidate([A, B], "", "2026-02-01T00:00:00Z", {}))
    with pytest.raises(PlainError, match="was never approved"):
        RunHead.from_json(stored | {"champion": len(head.versions)})


def test_what_is_dated_later_is_left_out(head: RunHead) -> None:
    def dated(at: str) -> list[int]:
        return [version.id for version in head.versions_until(at)]

    assert dated("2025-12-31T23:59:59Z") == []
    assert dated("2026-01-01T00:00:00Z") == dated("2026-01-01T23:59:59Z") == [0]
    assert dated("2026-01-02T00:00:00Z") == [0, 1]


def test_how_a_batch_was_split_stands_with_the_stage_or_with_the_decision_about_the_batch(head: RunHead) -> None:
    assert (A.heldout_fraction, A.heldout_sources, A.batch, A.sources) == (None, 1, None, None)
    noted = VersionStage(
        name="n", key=KEYS[0], data="n", action="grow", batch=BATCH, heldout_fraction=0.2, heldout_sources=5
    )
    earlier = VersionStage(name="e", key=KEYS[1], data="e", action="grow", batch=BATCH)
    unknown = VersionStage(name="u", key="f" * 64, data="u", action="grow", batch="e" * 64)
    stored = written(head.promoted("promoted", [A, noted, earlier, unknown], "", ""))
    stored["batches"] = {BATCH: {"name": "e", "outcome": "promoted", "reason": "", "at": "", "heldout_fraction": 0.3}}
    stages = RunHead.from_json(stored).champion.stages
    assert [stage.heldout_fraction for stage in stages] == [None, 0.2, 0.3, None]
    assert [stage.heldout_sources for stage in stages] == [1, 5, 1, 1]


def test_a_run_that_starts_over_marks_what_mlflow_knew_as_replaced() -> None:
    told = MlflowState(run="m", stages={"a": "n"}, ticks={"b": "o"}, content="c", replaced=("p",))
    assert told.restarted() == MlflowState(replaced=("p", "m", "n"))
    assert MlflowState().restarted() == MlflowState()


def test_a_tick_repeats_one_that_ended_just_so_at_whatever_time() -> None:
    tick = LastTick(at="2026", outcome="waiting", reason="too little", batch="b")
    assert tick.repeats(replace(tick, at="2025")) and not tick.repeats(None)
    assert not tick.repeats(replace(tick, batch=None)) and not tick.repeats(replace(tick, reason="x"))
