"""Runs as names for stages: sharing, repeating, continuing, refusing, and one process at a time."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lifelong_moe.errors import ConfigError, CorruptError, TryAgainError
from lifelong_moe.storage.locks import locked
from lifelong_moe.store.runs import RunRecord, require_head
from pipelines.cli import exit_code
from tests.known_stages import train_all_stages
from tests.tiny import fork, hashes, tiny_config, train, write_config

pytestmark = pytest.mark.usefixtures("known_stages")
needs_fork = pytest.mark.skipif(torch.cuda.is_available(), reason="autograd does not survive a fork once CUDA is there")


def snapshot(root: Path = Path("mlruns")) -> dict[str, tuple[int, int]]:
    """Inode and modification time of every file."""
    return {
        str(path): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def head(run: str = "tiny") -> dict[str, Any]:
    return json.loads(Path(f"mlruns/runs/{run}/head.json").read_text())


def ledger(run: str = "tiny") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"mlruns/runs/{run}/ledger.jsonl").read_text().splitlines()]


def test_two_arms_share_their_first_stage(lab: Path) -> None:
    write_config(tiny_config())
    first, _ = train()
    before = snapshot(lab / "mlruns/stages")
    second, printed = train("tiny.yaml", "run=naive", "method=sequential")
    assert len(list((lab / "mlruns/stages").iterdir())) == 3
    after = snapshot(lab / "mlruns/stages")
    assert {path: after[path] for path in before} == before
    assert [stage["shared"] for stage in first["stages"]] == [False, False]
    assert [stage["shared"] for stage in second["stages"]] == [True, False]
    assert first["stages"][0]["weights_sha256"] == second["stages"][0]["weights_sha256"]
    assert first["loss_nats_per_token"][0] == second["loss_nats_per_token"][0]
    assert second["stages"][1]["experts_per_layer"] == 2 and first["stages"][1]["experts_per_layer"] == 4
    assert "fruit (shared)" in printed


@contextmanager
def waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """What is flushed to disk within: files and folders, as far as the system tells their paths."""
    waited: list[Path] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}")
        waited.append(path.readlink() if path.is_symlink() else path)
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", noted)
        yield waited


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not tell what is flushed")
def test_a_stage_waits_for_the_disk_as_often_whatever_is_measured(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_all_stages(monkeypatch)  # and measure them, as no test did before
    write_config(tiny_config(("fruit", "code", "sea")))
    train("tiny.yaml", "stages=[{data: fruit}]", "evaluate.also=[code, sea]")  # tokenizes the text
    counts = []
    for also in ("[]", "[code, sea]"):
        shutil.rmtree("mlruns")
        with waiting_for_the_disk(monkeypatch) as waited:
            train("tiny.yaml", "stages=[{data: fruit}]", f"evaluate.also={also}")
        # What is known of text lies in the cache; it is written where other distributions are read together.
        store = [path.relative_to(lab / "mlruns") for path in waited if path.is_relative_to(lab / "mlruns")]
        counts.append(Counter(path.parts[0] for path in store))
    # Each distribution's held-out text is kept once. Else a file and its folder, of the untrained model and the stage.
    assert [count.pop("heldout") for count in counts] == [2, 6] and counts[0] == counts[1]
    assert counts[0]["evaluations"] == 4


def test_repeating_trains_nothing_and_changes_nothing(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tiny_config())
    report, _ = train()
    before, events = snapshot(lab / "mlruns/stages") | snapshot(lab / "mlruns/evaluations"), ledger()
    with waiting_for_the_disk(monkeypatch) as waited:
        again, printed = train()
    assert again == report and waited == []
    assert snapshot(lab / "mlruns/stages") | snapshot(lab / "mlruns/evaluations") == before
    assert ledger() == events and [event["name"] for event in events] == ["fruit", "code"]
    assert "Nothing to train: all 2 stages of tiny are committed." in printed


def test_renamed_and_shuffled_files_are_the_same_data(lab: Path) -> None:
    write_config(tiny_config())
    report, _ = train()
    lines = (lab / "fruit.jsonl").read_text().splitlines()
    (lab / "renamed.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    again, printed = train("tiny.yaml", "distributions.fruit.files=renamed.jsonl")
    assert again == report and "Nothing to train" in printed


@pytest.mark.parametrize(
    "override",
    ["seed=1", "stages[1].tokens=1024", "model.width=48", "method=sequential", "stage_defaults.optim.lr=1e-4"],
)
def test_changed_configuration_under_the_same_name_is_refused(lab: Path, override: str) -> None:
    write_config(tiny_config())
    train()
    before = snapshot(lab / "mlruns")
    with pytest.raises(
        ConfigError, match=r"run=tiny exists with another configuration .* Choose run=NAME, or --replace"
    ):
        train("tiny.yaml", override)
    assert snapshot(lab / "mlruns") == before
    assert exit_code(lambda: train("tiny.yaml", override)) == 2


def test_what_no_stage_depends_on_may_change(lab: Path) -> None:
    write_config(tiny_config())
    report, _ = train()
    overrides = ["checkpoint.every_steps=3", "trainer.log_every_n_steps=2", "evaluate.batch_tokens=64"]
    again, printed = train("tiny.yaml", *overrides)
    assert "Nothing to train" in printed
    assert again == report


def test_replace_lets_the_name_refer_to_new_stages(lab: Path) -> None:
    write_config(tiny_config())
    train()
    before, old = snapshot(lab / "mlruns/stages"), hashes()
    report, _ = train("tiny.yaml", "stages[1].tokens=1024", replace=True)
    assert hashes()[0] == old[0] and hashes()[1] != old[1]
    assert [stage["shared"] for stage in report["stages"]] == [False, False]
    after = snapshot(lab / "mlruns/stages")
    assert {path: after[path] for path in before} == before  # the old stage stays, for whoever refers to it
    assert head()["plan"] == head()["stages"] == [stage["key"] for stage in report["stages"]]
    again, printed = train("tiny.yaml", replace=True)
    assert "Nothing to train" in printed and hashes() == old
    assert [stage["key"] for stage in again["stages"]] == head()["plan"]


def test_appended_stage_continues(lab: Path) -> None:
    train(write_config(tiny_config(("fruit", "code"))))
    before, old = snapshot(lab / "mlruns/stages"), hashes()
    report, _ = train(write_config(tiny_config(("fruit", "code", "sea"))))
    after = snapshot(lab / "mlruns/stages")
    assert {path: after[path] for path in before} == before
    assert hashes()[:2] == old and len(hashes()) == 3
    assert report["distributions"] == ["fruit", "code", "sea"]
    assert [len(row) for row in report["loss_nats_per_token"]] == [3, 3, 3]
    straight, _ = train("tiny.yaml", "run=straight")
    assert [stage["key"] for stage in straight["stages"]] == [stage["key"] for stage in report["stages"]]


def test_further_distribution_adds_a_column_and_touches_no_stage(lab: Path) -> None:
    config = tiny_config()
    train(write_config(config))
    stages, evaluations = snapshot(lab / "mlruns/stages"), snapshot(lab / "mlruns/evaluations")
    config["distributions"]["sea"] = {"files": "sea.jsonl"}
    config["evaluate"]["also"] = ["sea"]
    report, printed = train(write_config(config))
    assert "Nothing to train" in printed
    assert snapshot(lab / "mlruns/stages") == stages
    now = snapshot(lab / "mlruns/evaluations")
    assert {path: now[path] for path in evaluations} == evaluations
    assert len(now) == len(evaluations) + 3  # untrained, and after each of two stages
    assert report["distributions"] == ["fruit", "code", "sea"]
    assert set(report["forgetting"]) == {"fruit", "code"}


def test_other_heldout_text_and_settings_are_measured_anew(lab: Path) -> None:
    config = tiny_config(("fruit",))
    config["distributions"]["fruit"]["heldout_files"] = "sea.jsonl"
    first, _ = train(write_config(config))
    config["distributions"]["fruit"]["heldout_files"] = "code.jsonl"
    second, printed = train(write_config(config))
    assert "Nothing to train" in printed
    assert first["loss_nats_per_token"] != second["loss_nats_per_token"]
    third, _ = train("tiny.yaml", "evaluate.tokens=100")
    assert third["loss_nats_per_token"] != second["loss_nats_per_token"]


def test_damaged_evaluation_is_made_again(lab: Path) -> None:
    write_config(tiny_config(("fruit",)))
    report, _ = train()
    for path in (lab / "mlruns/evaluations").iterdir():
        path.write_text(path.read_text()[:-20])
    again, _ = train()
    assert again == report


def test_damaged_head_is_told(lab: Path) -> None:
    write_config(tiny_config(("fruit",)))
    train()
    (lab / "mlruns/runs/tiny/head.json").write_text('{"run": ')
    with pytest.raises(CorruptError, match=r"head.json: not JSON"):
        train()


def test_unknown_run_names_the_ones_there_are(lab: Path) -> None:
    with pytest.raises(ConfigError, match="There are none yet"):
        require_head(Path("mlruns"), "tiny")
    train(write_config(tiny_config(("fruit",))))
    with pytest.raises(ConfigError, match=r"run tony does not exist .* There are tiny\."):
        require_head(Path("mlruns"), "tony")


@contextmanager
def held_by_another_process(path: Path) -> Iterator[int]:
    """A child holds the lock for as long as the context lasts."""
    ready, release = os.pipe(), os.pipe()

    def hold() -> None:
        os.close(release[1])
        with locked(path, "something"):
            os.write(ready[1], b"x")
            os.read(release[0], 1)

    child = fork(hold)
    os.read(ready[0], 1)
    try:
        yield child.pid
    finally:
        os.close(release[1])
        assert child.wait() == 0, child.output


@needs_fork
def test_run_that_another_process_works_on(lab: Path) -> None:
    write_config(tiny_config(("fruit",)))
    with held_by_another_process(RunRecord(Path("mlruns"), "tiny").lock_path) as pid:
        with pytest.raises(TryAgainError, match=f"run tiny is being worked on by process {pid}; try again later"):
            train()
        train("tiny.yaml", "run=other", "seed=1")  # another run is free
    assert exit_code(lambda: train()) == 0


@needs_fork
def test_stage_that_another_run_trains(lab: Path) -> None:
    write_config(tiny_config(("fruit",)))
    report, _ = train("tiny.yaml", "run=first")
    key = report["stages"][0]["key"]
    stage = next((lab / "mlruns/stages").iterdir())
    stage.rename(lab / "aside")  # as if the other run had not finished it yet
    with held_by_another_process(Path(f"mlruns/work/{key[:16]}/.lock")):
        assert exit_code(lambda: train()) == TryAgainError.exit_code == 75
    (lab / "aside").rename(stage)
    report, printed = train()
    assert "Nothing to train" in printed
    assert [one["shared"] for one in report["stages"]] == [True]


@needs_fork
def test_simultaneous_starts_never_corrupt(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_all_stages(monkeypatch)
    write_config(tiny_config(("fruit",)))
    children = [fork(lambda: train()) for _ in range(4)]
    codes = sorted(child.wait() for child in children)
    assert codes[0] == 0 and set(codes) <= {0, 75}, [child.output for child in children]
    with_lock = hashes()
    assert [path.name for path in (lab / "mlruns/work").iterdir()] == []

    def without_lock(name: str) -> None:
        from contextlib import nullcontext

        import lifelong_moe.training.stage as training
        import pipelines.run.run as story

        training.locked = story.locked = lambda *args: nullcontext()  # type: ignore[attr-defined]
        train("tiny.yaml", f"run={name}", "seed=3")

    children = [fork(lambda name=name: without_lock(name)) for name in ("a", "b")]  # type: ignore[misc]
    codes = [child.wait() for child in children]
    assert codes.count(0) >= 1, [child.output for child in children]
    train("tiny.yaml", "run=a", "seed=3")
    train("tiny.yaml", "run=b", "seed=3")
    assert hashes(run_name="a") == hashes(run_name="b") != with_lock


def test_shorter_stream_under_the_same_name_keeps_the_stages(lab: Path) -> None:
    train(write_config(tiny_config()))
    stages = snapshot(lab / "mlruns/stages")
    report, _ = train(write_config(tiny_config(("fruit",))))
    assert len(report["stages"]) == 1
    assert snapshot(lab / "mlruns/stages") == stages


def test_training_touches_no_network(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*args: Any) -> None:
        raise AssertionError(f"connected to {args[1:]}")

    train_all_stages(monkeypatch)
    monkeypatch.setattr(socket.socket, "connect", connect)
    write_config(tiny_config(("fruit",)))
    report, _ = train()
    assert len(report["stages"]) == 1


def test_more_tokens_for_a_committed_stage_are_a_further_stage(lab: Path) -> None:
    from lifelong_moe.config.load import read_config
    from pipelines.run.plan import plan

    write_config(tiny_config())
    train()
    remedy = (
        r"Stage code is committed with 1,536 tokens; to train it further, leave it as it is and append a stage "
        r"\{data: code, continues: code\}\."
    )
    with pytest.raises(ConfigError, match=rf"Choose run=NAME, or --replace .* stages\. {remedy}$"):
        train("tiny.yaml", "stages[1].tokens=2048")
    printed = io.StringIO()
    plan(read_config("tiny.yaml", ["stages[1].tokens=2048"]), Console(file=printed, width=400))
    assert re.search(remedy, printed.getvalue())
    for other in ("stages[1].tokens=1024", "stages[1].optim.lr=1e-4"):  # less, and not tokens at all
        with pytest.raises(ConfigError, match=r"new stages\.$"):
            train("tiny.yaml", other)
    stages = "stages=[{data: fruit}, {data: code}, {name: more, data: code, continues: code}]"
    report, _ = train("tiny.yaml", stages)
    assert [stage["name"] for stage in report["stages"]] == ["fruit", "code", "more"]
