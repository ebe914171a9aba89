"""Ticks of scheduled retraining on tiny runs: decisions, gate, idempotence, kills."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import pipelines.retrain.batch as story
from lifelong_moe.config.retraining.policy import GateConfig
from lifelong_moe.config.routing.mixture import MixtureConfig
from lifelong_moe.data.arrivals import batches
from lifelong_moe.data.arrivals.batches import BatchStore
from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.text.sources import read_corpus
from lifelong_moe.data.tokens import shards
from lifelong_moe.errors import ConfigError, DataError, DivergedError, LockedError, ResourceError, StalePlanError
from lifelong_moe.plan.retraining import load_retraining
from lifelong_moe.retraining.checks import Check, Verdict
from lifelong_moe.retraining.decision import Action, Decision, decide
from lifelong_moe.storage.locks import locked
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import RunRecord, timestamp
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.callbacks.progress import StepCheckpoint
from pipelines.cli import exit_code
from pipelines.exit_codes import OUTCOMES
from pipelines.retrain import arrivals
from pipelines.retrain import plan as retrain_plan
from pipelines.retrain.plan_file import read_plan
from pipelines.versions.drop import drop
from pipelines.versions.rollback import rollback
from pipelines.versions.served import served_stages
from tests.known_stages import train_all_stages
from tests.retrain_lab import (
    TOKENS,
    arrive,
    change_head,
    head,
    ledger,
    make_base,
    stages,
    tick,
    tick_and_text,
    write_retraining,
)
from tests.tiny import VOCABULARIES, fork, kill_self, stored_evaluations, train

SILENT = Console(quiet=True)


@pytest.fixture(autouse=True)
def lab(retraining_base: Path, known_stages: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in."""
    root = tmp_path / "lab"
    shutil.copytree(retraining_base, root)
    monkeypatch.chdir(root)
    return root


def weights(key: str) -> str:
    return StageStore(Path("mlruns")).get(key).weights_hash


# Looking


def test_an_empty_inbox_is_idle() -> None:
    before = stages()
    result = tick()
    assert (result["outcome"], result["reason"]) == ("idle", "nothing new has arrived")
    assert stages() == before and head()["last_tick"]["outcome"] == "idle"
    assert ledger()[-1]["event"] == "tick" and "batches" not in head()
    shutil.rmtree("inbox")  # an absent one as well
    assert tick()["outcome"] == "idle"


def test_too_little_waits_and_is_not_forgotten() -> None:
    arrive("sea", "a.jsonl", documents=12)
    assert "12 new documents are waiting" in tick()["reason"]
    arrive("sea", "b.jsonl", seed=78, documents=12)
    result = tick("trigger.min_tokens=100_000")
    assert result["outcome"] == "idle" and "new tokens are waiting" in result["reason"]
    long_ago = {**head()["versions"][0], "at": "2020-01-01T00:00:00Z"}
    change_head(versions=[long_ago])
    assert tick("trigger.min_tokens=100_000", "trigger.max_days=30", dry_run=True)["outcome"] == "planned"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled as soon as they are written."""
    monkeypatch.setattr(arrivals, "SETTLED_SECONDS", -10)


def reads_nothing(*overrides: str) -> str:
    """Why a tick that may read neither the inbox nor known text is idle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.shared.novelty.glance_at_inbox", None)
        patch.setattr("pipelines.retrain.retrain.read_texts", None)
        outcome = tick(*overrides)
    assert outcome["outcome"] == "idle"
    return str(outcome["reason"])


@pytest.mark.usefixtures("settled")
def test_an_inbox_that_nothing_touched_is_not_read_again() -> None:
    assert reads_nothing() == "nothing new has arrived"  # it is empty
    arrive("sea", documents=12)
    reason = tick()["reason"]
    assert "12 new documents are waiting" in reason and reads_nothing() == reason
    # Limits apply to what was counted.
    assert "trigger.least_documents=13" in reads_nothing("trigger.least_documents=13")
    with pytest.raises(TypeError):
        reads_nothing("inbox.text_field=body")  # other settings find other documents


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "touch", ["another file", "the same size", "another name", "a manifest", "a decision", "damage"]
)
def test_an_inbox_is_read_again_when_something_changed(touch: str) -> None:
    path = arrive("sea", documents=12)
    tick()
    reads_nothing()
    note = Path("mlruns/runs/tiny/inbox.json")
    if touch == "another file":
        arrive("sea", "b.jsonl", seed=78, documents=3)
    elif touch == "the same size":
        state, text = path.stat(), path.read_text(encoding="utf-8")
        path.write_text(text.replace("a", "o"), encoding="utf-8")
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    elif touch == "another name":
        path.rename("inbox/c.jsonl")
    elif touch == "a manifest":
        listed = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        Path("inbox/manifest.json").write_text(json.dumps({"files": {"new.jsonl": listed}}))
    elif touch == "a decision":
        batch = {"name": "b", "outcome": "skipped", "reason": "r", "at": timestamp()}
        batches_ = BatchStore(Path("mlruns"))
        change_head(batches={batches_.add([Document("text", "source")], []): batch})
    else:
        note.write_text("{}")
    before = note.read_text()
    with pytest.raises(TypeError):
        reads_nothing()
    assert tick()["outcome"] == "idle" and note.read_text() != before


BAD = {
    2: (b"{", "malformed JSON"),
    3: (b"[1]", "JSON object"),
    5: (b'{"body": "x"}', 'there is no field "text"'),
    6: (b"", "line is empty"),
    8: (b"caf\xe9", "UTF-8"),
}
"""Lines that hold no document, by their number, and why."""


def test_bad_lines_are_kept_apart() -> None:
    path = arrive("sea")
    good = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join(BAD[n][0] if n in BAD else line for n, line in enumerate(good, 1)) + b"\n")
    with pytest.raises(DataError, match=r"new\.jsonl:2: malformed JSON"):
        tick(dry_run=True)
    with pytest.raises(DataError, match=r"new\.jsonl:6: .* inbox\.max_bad_lines=3 lines are bad already"):
        tick("inbox.bad_lines=quarantine", "inbox.max_bad_lines=3", dry_run=True)
    outcome, printed = tick_and_text("inbox.bad_lines=quarantine", dry_run=True)
    assert outcome["outcome"] == "planned" and outcome["bad_lines"] == ledger()[-1]["bad_lines"] == len(BAD)
    kept = Path("mlruns/runs/tiny/bad_lines.jsonl")
    assert f"5 lines of the inbox hold no document and are left out ({kept}): the first is {path}:2: malf" in printed
    found = [json.loads(line) for line in kept.read_text().splitlines()]
    assert {one["line"]: one["text"] for one in found} == {
        n: text.decode("utf-8", "backslashreplace") for n, (text, _) in BAD.items()
    }
    assert all(BAD[one["line"]][1] in one["reason"] and one["file"] == str(path) for one in found)
    assert kept.stat().st_mode & 0o777 == 0o600
    texts = {json.loads(line)["text"] for n, line in enumerate(good, 1) if n not in BAD}
    assert {document.text for document in BatchStore(Path("mlruns")).documents(outcome["batch"])} <= texts


def test_an_inbox_of_bad_lines_alone_is_idle() -> None:
    Path("inbox/new.jsonl").write_text("{\n" * 9)
    outcome = tick("inbox.bad_lines=quarantine")
    assert (outcome["outcome"], outcome["bad_lines"]) == ("idle", 9)


@pytest.mark.parametrize("seconds", [0, 60])
def test_a_file_that_was_just_written_is_read_again(seconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long others are read meanwhile."""
    clock = SimpleNamespace(time=lambda: time.time() + seconds)
    monkeypatch.setattr(arrivals, "time", clock)
    arrive("sea", documents=12)
    tick()
    assert not Path("mlruns/runs/tiny/inbox.json").exists()


def test_a_file_whose_name_is_not_utf8_is_read_like_any_other() -> None:
    arrive("sea", os.fsdecode(b"caf\xe9.jsonl"))
    result = tick(dry_run=True)
    assert result["outcome"] == "planned"
    assert BatchStore(Path("mlruns")).manifest(result["batch"]).files[0]["name"] == "caf\\udce9.jsonl"


@pytest.mark.parametrize("setting", ["accelerator=tpu", "strategy=xla"])
def test_what_this_machine_cannot_do_is_said_before_anything_is_written(setting: str) -> None:
    arrive("sea")
    before = {path for path in Path().rglob("*") if path.suffix != ".log"}
    with pytest.raises(ConfigError, match=r"^trainer: "):
        tick(f"trainer.{setting}")
    assert {path for path in Path().rglob("*") if path.suffix != ".log"} == before and "last_tick" not in head()


def test_what_the_champion_knows_is_not_new() -> None:
    for name in ("fruit", "code"):
        shutil.copy(f"{name}.jsonl", f"inbox/{name}.jsonl")  # training and held-out text alike
    assert tick()["outcome"] == "idle"


def test_held_out_text_in_the_inbox_is_not_trained_on() -> None:
    arrive("sea")
    held = Path("fruit.jsonl").read_text(encoding="utf-8").splitlines()
    with Path("inbox/new.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n".join(held) + "\n")
    batch = tick(dry_run=True)["batch"]
    kept = {document.text for document in BatchStore(Path("mlruns")).documents(batch)}
    assert len(kept) == 160 and not kept & {json.loads(line)["text"] for line in held}


def test_a_bad_file_is_refused_before_anything_is_written(lab: Path) -> None:
    arrive("sea")
    Path("inbox/bad.jsonl").write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    before = (stages(), head(), sorted(p.name for p in Path("mlruns").iterdir()))
    with pytest.raises(DataError, match=r"inbox/bad\.jsonl:2: malformed JSON"):
        tick()
    assert (stages(), head(), sorted(p.name for p in Path("mlruns").iterdir())) == before


# Deciding


def test_a_dry_run_writes_its_plan_and_changes_nothing_else() -> None:
    arrive("sea")
    before = head()
    result, text = tick_and_text(dry_run=True)
    assert (result["outcome"], result["action"]) == ("planned", "grow")
    plan = json.loads(Path(result["plan"]).read_text(encoding="utf-8"))
    assert plan["stage"]["key"] and plan["decision"]["terms"]["grow/utility"] > 0
    assert "Growing gains" in text and "Drift: " in text and plan["drift"]["fruit"]["words"] in text
    assert plan["power"]["checks"] == 2 and 0 < plan["power"]["passes"] <= plan["power"]["weakest_passes"] <= 1
    assert f"would pass a harmless candidate {round(100 * plan['power']['passes'])} times of 100" in text
    assert plan["looks"]["words"] in text
    assert set(plan["looks"]["typical"]) <= set(VOCABULARIES["sea"].split())
    assert "The batch's 160 documents name no source, so each counts as one of its own" in text
    assert plan["drift"]["all together"]["words"].count("%") and "The documents of fruit name no source" in text
    assert {k: v for k, v in head().items() if k not in ("last_tick", "versions", "champion")} == before
    assert head()["champion"] == 0 and not any(plan["stage"]["key"][:16] in name for name in stages())


def test_a_mixture_of_known_kinds_is_no_new_kind() -> None:
    arrive("fruit", "fruit.jsonl")
    arrive("code", "code.jsonl", seed=78)
    result, text = tick_and_text(dry_run=True)
    drift = json.loads(Path(result["plan"]).read_text(encoding="utf-8"))["drift"]
    assert drift["fruit"]["drifted"] and drift["code"]["drifted"] and not drift["all together"]["drifted"]
    assert result["action"] != "grow" and "differs from each known kind, but not from a mixture of them" in text


def test_a_new_kind_of_text_grows_and_is_promoted(after_growth: Path) -> None:
    now = head()
    version = now["versions"][1]
    assert now["champion"] == 1 and version["kind"] == "promoted" and version["stages"][-1]["action"] == "grow"
    assert now["names"] == [stage["name"] for stage in version["stages"]]
    assert [stage["key"] for stage in version["stages"][:2]] == [s["key"] for s in now["versions"][0]["stages"]]
    result = ledger()[-1]
    assert result["outcome"] == "promoted" and result["champion"]["version"] == 1
    assert set(now["best"]) == {"fruit", "code", result["data"]}


def test_the_same_data_again_is_a_no_op(after_growth: Path) -> None:
    before = (stages(), head()["versions"])
    assert tick()["outcome"] == "idle"
    lines = Path("inbox/new.jsonl").read_text(encoding="utf-8").splitlines()
    Path("inbox/new.jsonl").unlink()
    Path("inbox/renamed.jsonl").write_text("\n".join(lines[80:][::-1]) + "\n", encoding="utf-8")
    Path("inbox/more.jsonl").write_text("\n".join(lines[:80]) + "\n", encoding="utf-8")
    assert [tick()["outcome"] for _ in range(2)] == ["idle", "idle"]
    assert (stages(), head()["versions"]) == before


def test_more_of_the_same_does_not_grow(after_growth: Path) -> None:
    arrive("fruit", "more.jsonl", seed=78)
    result, text = tick_and_text()
    assert result["action"] in ("skip", "continue") and "Growing is not considered" in text
    assert tick()["outcome"] == "idle"  # settled either way


def test_noise_is_skipped() -> None:
    arrive("noise")
    result, text = tick_and_text()
    assert result["outcome"] == "skipped" and "the text is noise" in result["reason"]
    assert "Growing gains" in text  # its loss can be lowered all the same
    assert head()["champion"] == 0 and tick()["outcome"] == "idle"


def test_probes_that_are_not_made_are_not_counted() -> None:
    """Text without drift is not grown for, so one probe is all: five ways to grow take nothing of the limit."""
    arrive("code", seed=79)
    ways = [{"experts": number} for number in (1, 2, 3, 4, 5)]
    write_retraining(probe={"grow": ways})
    plan = json.loads(Path(tick(dry_run=True)["plan"]).read_text(encoding="utf-8"))
    assert plan["decision"]["terms"]["drifted"] == 0.0 and plan["exceeded"] == []
    most = TOKENS + round(0.3 * TOKENS) + 128  # the stage and one probe of whole steps
    assert tick(f"limits.tokens={most}")["outcome"] != "over budget"


def test_text_of_too_few_sources_is_not_probed() -> None:
    path = arrive("sea")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(row | {"source": f"s{i % 9}"}) + "\n" for i, row in enumerate(rows)))
    before = stages()
    result = tick()
    assert (result["outcome"], stages()) == ("idle", before) and "of 9 source(s); 10 are needed" in result["reason"]


def test_text_without_an_answer_waits_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither skipped for good nor probed every night, and told of once."""
    arrive("sea")
    told: list[str] = []
    monkeypatch.setattr("pipelines.retrain.hooks.tell", lambda _, ended: told.append(ended.outcome))
    with monkeypatch.context() as patch:
        patch.setattr(retrain_plan, "decide", lambda **known: Decision(Action.wait, {}, ["Wait: no answer yet: x."]))
        result = tick()
    assert (result["outcome"], result["reason"]) == ("waiting", "no answer yet: x")
    assert "batches" not in head() and head()["last_tick"]["outcome"] == "waiting"
    probes, lines = stages(), ledger()
    with monkeypatch.context() as patch:
        patch.setattr(story, "make_plan", None)  # nothing is looked at again
        assert tick()["outcome"] == "waiting" and (stages(), ledger(), told) == (probes, lines, ["waiting"])
    arrive("sea", "more.jsonl", seed=78)
    result = tick()
    assert (result["outcome"], result["action"]) == ("promoted", "grow"), result
    batch = json.loads(Path(result["plan"]).read_text(encoding="utf-8"))
    assert batch["documents"] == 320 and tick()["outcome"] == "idle"


class LookedAgainError(Exception):
    """In place of probes."""


def look_again(*_: Any) -> None:
    raise LookedAgainError


def test_a_batch_that_waits_is_not_probed_for_every_line_that_joins_it(monkeypatch: pytest.MonkeyPatch) -> None:
    arrive("sea")
    write_retraining(trigger={"min_tokens": 500, "max_days": 30})
    with monkeypatch.context() as patch:
        patch.setattr(retrain_plan, "decide", lambda **known: Decision(Action.wait, {}, ["Wait: no answer yet: x."]))
        first = tick()
    plan, lines = Path(first["plan"]), ledger()
    monkeypatch.setattr(story, "make_plan", look_again)
    few = arrive("sea", "few.jsonl", seed=79, documents=3)
    result, text = tick_and_text()
    assert (result["outcome"], result["batch"], ledger()) == ("waiting", first["batch"], lines)
    assert f"tokens have joined batch {first['data']}, which waits; trigger.min_tokens=500" in text

    facts = json.loads(plan.read_text(encoding="utf-8"))
    for at in ("2020-01-01T00:00:00Z", "2036-01-01T00:00:00Z"):  # it is long ago, or nobody knows when it was
        plan.write_text(json.dumps(facts | {"made_at": at}))
        with pytest.raises(LookedAgainError):
            tick()
    few.unlink()
    assert tick()["outcome"] == "waiting"  # but of the same documents there is no other answer
    plan.write_text(json.dumps(facts))
    with pytest.raises(LookedAgainError):
        tick("probe.fraction=0.2")
    with pytest.raises(LookedAgainError):
        tick(dry_run=True)
    arrive("sea", "many.jsonl", seed=80, documents=40)
    with pytest.raises(LookedAgainError):
        tick()
    Path("inbox/many.jsonl").unlink()
    path = Path("inbox/new.jsonl")
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    with pytest.raises(LookedAgainError):  # a person took something away
        tick()


def test_a_known_kind_that_is_not_learned_yet_continues_its_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "young"
    root.mkdir()
    monkeypatch.chdir(root)
    make_base(root, stages=[{"data": "fruit"}, {"data": "code", "tokens": 4 * 128}])  # four steps are not enough
    arrive("code", seed=78)
    result, _ = tick_and_text("decision.forgetting_weight=0.1")
    assert (result["outcome"], result["action"]) == ("promoted", "continue"), result
    stage = StageStore(Path("mlruns")).get(result["candidate"])
    assert stage.spec.continues == "code" and head()["versions"][1]["stages"][-1]["action"] == "continue"
    assert stage.spec.replay.fraction == 0.25  # of when_continuing
    assert head()["best"]["code"]["key"] == result["candidate"]


def test_generations_that_predict_together_are_gated_by_what_they_predict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "mixture"
    root.mkdir()
    monkeypatch.chdir(root)
    make_base(root, routing={"mixture": {}})
    arrive("sea")
    result, text = tick_and_text()
    assert result["outcome"] == "promoted", result
    # A later generation may weigh more where it explains more.
    assert "0.0% of fruit goes to experts born after it" in text
    stage = StageStore(Path("mlruns")).get(result["candidate"])
    assert stage.architecture.mixture == MixtureConfig()
    assert head()["champion"] == 1 and tick()["outcome"] == "idle"


def test_growth_stops_at_the_limit_of_experts() -> None:
    arrive("sea")
    result, text = tick_and_text("limits.experts=7", dry_run=True)
    assert result["action"] != "grow" and "limits.experts=7" in text and "lifelong-moe drop" in text


def test_over_budget_nothing_is_trained_and_the_batch_stays_open() -> None:
    arrive("sea")
    before = stages()
    for limit, said in (("tokens=1000", "tokens=1000"), ("hours=1e-9", "hours=1e-09"), ("disk_bytes=10",) * 2):
        result = tick(f"limits.{limit}")
        assert result["outcome"] == "over budget" and f"limits.{said}" in result["reason"]
        assert stages() == before  # no probe either
        assert head()["champion"] == 0 and "batches" not in head()
        assert OUTCOMES[result["outcome"]] == 4
    assert tick()["outcome"] == "promoted"


def test_what_a_limit_allows_is_probed_before_a_tick_is_over_budget() -> None:
    """New text calls for new experts, for which there is no room: continuing was probed, and was not worth it."""
    arrive("sea")
    before = stages()
    result = tick("limits.experts=7", "decision.min_gain=9")
    assert result["outcome"] == "over budget" and "limits.experts=7" in result["reason"]
    assert len(stages()) == len(before) + 1  # its probe
    assert head()["champion"] == 0 and "batches" not in head()


def test_a_tick_that_cannot_fit_trains_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By hand: neither probe nor stage is there, and each has two megabytes of records alone."""
    arrive("sea")
    before = stages()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4_000_000))
        assert exit_code(tick) == ResourceError.exit_code == 8
    assert "ResourceError: run=tiny needs up to " in capsys.readouterr().err
    assert stages() == before and not list(Path("mlruns/work").glob("*"))
    planned = tick(dry_run=True)
    plan = json.loads(Path(planned["plan"]).read_text(encoding="utf-8"))
    weights_bytes = 4 * plan["stage"]["parameters_trainable"]
    # 60 steps: 15 checkpoints, of which three are there at once, each three numbers a parameter; 15 logged points.
    assert plan["stage"]["disk_bytes"] == 10 * weights_bytes + 2_000_000 + 15 * 5_000
    with monkeypatch.context() as patch:  # a plan that was made before is checked as well
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=plan["stage"]["disk_bytes"] - 1))
        assert exit_code(lambda: tick(plan=planned["plan"])) == 8
    assert "ResourceError: stage batch-" in capsys.readouterr().err
    assert tick(plan=planned["plan"])["outcome"] == "promoted"


def test_promotions_a_week_are_limited(after_growth: Path) -> None:
    rollback("tiny", None, SILENT)
    arrive("sea", "more.jsonl", seed=91)
    result = tick("limits.promotions_per_week=1")
    assert result["outcome"] == "over budget"
    assert result["reason"] == "limits.promotions_per_week=1 would be exceeded: 2"


def test_a_clock_that_was_ahead_blocks_no_promotion_and_does_not_lift_the_limit(after_growth: Path) -> None:
    kept = head()["versions"]
    change_head(versions=[kept[0], {**kept[1], "at": "2036-01-01T00:00:00Z"}])
    arrive("code", "more.jsonl", seed=91)
    result, text = tick_and_text("limits.promotions_per_week=1", dry_run=True)
    assert result["outcome"] == "planned"
    assert "Version 1 is dated 2036-01-01T00:00:00Z, which is in the future: a clock was ahead." in text
    # Of two promotions the other one, dated by a clock that is ahead by an hour, still counts.
    soon = timestamp(time.time() + 3600)
    change_head(versions=[kept[0], {**kept[1], "at": soon}, {**kept[1], "id": 2, "at": "2036"}])
    result = tick("limits.promotions_per_week=1")
    assert (result["outcome"], result["reason"]) == (
        "over budget", "limits.promotions_per_week=1 would be exceeded: 2"
    )  # fmt: skip


def test_a_clock_that_was_ahead_does_not_stop_the_wait() -> None:
    arrive("sea", "a.jsonl", documents=24)
    assert tick("trigger.min_tokens=100_000")["outcome"] == "idle"
    kept = head()["versions"]
    settings = ("trigger.min_tokens=100_000", "trigger.max_days=30")
    for at, outcome in (("2036-01-01T00:00:00Z", "planned"), (timestamp(time.time() + 3600), "idle")):
        change_head(versions=[{**kept[0], "at": at}])
        assert tick(*settings, dry_run=True)["outcome"] == outcome


def test_a_plan_from_the_future_is_stale() -> None:
    arrive("sea")
    plan = Path(tick(dry_run=True)["plan"])
    facts = json.loads(plan.read_text(encoding="utf-8"))
    ahead = {"made_at": "2036-01-01T00:00:00Z", "expires": "2036-01-08T00:00:00Z"}
    plan.write_text(json.dumps({**facts, **ahead}), encoding="utf-8")
    with pytest.raises(StalePlanError, match="made at 2036-01-01T00:00:00Z, which is in the future; plan again"):
        tick(plan=str(plan))


def test_over_budget_is_told_of_once(tmp_path: Path) -> None:
    arrive("sea")
    told = tmp_path / "told"
    write_retraining(hooks={"command": ["sh", "-c", f"cat >> {told}; echo >> {told}"]})
    assert [tick("limits.tokens=1000")["outcome"] for _ in range(3)] == ["over budget"] * 3
    assert len(told.read_text().splitlines()) == 1 and [line["event"] for line in ledger()].count("tick") == 1
    tick("limits.tokens=1001")  # another reason
    assert len(told.read_text().splitlines()) == 2


def test_ways_to_grow_are_tried_and_the_best_is_taken() -> None:
    arrive("sea")
    write_retraining(probe={"grow": [{"experts": 2}, {"experts": 4}]}, decision={"parameter_weight": 0.0})
    result, text = tick_and_text(dry_run=True)
    plan = json.loads(Path(result["plan"]).read_text(encoding="utf-8"))
    terms = plan["decision"]["terms"]
    utilities = {n: terms[f"way_{i}/utility"] for i, n in ((1, 2), (2, 4))}
    best = max(utilities, key=utilities.__getitem__)
    assert terms["grow/utility"] == utilities[best] and plan["stage"]["grow"] == {"experts": best}
    assert f"Growing by {best} experts: utility {utilities[best]:.4f}, the best of the ways to grow." in text
    write_retraining(probe={"grow": [{"experts": 2}, {"experts": 4}]}, decision={"parameter_weight": 9.0})
    result = tick(dry_run=True)
    plan = json.loads(Path(result["plan"]).read_text(encoding="utf-8"))
    assert plan["decision"]["terms"]["way_2/utility"] < plan["decision"]["terms"]["way_1/utility"]


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("{experts: 0}", r"probe\.grow\[0\]\..* above 0"),
        ("{expert: 2}", r"probe\.grow\[0\]\.grow\.expert"),
    ],
)
def test_ways_to_grow_are_checked_first(way: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tick(f"probe.grow=[{way}]")


# Failing


def test_a_tick_that_fails_is_noted_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrive("sea")
    told = tmp_path / "told"
    write_retraining(hooks={"command": ["sh", "-c", f"cat > {told}"]})
    served = head()["stages"]

    def diverge(*args: Any) -> None:
        raise DivergedError("stage x: loss is not finite")

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.versions.candidates.train_stage", diverge)
        with pytest.raises(DivergedError):
            tick()
        with pytest.raises(DivergedError):
            tick(dry_run=True)  # which notes nothing
    (line,) = [line for line in ledger() if line["event"] == "tick"]
    assert (line["outcome"], line["error"], line["exit_code"]) == ("failed", "DivergedError", 6)
    assert json.loads(told.read_text())["reason"] == "stage x: loss is not finite"
    assert head()["last_tick"]["outcome"] == "failed" and head()["stages"] == served
    assert tick()["outcome"] == "promoted"
    trained = [line for line in ledger() if line["event"] == "stage"]
    assert [line["key"] for line in trained][-1] == head()["versions"][-1]["stages"][-1]["key"]


def test_a_mistake_is_told_and_not_noted(tmp_path: Path) -> None:
    Path("inbox/bad.jsonl").write_text('{"text": \n', encoding="utf-8")
    told = tmp_path / "told"
    write_retraining(hooks={"command": ["sh", "-c", f"cat > {told}"]})
    before = (ledger(), head())
    with pytest.raises(DataError):
        tick()
    assert json.loads(told.read_text())["error"] == "DataError" and (ledger(), head()) == before


# Reopening


def refuse(patch: pytest.MonkeyPatch) -> None:
    """A gate that lets nothing pass; what it would refuse by its own limits is foreseen, and not trained."""
    check = Check(name="new/gain", value=0.1, limit=9.0, passed=False, sentence="Not enough.")
    patch.setattr(story, "gate", lambda *_: Verdict([check]))


def test_a_rejected_batch_can_be_looked_at_again(after_growth: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rollback("tiny", None, SILENT)
    arrive("sea", "more.jsonl", seed=91)
    with monkeypatch.context() as patch:
        refuse(patch)
        first = tick()
    assert first["outcome"] == "rejected" and tick()["outcome"] == "idle"
    with pytest.raises(ConfigError, match=rf"--reopen nothing: names 0 batches; .* {first['data']} \(rejected\)"):
        tick(reopen="nothing")
    result = tick(reopen=first["batch"][:8])
    assert (result["outcome"], result["batch"]) == ("promoted", first["batch"])
    assert "reopen" in [line["event"] for line in ledger()]


# The gate


def test_a_rejected_candidate_changes_nothing_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    arrive("sea")
    refuse(monkeypatch)
    served = {key: weights(key) for key in head()["stages"]}
    result, text = tick_and_text()
    assert result["outcome"] == "rejected" and OUTCOMES["rejected"] == 3
    assert "Not enough" in result["reason"] and "✗ Not enough." in text
    assert head()["champion"] == 0 and {key: weights(key) for key in head()["stages"]} == served
    assert StageStore(Path("mlruns")).get(result["candidate"]).name == result["data"]  # can be inspected
    assert head()["batches"][result["batch"]]["outcome"] == "rejected"
    assert tick()["outcome"] == "idle"


def test_what_the_gate_cannot_tell_waits_and_is_not_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    arrive("sea")
    check = Check(name="new/gain", value=-0.5, limit=0.01, passed=False, sentence="Perhaps.", is_open=True)
    with monkeypatch.context() as patch:
        patch.setattr(story, "gate", lambda *_: Verdict([check]))
        result = tick()
    assert (result["outcome"], result["reason"]) == ("waiting", "Perhaps") and "batches" not in head()
    with monkeypatch.context() as patch:
        patch.setattr(story, "make_plan", None)  # neither probed nor trained again
        assert tick()["outcome"] == "waiting"
    arrive("sea", "more.jsonl", seed=78)
    assert tick()["outcome"] == "promoted"


def test_what_the_gate_would_refuse_is_not_trained() -> None:
    arrive("sea")
    before = stages()
    result, text = tick_and_text("gate.min_gain=9")
    assert result["outcome"] == "skipped" and "gate.min_gain=9" in result["reason"] and "Ruled out" in text
    assert all("batch" in name for name in stages() - before) and "candidate" not in result  # probes alone


def test_what_makes_old_text_worse_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "open"
    root.mkdir()
    monkeypatch.chdir(root)
    make_base(
        root,
        routing={"bundles": "none"},
        stage_defaults={"trunk": {"train": "full"}},
    )
    arrive("sea")
    result, text = tick_and_text("decision.forgetting_weight=0", "gate.max_leak=1")
    assert result["outcome"] == "skipped" and "after its probe" not in result["reason"], text
    assert "old text loses at least" in result["reason"]  # foreseen
    write_retraining(gate={"max_leak": 1, "tolerance": 0.01}, decision={"forgetting_weight": 0})
    blind = GateConfig(tolerance=9, max_leak=1)
    monkeypatch.setattr(retrain_plan, "decide", lambda **known: decide(**{**known, "gate": blind}))
    result, text = tick_and_text(reopen=result["batch"])
    assert (result["outcome"], result["action"]) == ("rejected", "grow"), text
    assert "more than 0.01" in result["reason"]


# What was held out


def test_a_learned_batch_keeps_its_split_whatever_the_inbox_says_later(after_growth: Path) -> None:
    """A stage is known by the hash of its training text: with another split it would be refused."""
    learned = head()["versions"][1]["stages"][-1]
    assert (learned["heldout_fraction"], learned["heldout_sources"]) == (0.15, 5)
    assert tick("inbox.heldout_fraction=0.4")["outcome"] == "idle"
    arrive("noise", "b.jsonl")
    assert tick("inbox.heldout_fraction=0.4", dry_run=True)["outcome"] == "planned"
    rollback("tiny", None, SILENT)
    tick("inbox.heldout_fraction=0.4", reopen=learned["batch"], dry_run=True)
    assert "batches" not in head()
    rollback("tiny", 1, SILENT)
    assert tick("inbox.heldout_fraction=0.4", dry_run=True)["outcome"] == "planned"


def test_one_huge_document_does_not_fill_what_is_scored() -> None:
    """It is held out by its source's name, and more than evaluate.tokens=2000."""
    path, words = arrive("sea"), VOCABULARIES["sea"].split()
    names = (f"page {i}" for i in itertools.count())
    source = next(n for n in names if int(hashlib.sha256(f"split\n{n}".encode()).hexdigest(), 16) < 2**250)
    huge = {"text": " ".join(random.Random(0).choices(words, k=3000)), "source": source}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(huge) + "\n")
    result = tick(dry_run=True)
    assert (result["outcome"], result["action"]) == ("planned", "grow")
    scored = [one["tokens"] for one in stored_evaluations() if isinstance(one["tokens"], list)]
    assert scored and all(max(tokens) <= 0.1 * sum(tokens) for tokens in scored)
    assert 2_000 <= max(sum(tokens) for tokens in scored) < 2_100


def test_a_batch_that_an_earlier_version_learned_is_split_by_that_versions_rule(after_growth: Path) -> None:
    """That noted the share with the decision about the batch alone, and held out the lowest hashes, if only one."""
    now = head()
    learned, (batch,) = now["versions"][1]["stages"][-1], now["batches"]
    for noted in (learned, now["batches"][batch]):
        noted.pop("heldout_sources")
    learned.pop("heldout_fraction")
    now["batches"][batch]["heldout_fraction"] = 1e-6
    kept, added = served_stages(RunHead.from_json(now).champion, StageStore(Path("mlruns")))
    source = load_retraining("retrain.yaml").config(kept, added).distributions[learned["data"]]
    assert (source.heldout_fraction, source.heldout_sources) == (1e-6, 1)
    assert len(read_corpus("sea", source, Path("data/cache")).heldout) == 1


# Plans


def test_a_plan_is_carried_out_as_it_stands(after_growth: Path, lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_all_stages(monkeypatch)
    undisturbed = head()["stages"][-1], weights(head()["stages"][-1])
    monkeypatch.chdir(lab)
    arrive("sea")
    plan = tick(dry_run=True)["plan"]
    result = tick(plan=plan)
    assert result["outcome"] == "promoted"
    assert (result["candidate"], weights(result["candidate"])) == undisturbed


def test_a_stale_plan_is_refused() -> None:
    before = sorted(p.name for p in Path("mlruns").iterdir())
    for path in ("nowhere.json", "tiny.yaml"):
        with pytest.raises(ConfigError, match="not a plan"):
            tick(plan=path)  # whether or not something has arrived
    arrive("sea")
    with pytest.raises(ConfigError, match="not a plan"):
        tick(plan="nowhere.json")
    assert sorted(p.name for p in Path("mlruns").iterdir()) == before
    plan = tick(dry_run=True)["plan"]
    with pytest.raises(StalePlanError, match="made for settings"):
        tick("stage.tokens=7680", plan=plan)
    facts = json.loads(Path(plan).read_text())
    Path("old.json").write_text(json.dumps(facts | {"expires": "2020-01-01T00:00:00Z"}))
    with pytest.raises(StalePlanError, match="expired at 2020"):
        tick(plan="old.json")
    arrive("sea", "more.jsonl", seed=5, documents=30)
    with pytest.raises(StalePlanError, match="made for batch"):
        tick(plan=plan)
    Path("inbox/more.jsonl").unlink()
    assert tick()["outcome"] == "promoted"
    arrive("noise", "noise.jsonl")
    with pytest.raises(StalePlanError, match="made for champion"):
        tick(plan=plan)
    assert StalePlanError.exit_code == 5
    with pytest.raises(ConfigError, match="not a plan"):
        tick(plan="tiny.yaml")


def test_a_plan_whose_batch_is_gone_is_stale() -> None:
    path = arrive("sea")
    plan, lines = tick(dry_run=True)["plan"], path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:5]), encoding="utf-8")
    with pytest.raises(StalePlanError, match=r"made for batch \w{16}, but 5 new documents are waiting; .*plan again"):
        tick(plan=plan)
    path.unlink()
    with pytest.raises(StalePlanError, match=r"made for batch \w{16}, but nothing new has arrived: files .* are gone"):
        tick(plan=plan)
    assert (tick()["outcome"], StalePlanError.exit_code) == ("idle", 5)


# Sources


def with_sources(path: Path, sites: int) -> None:
    """The same documents, from so many sites in turn."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [{"text": row["text"], "source": f"site-{i % sites}"} for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_corrected_sources_count_until_a_batch_is_learned_and_after_reopening() -> None:
    path, unaffordable = arrive("sea"), "limits.tokens=1"

    def sources(result: dict[str, Any]) -> tuple[str, set[str]]:
        plan = json.loads(Path(result["plan"]).read_text(encoding="utf-8"))
        documents = BatchStore(Path("mlruns")).documents(plan["batch"], plan["sources"])
        return plan["batch"], {document.source for document in documents}

    batch, alone = sources(tick(unaffordable))
    assert len(alone) == 160  # each document is its own source
    plan = tick(dry_run=True)["plan"]
    with_sources(path, 28)
    with pytest.raises(StalePlanError, match="named other sources; plan again"):
        tick(plan=plan)
    assert sources(tick(unaffordable)) == (batch, {f"site-{i}" for i in range(28)})
    skipped = {"name": "sea", "outcome": "skipped", "reason": "", "at": "", "heldout_fraction": 0.15}
    change_head(batches={batch: skipped})
    with_sources(path, 29)
    assert tick()["outcome"] == "idle"  # settled, whatever the sources
    assert sources(tick(unaffordable, reopen=batch)) == (batch, {f"site-{i}" for i in range(29)})
    result = tick()
    assert result["outcome"] == "promoted"
    learned = head()["versions"][-1]["stages"][-1]
    assert learned["sources"] == head()["batches"][batch]["sources"] is not None
    with_sources(path, 30)
    assert tick()["outcome"] == "idle"
    arrive("noise", "noise.jsonl", documents=30)
    assert tick(unaffordable)["outcome"] == "over budget"  # what was learned still is split as it was


# Kills


def kill_at_step(
    monkeypatch: pytest.MonkeyPatch, number: int, end: Callable[[], object] = kill_self, *, saved: bool = True
) -> None:
    """Die at a step of the whole tick, probes included; before its checkpoint, or after."""
    original, seen = StepCheckpoint.on_train_batch_end, [0]

    def on_train_batch_end(self: StepCheckpoint, *args: Any) -> None:
        seen[0] += 1
        if seen[0] == number and not saved:
            end()
        original(self, *args)
        if seen[0] == number and saved:
            end()

    monkeypatch.setattr(StepCheckpoint, "on_train_batch_end", on_train_batch_end)


KILLS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "in the first probe": lambda patch: kill_at_step(patch, 9),
    "in the second probe": lambda patch: kill_at_step(patch, 30),
    "in the stage": lambda patch: kill_at_step(patch, 70),
    "while its batch is kept": lambda patch: patch.setattr(batches, "_write", lambda *_: kill_self()),
    "while text is tokenized": lambda patch: patch.setattr(shards, "canonical_json", lambda *_: kill_self()),
    "before the plan is kept": lambda patch: patch.setattr(retrain_plan.TickPlan, "write", lambda *_: kill_self()),
    "after the commit": lambda patch: patch.setattr(story, "gate", lambda *_: kill_self()),
    "before the ledger": lambda patch: patch.setattr(RunRecord, "log", lambda *_, **__: kill_self()),
    "after the ledger": lambda patch: patch.setattr("pipelines.retrain.tick.print_outcome", lambda *_: kill_self()),
}


@pytest.mark.parametrize("when", KILLS)
def test_a_killed_tick_is_done_again(when: str, after_growth: Path, lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = head()["stages"], weights(head()["stages"][-1])
    monkeypatch.chdir(lab)
    arrive("sea")
    with monkeypatch.context() as patch:
        KILLS[when](patch)
        child = fork(tick)
        assert child.wait() == -9, child.output
    result = tick()
    assert result["outcome"] == "promoted" or (when == "after the ledger" and result["outcome"] == "idle")
    assert (head()["stages"], weights(head()["stages"][-1])) == undisturbed
    assert ledger()[-1]["outcome"] == result["outcome"]
    assert not [*Path("mlruns").rglob(".tmp-*"), *Path("data/cache").rglob(".tmp-*")]


def test_ctrl_c_saves_what_a_tick_has_trained(after_growth: Path, lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = head()["stages"], weights(head()["stages"][-1])
    monkeypatch.chdir(lab)
    arrive("sea")
    ledger_before = ledger()
    with monkeypatch.context() as patch:
        kill_at_step(patch, 70, lambda: os.kill(os.getpid(), signal.SIGINT), saved=False)
        child = fork(tick)
        assert child.wait() == 130, child.output
    assert re.search(r"interrupted: stopped after step \d+, which is checkpointed; run the same", child.output)
    assert ledger() == ledger_before and list(Path("mlruns/work").glob("*/step-*"))
    assert tick()["outcome"] == "promoted"
    assert (head()["stages"], weights(head()["stages"][-1])) == undisturbed


def test_two_ticks_at_once() -> None:
    with locked(RunRecord(Path("mlruns"), "tiny").lock_path, "run tiny"):
        child = fork(tick)
        assert child.wait() == LockedError.exit_code


# What goes on around


def test_run_is_refused_once_the_head_has_moved(after_growth: Path) -> None:
    with pytest.raises(ConfigError, match=r"run=tiny was moved on at .*version 1 \(promoted.*lifelong-moe retrain"):
        train()
    report, _ = train(replace=True)
    assert len(report["stages"]) == 2 and "versions" not in head()


def test_after_a_rollback_the_next_tick_goes_on_from_the_older_champion(after_growth: Path) -> None:
    rollback("tiny", None, SILENT)
    arrive("sea", "more.jsonl", seed=91)
    result = tick()
    assert result["outcome"] == "promoted" and result["champion"]["version"] == 2
    assert [s["data"] for s in head()["versions"][2]["stages"]] == ["fruit", "code", result["data"]]


def test_a_tick_after_a_drop(after_growth: Path) -> None:
    drop("tiny", "code", SILENT, ungated=True)
    arrive("code", "more.jsonl", seed=92)
    result = tick()
    assert result["outcome"] == "promoted", result
    assert [s["action"] for s in head()["versions"][-1]["stages"]] == ["base", "base", "grow", "drop", "grow"]


def test_changed_text_of_the_base_is_refused() -> None:
    arrive("sea")
    with Path("code.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "one more document about return and yield"}\n')
    with pytest.raises(
        ConfigError, match=r"distributions\.code: its training text is [0-9a-f]{16}, but stage code was"
    ):
        tick()


def test_a_hook_is_told_and_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    arrive("noise")
    told = tick("hooks.command=[sh,-c,cat > told.json]")
    assert json.loads(Path("told.json").read_text()) == told
    arrive("noise", "b.jsonl", seed=5)
    result = tick("hooks.command=[sh,-c,exit 3]", "hooks.url=http://user:secret@127.0.0.1:1/x")
    assert result["outcome"] == "skipped"
    assert "hooks.command failed: exit status 3" in caplog.text and "hooks.url failed" in caplog.text
    assert "secret" not in caplog.text
    Path("told.json").unlink()
    assert tick("hooks.command=[sh,-c,cat > told.json]")["outcome"] == "idle" and not Path("told.json").exists()


def test_a_hugging_face_inbox(monkeypatch: pytest.MonkeyPatch) -> None:
    import lifelong_moe.data.text.hub as hub

    arrive("sea")
    rows = [json.loads(line)["text"] for line in Path("inbox/new.jsonl").read_text().splitlines()]
    monkeypatch.setattr(hub, "hub_documents", lambda *_: [Document(text, text[:9]) for text in rows])
    revision = "a" * 40
    result = tick("inbox.path=null", "inbox.hf=team/sea", f"inbox.revision={revision}", dry_run=True)
    assert (result["outcome"], result["action"]) == ("planned", "grow")


def test_the_run_must_exist() -> None:
    shutil.rmtree("mlruns")
    with pytest.raises(ConfigError, match="run tiny does not exist"):
        tick()
    assert not Path("mlruns").exists()


def test_the_file_is_checked_first() -> None:
    write_retraining(gate={"min_gian": 1})
    with pytest.raises(ConfigError, match=r"gate.*min_gian"):
        tick()


# What an operator may change, and what crashes leave


@pytest.mark.parametrize(
    ("override", "message"),
    [("tokenizer.vocab_size=298", "^tokenizer: it is"), ("model.width=48", "^model: its sizes are not the champion's")],
)
def test_another_tokenizer_or_model_is_refused(override: str, message: str) -> None:
    arrive("sea")
    with pytest.raises(ConfigError, match=message):
        tick(override)
    assert "batches" not in head()


@pytest.mark.parametrize(
    "override", ["trigger.max_days=nan", "trigger.max_days=1e12", "limits.hours=.inf", "decision.cost_weight=.inf"]
)
def test_numbers_without_end_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")):
        tick(override)


def test_hooks_of_any_kind_fail_nothing(caplog: pytest.LogCaptureFixture) -> None:
    from lifelong_moe.config.retraining.operation import HooksConfig
    from pipelines.retrain.hooks import tell
    from pipelines.retrain.outcome import TickOutcome

    for url in ("http://127.0.0.1:1/a b", "http://[::1", "http://127.0.0.1:1/"):
        tell(HooksConfig(url=url, command=["a\0b"], seconds=1.0), TickOutcome("idle", ""))
    tell(HooksConfig(command=["true"], seconds=1e300), TickOutcome("idle", ""))
    assert caplog.text.count("hooks.url failed") == 3 and caplog.text.count("hooks.command failed") >= 3


def test_a_torn_line_of_the_ledger_is_passed_over() -> None:
    path = Path("mlruns/runs/tiny/ledger.jsonl")
    with path.open("a", encoding="utf-8") as file:
        file.write('{"event":"stage","ke')
    record = RunRecord(Path("mlruns"), "tiny")
    before = record.logged("stage", "key")
    record.log("stage", name="x", key="k\u2028")
    assert record.logged("stage", "key") == [*before, "k\u2028"] and len(before) == 2


def test_text_of_a_version_that_was_rolled_back_can_be_looked_at_again(after_growth: Path) -> None:
    batch = next(iter(head()["batches"]))
    with pytest.raises(ConfigError, match="names 0 batches"):
        tick(reopen=batch)
    rollback("tiny", None, SILENT)
    assert tick()["outcome"] == "idle"
    assert tick(reopen=batch)["batch"] == batch


@pytest.mark.parametrize(("key", "value"), [("batch", 1), ("expires", 5), ("decision", []), ("exceeded", None)])
def test_a_plan_that_was_edited_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    facts: dict[str, Any] = {
        "batch": "b" * 64, "settings": "5" * 64, "expires": "e", "stage": None, "decision": {"action": "skip"},
        "exceeded": [], "champion": {"version": 0, "key": "1" * 64},
    }  # fmt: skip
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(facts))
    read_plan(path)
    path.write_text(json.dumps(facts | {key: value}))
    with pytest.raises(ConfigError, match="not a plan of lifelong-moe retrain"):
        read_plan(path)


def test_a_batch_of_one_source_waits() -> None:
    path = arrive("sea")
    rows = [json.loads(line) | {"source": "one"} for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = tick()
    assert result["outcome"] == "idle" and "are of 1 source(s); 10 are needed" in result["reason"]
    assert not Path("mlruns/batches").exists()
