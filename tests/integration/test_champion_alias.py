"""MLflow's alias `champion` shows who serves, whatever changed that, at once or as soon as MLflow is there."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lifelong_moe.config.tracking import TrackingConfig
from lifelong_moe.errors import ConfigError, DivergedError
from lifelong_moe.retraining.checks import Check, Verdict
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import RunRecord, require_head
from lifelong_moe.store.stages import StageStore
from lifelong_moe.tracking.registry import remove_alias
from lifelong_moe.tracking.tracker import Tracker
from pipelines.cli import app, exit_code
from pipelines.retrain.promote import promote
from pipelines.shared.recorded import tracker_of, tracking_of
from pipelines.versions.consolidate import consolidate
from pipelines.versions.drop import drop
from pipelines.versions.rollback import rollback
from tests.known_stages import use_known_stages
from tests.retrain_lab import arrive, base_config, head, ledger, make_base, tick, write_retraining
from tests.tiny import STEPS, train, write_config

pytestmark = [
    pytest.mark.xdist_group("champion alias"),  # one process trains what all of them begin with
    pytest.mark.usefixtures("known_stages"),
]

SILENT = Console(quiet=True)
DATABASE = Path("mlruns/mlflow.db")
SHOWN = "MLflow's alias champion is updated."


def client() -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{DATABASE.absolute()}")


def shown() -> Any:
    """The version that the alias shows."""
    return client().get_model_version_by_alias("lifelong-moe.tiny", "champion")


def runs() -> dict[str, Any]:
    experiment = client().get_experiment_by_name("lifelong-moe")
    return {run.info.run_name: run for run in client().search_runs([experiment.experiment_id])}


def said(action: Callable[[Console], Any]) -> str:
    printed = io.StringIO()
    action(Console(file=printed, width=1000))
    return printed.getvalue()


def sync() -> int:
    return exit_code(lambda: app(["sync", "--json"]))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Path:
    """A finished run that MLflow knows, and a new kind of text in its inbox."""
    root = tmp_path_factory.mktemp("recorded")
    (root / "mlruns").mkdir()
    shutil.copy(template, root / DATABASE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        use_known_stages(patch, tmp_path_factory)
        make_base(root, tracking={"enabled": True})
        arrive("sea")
    return root


@pytest.fixture(scope="session")
def grown(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after that text was promoted."""
    root = tmp_path_factory.mktemp("grown") / "lab"
    shutil.copytree(base, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        use_known_stages(patch, tmp_path_factory)
        assert tick()["outcome"] == "promoted"
    return root


def copied(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(root, tmp_path / "lab")
    monkeypatch.chdir(tmp_path / "lab")


@pytest.fixture
def finished(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the finished run to work in."""
    copied(base, tmp_path, monkeypatch)


@pytest.fixture
def lab(grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the run with two versions to work in."""
    copied(grown, tmp_path, monkeypatch)


def serving() -> str:
    """Key of the stage that serves."""
    return require_head(Path("mlruns"), "tiny").champion.key


def test_promotion_rollback_drop_and_consolidation(lab: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown().tags["stage_key"] == serving() == head()["versions"][1]["stages"][-1]["key"]
    assert shown().description.startswith("promoted: ")  # no longer "at the gate"
    assert SHOWN in said(lambda console: rollback("tiny", None, console))
    assert shown().tags["stage_key"] == serving() == head()["versions"][0]["stages"][-1]["key"]
    assert SHOWN in said(lambda console: rollback("tiny", 1, console))
    assert shown().tags["stage_key"] == serving()
    (of_tick,) = (run for run in runs().values() if run.data.tags["lifelong.kind"] == "tick")
    trained, metrics = StageStore(Path("mlruns")).get(serving()).metrics, of_tick.data.metrics
    for key, name in (("tokens", "tokens"), ("active_flops", "flops"), ("seconds", "seconds")):
        assert metrics[f"usage/{name}"] == trained[key]
    known = len(client().search_model_versions("name = 'lifelong-moe.tiny'"))
    assert known == 3  # fruit, code and the batch
    assert SHOWN in said(lambda console: drop("tiny", "code", console, ungated=True))
    assert shown().tags["stage_key"] == serving()
    assert shown().tags["stage"] == "code.dropped" and int(shown().version) == 4  # derived just now, hence unknown
    assert Path(shown().source).name.startswith("code.dropped-")
    assert shown().run_id == head()["mlflow"]["run"]
    derived = StageStore(Path("mlruns")).get(serving())
    rollback("tiny", 0, SILENT)
    # Experts of bundles do not merge; what was made before stands for the outcome.
    monkeypatch.setattr("pipelines.versions.consolidate._merged", lambda *args: (derived, []))
    assert SHOWN in said(lambda console: consolidate("tiny", "code", 1, console, ["gate.tolerance=9"]))
    assert shown().tags["stage_key"] == serving() == derived.key


def test_a_finished_run_serves_its_last_stage(finished: None) -> None:
    assert shown().tags["stage_key"] == head()["plan"][-1] and shown().tags["stage"] == "code"
    write_config(base_config(tracking={"enabled": True}, stage_defaults={"tokens": 128 * STEPS}))
    train("tiny.yaml", "stages=[{data: fruit}]", replace=True)  # which forgets all versions
    assert shown().tags["stage_key"] == head()["plan"][-1] and shown().tags["stage"] == "fruit"


def lose() -> bytes:
    """Take MLflow away; returns what brings it back."""
    content = DATABASE.read_bytes()
    DATABASE.write_text("not a database " * 100)
    return content


@pytest.mark.parametrize("contact", ["sync", "idle tick", "another run"])
def test_what_was_kept_follows_with_the_next_contact(lab: None, contact: str) -> None:
    content = lose()
    assert "records are kept under mlruns/spool" in said(lambda console: rollback("tiny", None, console))
    assert sync() == 75
    DATABASE.write_bytes(content)
    assert shown().tags["stage_key"] != serving()
    if contact == "sync":
        assert sync() == 0
    elif contact == "idle tick":
        write_retraining(trigger={"min_tokens": 10**9})
        assert tick()["outcome"] == "idle"
    else:
        assert Tracker.connect(TrackingConfig(), Path("mlruns")).problem is None
    assert shown().tags["stage_key"] == serving()


def untold() -> None:
    """As a kill leaves it between head and MLflow, or an earlier version that never told."""
    RunRecord(Path("mlruns"), "tiny").set_head(require_head(Path("mlruns"), "tiny").rolled_back())
    assert shown().tags["stage_key"] != serving()


def test_what_nobody_told_is_found(lab: None) -> None:
    untold()
    assert sync() == 0
    assert shown().tags["stage_key"] == serving()
    client().set_registered_model_alias("lifelong-moe.tiny", "champion", "1")  # a person did
    write_retraining(trigger={"min_tokens": 10**9})
    assert tick()["outcome"] == "idle"
    assert shown().tags["stage_key"] == serving()
    before = DATABASE.read_bytes()
    assert sync() == 0
    assert tick()["outcome"] == "idle"
    assert DATABASE.read_bytes() == before  # what is right is left alone


def test_a_store_without_the_run_is_said(lab: None, template: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DATABASE.unlink()  # and with it all that was recorded
    shutil.copy(template, DATABASE)
    said_by_rollback = said(lambda console: rollback("tiny", None, console))
    assert "alias champion of lifelong-moe.tiny is unchanged: MLflow has no record of the run" in said_by_rollback
    assert sync() == 0 and "MLflow has no record of the run" in capsys.readouterr().err
    assert not list(Path("mlruns/spool").glob("*/refused.jsonl"))
    assert head()["champion"] == 0


def test_an_absent_store_that_nothing_is_kept_for_is_no_failure(lab: None, capsys: pytest.CaptureFixture[str]) -> None:
    lose()
    assert sync() == 0
    assert "alias champion of run tiny: MLflow at sqlite:" in capsys.readouterr().err
    assert not list(Path("mlruns/spool").glob("*/pending.jsonl"))  # no idle contact fills the spool


def test_a_stored_address_is_never_where_records_go(lab: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def stored(**tracking: Any) -> RunHead:
        return RunHead(run="r", method="lifelong", seed=0, config={"tracking": tracking}, plan=(), names=())

    monkeypatch.setenv("OWN", "http://you:secret@127.0.0.1:1/x")
    for uri in ("http://***@127.0.0.1:1/x", "${oc.env:OWN}", "sqlite:////elsewhere/mlflow.db", "databricks"):
        tracker = tracker_of(stored(uri=uri))
        assert not tracker.active and "set MLFLOW_TRACKING_URI" in str(tracker.problem), uri
    assert tracker_of(stored(uri=f"sqlite:///{DATABASE.absolute()}")).connected
    assert tracking_of(stored(experiment="${oc.env:OWN}", enabled="${oc.env:OWN}")) == TrackingConfig()
    assert tracking_of(stored(uri="http://127.0.0.1:1/x", experiment="mine")) == TrackingConfig(experiment="mine")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{DATABASE.absolute()}")  # what the user says counts
    assert tracker_of(stored(uri="http://127.0.0.1:1/x")).connected


def test_a_tick_shows_how_it_ended_and_with_what(
    finished: None, base: Path, grown: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*args: Any) -> None:
        raise DivergedError("stage x: no finite gradient")

    with monkeypatch.context() as patch, pytest.raises(DivergedError):
        patch.setattr("pipelines.versions.candidates.train_stage", diverge)
        tick()
    (failed,) = [run for run in runs().values() if run.data.tags.get("lifelong.kind") == "tick"]
    assert failed.info.status == "FAILED"
    assert failed.data.params["gate.resamples"] == "500" and failed.data.params["drift.auc"] == "0.6"
    assert not [key for key in failed.data.params if key.startswith("hooks")]

    monkeypatch.chdir(grown)
    (promoted,) = [run for run in runs().values() if run.data.tags.get("lifelong.kind") == "tick"]
    params = promoted.data.params
    assert promoted.info.status == "FINISHED"
    assert {"drift/all together/auc", "looks/letters_fraction"} <= set(promoted.data.metrics)
    assert "It looks like " in promoted.data.tags["mlflow.note.content"]
    assert (params["grow.experts"], params["trunk.train"], params["trunk.rank"]) == ("2", "deltas", "4")
    assert (params["optim.lr"], params["optim.beta2"]) == ("0.003", "0.95")
    # Not where the base is, from which this store was copied.
    artifacts = Path("mlruns/artifacts") / promoted.info.run_id / "artifacts"
    assert f"- data: {promoted.info.run_name.partition(' · ')[2]}" in (artifacts / "config.yaml").read_text()


def candidate() -> str | None:
    """Key of the stage that the alias of the candidate is on."""
    aliases = client().get_registered_model("lifelong-moe.tiny").aliases
    if "candidate" not in aliases:
        return None
    return str(client().get_model_version("lifelong-moe.tiny", aliases["candidate"]).tags["stage_key"])


def described(key: str) -> str:
    """The first line of a version's page."""
    (found,) = client().search_model_versions(f"name = 'lifelong-moe.tiny' and tags.stage_key = '{key}'")
    return str(found.description).splitlines()[0]


def outcome_in_mlflow() -> str:
    (of_tick,) = (run for run in runs().values() if run.data.tags["lifelong.kind"] == "tick")
    return str(of_tick.data.tags["lifelong.outcome"])


def test_a_rejected_version_is_no_candidate_any_more(finished: None, monkeypatch: pytest.MonkeyPatch) -> None:
    check = Check(name="new/gain", value=0.1, limit=9.0, passed=False, sentence="Not enough.")
    monkeypatch.setattr("pipelines.retrain.batch.gate", lambda *_: Verdict([check]))
    result = tick()
    assert result["outcome"] == "rejected" and candidate() is None
    assert described(result["candidate"]) == "rejected: Not enough."
    # One that has moved on stays.
    client().set_registered_model_alias("lifelong-moe.tiny", "candidate", "1")
    key = client().get_model_version("lifelong-moe.tiny", "1").tags["stage_key"]
    remove_alias(client(), "lifelong-moe.tiny", "candidate", result["candidate"])
    assert candidate() == key
    remove_alias(client(), "lifelong-moe.tiny", "candidate", key)
    remove_alias(client(), "lifelong-moe.tiny", "candidate", key)
    remove_alias(client(), "lifelong-moe.none", "candidate", key)
    assert candidate() is None


def test_a_candidate_waits_until_a_person_promotes_it(finished: None, tmp_path: Path) -> None:
    told = tmp_path / "told.jsonl"
    write_retraining(promote="manual", hooks={"command": ["tee", "-a", str(told)]})
    before = head()["plan"][-1]
    result = tick()
    key = result["candidate"]
    assert (result["outcome"], result["version"], result["champion"]["version"]) == ("awaiting approval", 1, 0)
    assert result["reason"].startswith("version 1 has passed the gate; lifelong-moe promote tiny lets it serve")
    assert (serving(), shown().tags["stage_key"], candidate()) == (before, before, key)
    assert described(key).startswith("at the gate, passed: ") and outcome_in_mlflow() == "awaiting approval"
    assert head()["batches"][result["batch"]]["outcome"] == "awaiting approval"
    # Only what serves raises the bar.
    assert head()["best"][result["data"]]["key"] != key == head()["candidate_best"][result["data"]]["key"]
    # More text gathers; nothing is read, trained or told twice.
    arrive("noise", "more.jsonl")
    lines, hooks = len(ledger()), told.read_text()
    again = tick()
    assert (again["outcome"], again["version"]) == ("awaiting approval", 1)
    assert (len(ledger()), told.read_text(), candidate()) == (lines, hooks, key)
    with pytest.raises(ConfigError, match=r"--reopen .*: names 0 batches"):
        tick(reopen=result["data"])
    with pytest.raises(ConfigError, match="version 1 of run tiny has never served: its approval is awaited"):
        rollback("tiny", 1, SILENT)
    for version, words in ((0, "is champion already"), (7, "has no version 7; there are 0 to 1")):
        if version:
            with pytest.raises(ConfigError, match=words):
                promote("tiny", version, SILENT)
        else:
            assert words in said(lambda console: promote("tiny", 0, console))
    assert exit_code(lambda: app(["promote", "tiny", "--version", "1", "--config", "retrain.yaml", "--json"])) == 0
    assert serving() == shown().tags["stage_key"] == key and head()["champion"] == 1
    assert head()["best"][result["data"]]["key"] == key and "candidate_best" not in head()
    assert head()["batches"][result["batch"]]["outcome"] == "promoted"
    assert described(key).startswith("promoted by a person: ") and outcome_in_mlflow() == "promoted"
    last = json.loads(told.read_text().replace("}{", "}\n{").splitlines()[-1])
    assert (last["outcome"], last["version"], last["champion"]["key"]) == ("promoted", 1, key)
    assert [line["event"] for line in ledger()][-1] == "promote"
    assert promote("tiny", None, SILENT)["outcome"] == "champion already"
    assert [line["event"] for line in ledger()].count("promote") == 1
    rollback("tiny", 0, SILENT)
    with pytest.raises(ConfigError, match=r"awaits no approval: it has served. lifelong-moe rollback tiny --to 1"):
        promote("tiny", 1, SILENT)


def test_a_person_may_reject(finished: None) -> None:
    write_retraining(promote="manual")
    result = tick()
    assert promote("tiny", None, SILENT, reject=True)["outcome"] == "rejected"
    assert head()["champion"] == 0 and candidate() is None and shown().tags["stage_key"] == serving()
    assert described(result["candidate"]).startswith("rejected by a person: ") and outcome_in_mlflow() == "rejected"
    with pytest.raises(ConfigError, match="version 1 of run tiny was rejected"):
        promote("tiny", 1, SILENT)
    with pytest.raises(ConfigError, match="no version of run tiny awaits approval"):
        promote("tiny", None, SILENT)
    with pytest.raises(ConfigError, match="version 1 of run tiny has never served: its approval is refused"):
        rollback("tiny", 1, SILENT)
    assert tick()["outcome"] == "idle"
    # Its number is never another's.
    again = tick(reopen=result["data"])
    assert (again["outcome"], again["version"], again["candidate"]) == ("awaiting approval", 2, result["candidate"])
    assert promote("tiny", 2, SILENT)["champion"] == 2


def test_a_candidate_for_another_champion_is_measured_anew(lab: None) -> None:
    write_retraining(promote="manual")
    arrive("noise", "noise.jsonl", seed=5)
    assert head()["champion"] == 1
    rollback("tiny", 0, SILENT)
    result = tick(reopen=head()["batches"][next(iter(head()["batches"]))]["name"])
    assert (result["outcome"], result["version"]) == ("awaiting approval", 2)
    rollback("tiny", 1, SILENT)
    with pytest.raises(ConfigError, match="was measured against version 0, and version 1 serves now"):
        promote("tiny", None, SILENT)
    rollback("tiny", 0, SILENT)
    assert promote("tiny", None, SILENT)["champion"] == 2


@pytest.mark.parametrize("place", ["set_head", "follow_champion"])
def test_a_promotion_that_was_killed_is_repeated(finished: None, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    write_retraining(promote="manual")
    key = tick()["candidate"]

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if place == "set_head":
            patch.setattr(RunRecord, "set_head", killed)
        else:
            patch.setattr("pipelines.retrain.promote._record", killed)
        promote("tiny", None, SILENT)
    assert shown().tags["stage_key"] != key
    promote("tiny", None, SILENT)
    assert serving() == shown().tags["stage_key"] == key
    assert described(key).startswith("promoted by a person: ") and outcome_in_mlflow() == "promoted"


@pytest.mark.parametrize("follows", ["command", "tick"])
def test_after_a_killed_promotion_the_next_tick_tells_who_serves(
    finished: None, monkeypatch: pytest.MonkeyPatch, follows: str
) -> None:
    write_retraining(promote="manual", trigger={"min_tokens": 10})
    key = tick()["candidate"]

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pipelines.retrain.promote._record", killed)
        promote("tiny", None, SILENT)
    assert head()["last_tick"]["outcome"] == "promoted"  # what status shows asks for no approval any more
    assert serving() == key != shown().tags["stage_key"]
    if follows == "command":
        promote("tiny", None, SILENT)
    else:
        assert tick()["outcome"] == "idle"
    assert shown().tags["stage_key"] == key


def test_a_rejection_that_was_killed_is_repeated(finished: None, monkeypatch: pytest.MonkeyPatch) -> None:
    write_retraining(promote="manual")
    result = tick()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pipelines.retrain.promote._record", killed)
        promote("tiny", None, SILENT, reject=True)
    assert candidate() == result["candidate"]
    for version in (None, 1):
        again = promote("tiny", version, SILENT, reject=True)
        assert (again["outcome"], again["version"], again["champion"]) == ("rejected already", 1, 0)
        assert candidate() is None and outcome_in_mlflow() == "rejected"
    assert [line["event"] for line in ledger()].count("promote") == 1
    # Looked at again, its text makes a version with the same stage, of which the first number says nothing.
    assert tick(reopen=result["data"])["version"] == 2
    with pytest.raises(ConfigError, match="version 1 of run tiny was rejected"):
        promote("tiny", 1, SILENT, reject=True)
    assert candidate() == result["candidate"] and outcome_in_mlflow() == "awaiting approval"
    with pytest.raises(ConfigError, match=r"awaits no approval: .* rollback tiny lets the version before it serve"):
        promote("tiny", 0, SILENT, reject=True)


@pytest.mark.parametrize("refused", [True, False])
def test_a_candidate_for_another_champion_loses_its_alias(lab: None, refused: bool) -> None:
    write_retraining(promote="manual")
    rollback("tiny", 0, SILENT)
    result = tick(reopen=head()["batches"][next(iter(head()["batches"]))]["name"])
    assert (result["outcome"], candidate()) == ("awaiting approval", result["candidate"])
    rollback("tiny", 1, SILENT)
    if refused:
        assert promote("tiny", None, SILENT, reject=True)["outcome"] == "rejected"
        assert head()["batches"][result["batch"]]["outcome"] == "rejected"
    assert tick()["outcome"] == "idle"
    assert head()["versions"][2]["approval"] == "refused" and candidate() is None
