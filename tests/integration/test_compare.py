"""A comparison in MLflow, killed, diverging, and worked on by several processes."""

from __future__ import annotations

import io
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
import yaml
from rich.console import Console

import pipelines.compare.compare as story
from lifelong_moe.config.load import LoadedConfig, read_config
from lifelong_moe.errors import DivergedError, LockedError, TryAgainError
from lifelong_moe.plan.comparison import load_comparison
from lifelong_moe.training.callbacks.progress import StepCheckpoint
from pipelines.compare.compare import compare
from pipelines.shared.output import SafeConsole
from pipelines.upkeep.sync import sync
from tests.tiny import fork, tiny_config, train, write_config

ABSENT = {"compare/plasticity_gap_worst_percent", "over_tokens/heldout_mean_bits_per_byte"}
"""Charts that MLflow leaves out as empty: without an unrestrained arm, and of means over seeds."""
needs_fork = pytest.mark.skipif(torch.cuda.is_available(), reason="autograd does not survive a fork once CUDA is there")


def start(*overrides: str, only: list[str] | None = None, width: int = 200) -> tuple[dict[str, Any], str]:
    """Compare in this process; returns ``comparison.json`` and what was printed."""
    printed = io.StringIO()
    found = compare(load_comparison("compare.yaml", overrides), only or [], False, Console(file=printed, width=width))
    return found, printed.getvalue()


@pytest.fixture
def setup(lab: Path) -> Callable[..., None]:
    """Write a comparison of two arms."""

    def call(stages: tuple[str, ...] = ("fruit", "code"), **sections: Any) -> None:
        write_config(tiny_config(stages, **sections))
        raw = {"compare": "c", "base": "tiny.yaml", "arms": {"naive": ["method=sequential"], "lifelong": []}}
        Path("compare.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))

    return call


def statuses(found: dict[str, Any]) -> dict[str, str]:
    return {run["run"]: run["status"] for arm in found["arms"] for run in arm["runs"]}


def recorded(lab: Path) -> dict[str, Any]:
    """MLflow's runs by name."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{(lab / 'mlruns/mlflow.db').absolute()}")
    experiment = client.get_experiment_by_name("lifelong-moe")
    assert experiment is not None
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def test_one_parent_with_the_arms_under_it(lab: Path, template: Path, setup: Callable[..., None]) -> None:
    from mlflow import MlflowClient

    (lab / "mlruns").mkdir()
    shutil.copy(template, lab / "mlruns/mlflow.db")
    setup(tracking={"enabled": True})
    found, printed = start("stage_defaults.grow.noise=0.02", width=80)
    # One line, however narrow the terminal, so that it can be copied.
    (address,) = (line for line in printed.splitlines() if line.startswith("MLflow: http://127.0.0.1:5000/#/"))
    assert len(address) > 80 and address.endswith("&compareRunsMode=CHART  (start it with: lifelong-moe ui)")
    assert "%)" in printed and " %)" not in printed.split("\nResults\n")[1].split("\nCost\n")[0]
    assert "oracle gap (bits/byte)" not in printed  # of no arm here, and a column of dashes would fold the others
    client = MlflowClient(f"sqlite:///{(lab / 'mlruns/mlflow.db').absolute()}")
    experiment = client.get_experiment_by_name("lifelong-moe")
    assert experiment is not None

    def runs() -> dict[str, Any]:
        return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}

    def logged() -> dict[str, int]:
        return {
            name: sum(len(client.get_metric_history(run.info.run_id, key)) for key in run.data.metrics)
            for name, run in runs().items()
        }

    first, points = runs(), logged()
    parent = first["c"]
    arms = {"naive s0 · c": found["arms"][0], "lifelong s0 · c": found["arms"][1]}
    assert {run.info.status for run in first.values()} == {"FINISHED"}
    assert {n for n, run in first.items() if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id} == set(arms)
    for name, arm in arms.items():
        numbers, metrics = arm["runs"][0]["numbers"], first[name].data.metrics
        seen = {key: value for key, value in metrics.items() if key.startswith("compare/")}
        # The reference's own gap is 0 by definition.
        assert seen == ({} if arm["name"] == "naive" else pytest.approx({
            "compare/plasticity_gap_worst_bits_per_byte": numbers["plasticity_gap_bits_per_byte"],
            "compare/plasticity_gap_worst_percent": 100 * numbers["plasticity_gap"],
            "compare/plasticity_gap_mean_bits_per_byte": numbers["plasticity_gap_mean_bits_per_byte"],
            "compare/plasticity_gap_mean_percent": 100 * numbers["plasticity_gap_mean"],
        }))  # fmt: skip
        # All else stands on the run's own page, under the same name for any run.
        assert metrics["all/forgetting_worst_bits_per_byte"] == pytest.approx(numbers["forgetting_max_bits_per_byte"])
        assert metrics["all/forgetting_worst_percent"] == pytest.approx(100 * numbers["forgetting_max"])
    assert parent.data.params["budget"] == "tokens" and parent.data.params["arms.naive"] == "method=sequential"
    assert parent.data.params["overrides"] == '["stage_defaults.grow.noise=0.02"]'
    grown, trained_on = (first[f"{arm} s0 · 1 code"].data.params for arm in ("lifelong", "naive"))
    assert (grown["grow.experts"], grown["grow.noise"], trained_on["grow.experts"]) == ("2", "0.02", "0")
    for name in arms:
        kept = lab / "mlruns/artifacts" / first[name].info.run_id / "artifacts/config.yaml"
        assert read_config(kept).config.run == f"c.{name.split()[0]}.s0"
    note = parent.data.tags["mlflow.note.content"]
    assert note.startswith("- Best at the end: lifelong, ") and "### Results" in note
    assert note.splitlines()[1].startswith("- lifelong ") and " where naive " in note.splitlines()[1]
    artifacts = lab / "mlruns/artifacts" / parent.info.run_id / "artifacts"
    stored = {str(path.relative_to(artifacts)) for path in artifacts.rglob("*") if path.is_file()}
    assert stored == {f"figures/{n}.png" for n in ("pareto", "curves", "leak")} | {"comparison.md", "comparison.json"}

    again, _ = start("stage_defaults.grow.noise=0.02")
    assert again == found
    assert {run.info.run_id for run in runs().values()} == {run.info.run_id for run in first.values()}
    assert logged() == points
    assert {run.info.status for run in runs().values()} == {"FINISHED"}


def test_a_comparison_can_be_judged_in_mlflow(lab: Path, template: Path, setup: Callable[..., None]) -> None:
    from mlflow import MlflowClient

    (lab / "mlruns").mkdir()
    shutil.copy(template, lab / "mlruns/mlflow.db")
    setup(tracking={"enabled": True})
    found, printed = start("seeds=[0,1]")
    client, runs = MlflowClient(f"sqlite:///{(lab / 'mlruns/mlflow.db').absolute()}"), recorded(lab)
    links = [word for word in printed.split() if word.startswith("http://")]
    experiment, shown, titles = runs["c"].info.experiment_id, [], []
    for link in links:
        assert len(link) < 200
        query = parse_qs(urlsplit(urlsplit(link).fragment).query)
        # With a filter in the address, MLflow would not open the view.
        assert query.keys() == {"workflowType", "viewStateShareKey", "compareRunsMode"}
        tags = client.get_experiment(experiment).tags
        view = json.loads(tags[f"mlflow.sharedViewState.{query['viewStateShareKey'][0]}"])
        state = json.loads(view["state"])
        # Any order but that by time: there MLflow shows what is below a comparison only after it is unfolded.
        order = f"{state['orderByKey']} {'ASC' if state['orderByAsc'] else 'DESC'}"
        rows = client.search_runs([experiment], state["searchFilter"], order_by=[order])
        assert {chart["metricKey"] for chart in state["compareRunCharts"]} <= rows[0].data.metrics.keys() | ABSENT
        shown.append([run.info.run_name for run in rows])
        titles.append(view["name"])
    assert titles == ["Comparison c", "Comparison c, means over seeds"]
    seeds, means = shown
    losses = [runs[name].data.metrics["all/heldout_mean_bits_per_byte"] for name in seeds]
    assert losses == sorted(losses) and len(set(losses)) == 4
    assert sorted(seeds) == ["lifelong s0 · c", "lifelong s1 · c", "naive s0 · c", "naive s1 · c"]
    assert sorted(means) == ["lifelong · mean over seeds · c", "naive · mean over seeds · c"]
    for name in seeds:
        place = {"arm": name.split()[0], "seed": name.split()[1][1], "routing": "learned"}
        place["method"] = "sequential" if place["arm"] == "naive" else "lifelong"
        data = runs[name].data
        assert place.items() <= data.params.items() and place.items() <= data.tags.items()
    means = [f"{arm['name']} · mean over seeds · c" for arm in found["arms"]]
    for arm, name in zip(found["arms"], means, strict=True):
        summary, metrics = arm["summary"]["final_mean_bits_per_byte"], runs[name].data.metrics
        assert metrics["all/heldout_mean_bits_per_byte"] == summary["mean"]
        for end in ("lowest", "highest"):  # of two seeds, an interval says nothing
            assert metrics[f"interval/heldout_mean_bits_per_byte_{end}"] == summary[end]
        assert runs[name].data.tags["mlflow.parentRunId"] == runs["c"].info.run_id
        assert runs[name].data.tags["mlflow.note.content"].startswith(f"{arm['name']} ")  # its verdict
        assert runs["c"].data.metrics[f"heldout_mean_bits_per_byte/{arm['name']}"] == summary["mean"]
    difference = found["arms"][1]["differences"]["final_mean_bits_per_byte"]
    metrics = runs[means[1]].data.metrics
    assert metrics["difference/heldout_mean_bits_per_byte"] == difference["mean"]
    assert metrics["difference_interval/heldout_mean_bits_per_byte_highest"] == difference["highest"]
    assert "difference_interval/heldout_mean_bits_per_byte_p" not in metrics
    assert not [key for key in runs[means[0]].data.metrics if key.startswith("difference")]  # the reference
    assert runs["c"].data.metrics["runs/committed"] == 4 and runs["c"].data.metrics["runs/absent"] == 0
    before = (lab / "mlruns/mlflow.db").read_bytes()
    start("seeds=[0,1]")
    assert (lab / "mlruns/mlflow.db").read_bytes() == before


def test_a_comparison_that_waits_in_the_spool_arrives_whole(
    lab: Path, template: Path, setup: Callable[..., None]
) -> None:
    from mlflow import MlflowClient

    (lab / "mlruns").mkdir()
    (lab / "mlruns/mlflow.db").write_bytes(b"no database" * 1000)
    setup(("fruit",), tracking={"enabled": True})
    found, printed = start("seeds=[0,1]")
    assert "records are kept under mlruns/spool" in printed
    shutil.copy(template, lab / "mlruns/mlflow.db")
    sync(SafeConsole(io.StringIO()))
    runs = recorded(lab)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["naive s1 · c"].data.tags["comparison"] == "c" and runs["c"].data.metrics["runs/committed"] == 4
    summary = found["arms"][0]["summary"]["final_mean_bits_per_byte"]
    assert runs["naive · mean over seeds · c"].data.metrics["all/heldout_mean_bits_per_byte"] == summary["mean"]
    assert not list((lab / "mlruns/spool").glob("*/refused.jsonl"))
    tags = MlflowClient(f"sqlite:///{(lab / 'mlruns/mlflow.db').absolute()}").get_experiment("1").tags
    views = [json.loads(value)["name"] for key, value in tags.items() if key.startswith("mlflow.sharedViewState.")]
    assert sorted(views) == ["Best held-out loss first", "Comparison c", "Comparison c, means over seeds"]
    start("seeds=[0,1]")
    assert set(recorded(lab)) == set(runs)  # none twice


def test_arms_are_registered_only_where_asked(lab: Path, template: Path, setup: Callable[..., None]) -> None:
    from mlflow import MlflowClient

    (lab / "mlruns").mkdir()
    shutil.copy(template, lab / "mlruns/mlflow.db")
    setup(("fruit",), tracking={"enabled": True})
    start()
    client = MlflowClient(f"sqlite:///{(lab / 'mlruns/mlflow.db').absolute()}")
    assert not client.search_registered_models()
    sync(SafeConsole(io.StringIO()))
    assert not client.search_registered_models()
    kept = lab / "mlruns/artifacts" / recorded(lab)["lifelong s0 · c"].info.run_id / "artifacts/config.yaml"
    train(str(kept))
    assert [model.name for model in client.search_registered_models()] == ["lifelong-moe.c.lifelong.s0"]
    version = client.get_model_version_by_alias("lifelong-moe.c.lifelong.s0", "champion")
    assert version.tags["stage_key"] == json.loads(Path("mlruns/runs/c.lifelong.s0/head.json").read_text())["stages"][0]
    start()
    assert len(client.search_model_versions()) == 1


def test_what_an_earlier_version_recorded_gets_its_place(lab: Path, template: Path, setup: Callable[..., None]) -> None:
    """Its runs had neither arm nor seed, and its comparison no numbers; their names, numbers and models stay."""
    from mlflow import MlflowClient

    (lab / "mlruns").mkdir()
    shutil.copy(template, lab / "mlruns/mlflow.db")
    setup(("fruit",), tracking={"enabled": True})
    start()
    client = MlflowClient(f"sqlite:///{(lab / 'mlruns/mlflow.db').absolute()}")
    run_id = recorded(lab)["naive s0 · c"].info.run_id
    client.update_run(run_id, name="c.naive.s0")
    for tag in ("arm", "seed", "method", "routing", "comparison"):
        client.delete_tag(run_id, tag)
    path = lab / "mlruns/comparisons/c/head.json"
    head = json.loads(path.read_text())
    head["content"] = head["mlflow"]["content"] = "0" * 64
    del head["mlflow"]["arms"], head["mlflow"]["own"]
    for logged in head["mlflow"]["logged"].values():
        del logged["arm"]
    path.write_text(json.dumps(head))
    before = recorded(lab)["c.naive.s0"]
    start()
    after = recorded(lab)["c.naive.s0"]
    assert after.data.tags["comparison"] == "c" and after.data.tags["arm"] == "naive"
    assert after.data.metrics == before.data.metrics and after.info.end_time == before.info.end_time


def test_an_arm_that_gets_more_numbers_keeps_its_end(lab: Path, template: Path, setup: Callable[..., None]) -> None:
    (lab / "mlruns").mkdir()
    shutil.copy(template, lab / "mlruns/mlflow.db")
    setup(tracking={"enabled": True})
    start()
    before = recorded(lab)
    assert "compare/oracle_gap_bits_per_byte" not in before["naive s0 · c"].data.metrics
    found, _ = start("arms.joint=[method=joint]")
    after = recorded(lab)
    assert "compare/oracle_gap_bits_per_byte" in after["naive s0 · c"].data.metrics
    assert {n: r.info.end_time for n, r in after.items() if n in before and n != "c"} == {
        n: r.info.end_time for n, r in before.items() if n != "c"
    }
    for name in ("naive s0 · c", "lifelong s0 · c"):
        metrics = after[name].data.metrics
        numbers = next(arm for arm in found["arms"] if name.startswith(arm["name"]))["runs"][0]["numbers"]
        for ours, theirs in (("tokens", "tokens"), ("active_flops", "flops"), ("seconds", "seconds")):
            assert numbers[ours] == metrics[f"cost/{theirs}"]


def test_equal_flops(setup: Callable[..., None]) -> None:
    setup(stage_defaults=tiny_config()["stage_defaults"] | {"distill": {"text": "new"}})
    found, _ = start("budget=flops")
    naive, lifelong = (arm["runs"][0]["numbers"] for arm in found["arms"])
    assert lifelong["active_flops"] <= naive["active_flops"] and lifelong["tokens"] < naive["tokens"]
    reports = [json.loads(Path(f"mlruns/runs/c.{arm}.s0/report.json").read_text()) for arm in ("naive", "lifelong")]
    ours, theirs = (report["stages"] for report in reports)
    assert ours[0]["key"] == theirs[0]["key"]  # what begins alike stays shared
    assert theirs[1]["active_flops"] <= ours[1]["active_flops"]


def test_an_arm_that_diverges_does_not_stop_the_others(
    lab: Path, template: Path, setup: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (lab / "mlruns").mkdir()
    shutil.copy(template, lab / "mlruns/mlflow.db")
    setup(("fruit",), tracking={"enabled": True})
    trains = story.run

    def run(loaded: LoadedConfig, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if loaded.config.run == "c.naive.s0":
            raise DivergedError("stage fruit: no finite gradient; nothing was committed.")
        return trains(loaded, *args, **kwargs)

    monkeypatch.setattr(story, "run", run)
    with pytest.raises(DivergedError, match=r"1 of 2 runs diverged: c\.naive\.s0; the others are compared"):
        start()
    found = json.loads(Path("mlruns/comparisons/c/comparison.json").read_text())
    assert statuses(found) == {"c.naive.s0": "failed", "c.lifelong.s0": "committed"}
    assert found["arms"][0]["runs"][0]["reason"].startswith("stage fruit: no finite gradient")
    shown = {"c": "FAILED", "lifelong s0 · c": "FINISHED", "lifelong s0 · 0 fruit": "FINISHED"}
    assert {name: run.info.status for name, run in recorded(lab).items()} == shown
    monkeypatch.setattr(story, "run", trains)
    found, _ = start()
    assert set(statuses(found).values()) == {"committed"}
    assert found["arms"][0]["runs"][0]["reason"] is None
    assert {run.info.status for run in recorded(lab).values()} == {"FINISHED"}


def test_locked_runs_come_last_and_are_waited_for(setup: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    setup(("fruit",))
    trains, begun, waits = story.run, [], []

    def run(loaded: LoadedConfig, *args: Any, **kwargs: Any) -> dict[str, Any]:
        begun.append(loaded.config.run)
        if begun[-1] == "c.naive.s0" and len(begun) < 5:
            raise LockedError("run c.naive.s0 is being worked on by process 1; try again later.")
        return trains(loaded, *args, **kwargs)

    monkeypatch.setattr(story, "run", run)
    monkeypatch.setattr(story, "_wait", lambda jobs: waits.append(len(begun)))
    found, printed = start()
    assert begun == ["c.naive.s0", "c.lifelong.s0", *["c.naive.s0"] * 3]
    assert waits == [3, 4]  # once it was all that was left
    assert set(statuses(found).values()) == {"committed"} and "waiting for them" in printed


@needs_fork
def test_two_processes_share_the_work(lab: Path, setup: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    setup()
    monkeypatch.setattr(story, "WAIT_SECONDS", 0.2)
    children = [fork(lambda: start()) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0], [child.output for child in children]
    assert len(list((lab / "mlruns/stages").iterdir())) == 3
    found, printed = start()
    assert set(statuses(found).values()) == {"committed"} and "training" not in printed.partition("Results")[0]


@needs_fork
@pytest.mark.parametrize(
    ("number", "code", "told"),
    [
        (signal.SIGTERM, TryAgainError.exit_code, "TryAgainError: stopped by SIGTERM"),
        (signal.SIGINT, 130, "interrupted: stopped by Ctrl-C"),
    ],
)
@pytest.mark.parametrize("function", ["run", "_wait"])
def test_a_signal_stops_it(
    lab: Path,
    setup: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    number: signal.Signals,
    code: int,
    told: str,
) -> None:
    setup(("fruit",))

    def terminated(*args: Any, **kwargs: Any) -> None:
        signal.raise_signal(number)

    def locked(*args: Any, **kwargs: Any) -> None:
        raise LockedError("run is being worked on by process 1; try again later.")

    monkeypatch.setattr(story, "run", locked)
    monkeypatch.setattr(story, function, terminated)
    child = fork(start)
    assert child.wait() == code, child.output
    assert child.output.splitlines()[-1].startswith(told)


@needs_fork
def test_ctrl_c_saves_what_an_arm_has_trained(
    lab: Path, setup: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup(("fruit",))
    original = StepCheckpoint.on_train_batch_end

    def on_train_batch_end(self: StepCheckpoint, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 6:
            signal.raise_signal(signal.SIGINT)
        original(self, trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(StepCheckpoint, "on_train_batch_end", on_train_batch_end)
        child = fork(start)
        assert child.wait() == 130, child.output
    assert child.output.splitlines()[-1].startswith("interrupted: stopped after step 6, which is checkpointed; run")
    found, printed = start()
    assert "fruit: continuing from step-0-00000006" in printed and set(statuses(found).values()) == {"committed"}
