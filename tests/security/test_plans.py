"""A plan of `retrain --plan` that somebody edited allows nothing that the configuration does not."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lifelong_moe.errors import StalePlanError
from lifelong_moe.plan.retraining import load_retraining
from lifelong_moe.store.runs import timestamp
from pipelines.retrain.plan_file import settings_hash
from tests.known_stages import use_known_stages
from tests.retrain_lab import arrive, ledger, make_base, stages, tick

pytestmark = pytest.mark.xdist_group("plans")  # one process trains and plans what all of them edit

DAY = 86400.0
Facts = dict[str, Any]


@pytest.fixture(scope="module")
def planned_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with an inbox, whose documents a dry run plans to grow for; and the plan's path."""
    root = tmp_path_factory.mktemp("planned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        use_known_stages(patch, tmp_path_factory)
        make_base(root)
        arrive("sea")
        plan = str(tick(dry_run=True)["plan"])
    return root, plan


@pytest.fixture
def plan(planned_once: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plan's file in a copy of that directory, which is the current one."""
    root, name = planned_once
    shutil.copytree(root, tmp_path / "lab")
    monkeypatch.chdir(tmp_path / "lab")
    return Path(name)


def edit(path: Path, change: Callable[[Facts], object]) -> Facts:
    """Change a plan's file by hand."""
    facts: Facts = json.loads(path.read_text(encoding="utf-8"))
    change(facts)
    path.write_text(json.dumps(facts), encoding="utf-8")
    return facts


EDITS: dict[str, tuple[Callable[[Facts], object], str]] = {
    "no limits": (lambda f: f["limits"].update(tokens=10**12), "limits is "),
    "a kinder gate": (lambda f: f["gate"].update(tolerance=9.0), "gate is "),
    "fewer tokens than it has": (lambda f: f["stage"].update(tokens=1), "stage.tokens is 1 there and "),
    "less disk than it takes": (lambda f: f["stage"].update(disk_bytes=1), "stage.disk_bytes is 1 there"),
    "no time at all": (lambda f: f["stage"].update(hours=0.0), "stage.hours is 0.0 there"),
    "another stage": (lambda f: f["stage"].update(key="ab" * 32), "its stage would be another one now"),
    "a way to grow of its own": (lambda f: f["stage"].update(grow={"experts": 64}), "is no way of probe.grow"),
    "a stage that nobody has": (
        lambda f: (f["stage"].update(continues="x"), f["decision"].update(action="continue")),
        "stage.continues=x is no stage of the champion",
    ),
    "an action without its stage": (lambda f: f.update(stage=None), "decision.action=grow does not fit"),
    "a stage without its action": (lambda f: f["decision"].update(action="skip"), "decision.action=skip does not fit"),
    "limits that are not exceeded": (lambda f: f.update(exceeded=["so it is"]), "exceeded is "),
    "another run": (lambda f: f.update(run="other"), "run is other there and tiny by the configuration"),
    "nothing to keep from garbage collection": (lambda f: f.update(reads=[]), "reads is "),
    "no near copies": (lambda f: f.update(near_copies=None), "near_copies is None there"),
    "another name": (lambda f: f.update(data="other"), "data is other there"),
}


@pytest.mark.parametrize("what", EDITS)
def test_what_a_plan_says_is_computed_again(what: str, plan: Path) -> None:
    change, said = EDITS[what]
    edit(plan, change)
    before = stages()
    with pytest.raises(StalePlanError, match=f"{re.escape(said)}.*[Pp]lan again"):
        tick(plan=str(plan))
    assert stages() == before and StalePlanError.exit_code == 5


@pytest.mark.parametrize(
    "limit", ["limits.tokens=1000", "limits.disk_bytes=1000", "limits.hours=1e-9", "limits.experts=5"]
)
def test_limits_are_those_of_the_configuration_even_if_the_plan_names_its_settings(limit: str, plan: Path) -> None:
    """The hash of the settings, and all that the plan says of them, fit; the stage does not fit the limit."""
    retraining = load_retraining("retrain.yaml", [limit])
    key, value = limit.removeprefix("limits.").split("=")
    edit(plan, lambda f: f.update(settings=settings_hash(retraining)) or f["limits"].update({key: float(value)}))
    with pytest.raises(StalePlanError, match=rf"limits\.{key}="):
        tick(limit, plan=str(plan))


def test_a_plan_expires_whatever_dates_it_names(plan: Path) -> None:
    """By its own word it is of today; the ledger says when its batch was planned."""
    late = timestamp(time.time() + 300 * DAY)
    edit(plan, lambda f: f.update(made_at=timestamp(time.time() - 8 * DAY), expires=late))
    with pytest.raises(StalePlanError, match="over 7 days ago; plan again"):
        tick(plan=str(plan))
    edit(plan, lambda f: f.update(made_at=timestamp(), expires=late))
    book = Path("mlruns/runs/tiny/ledger.jsonl")
    old = [line | {"time": timestamp(time.time() - 8 * DAY)} for line in ledger()]
    book.write_text("".join(json.dumps(line) + "\n" for line in old), encoding="utf-8")
    with pytest.raises(StalePlanError, match="over 7 days ago; plan again"):
        tick(plan=str(plan))
    book.unlink()
    with pytest.raises(StalePlanError, match="no tick of run=tiny has planned this batch; plan again"):
        tick(plan=str(plan))


def test_a_plan_as_it_was_written_is_carried_out(plan: Path) -> None:
    assert tick(plan=str(plan))["outcome"] == "promoted"
