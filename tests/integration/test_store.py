"""What is committed stays whole: kills at every operation of a commit, damage, disk, formats, frozen bits."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lifelong_moe.errors import ConfigError, CorruptError, DivergedError, ResourceError
from lifelong_moe.storage import directories, files
from lifelong_moe.storage.directories import write_directory
from lifelong_moe.storage.keys import file_sha256
from lifelong_moe.storage.tensors import load_weights
from lifelong_moe.storage.verified import verify_directory
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.callbacks import progress as callbacks
from lifelong_moe.training.restore import load_model
from pipelines.cli import exit_code
from tests.tiny import fork, hashes, kill_self, tiny_config, train, write_config

needs_fork = pytest.mark.skipif(torch.cuda.is_available(), reason="autograd does not survive a fork once CUDA is there")


def stage_directory(name: str) -> Path:
    """The only committed stage of that name."""
    (found,) = Path("mlruns/stages").glob(f"{name}-*")
    return found


def flip_byte(path: Path, offset: int = -1) -> None:
    """Damage one byte."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def tree(root: Path = Path("mlruns")) -> dict[str, int]:
    """Every file's modification time."""
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Hashes of the two-stage run that nothing disturbed."""
    from tests.tiny import write_corpora

    before, root = os.getcwd(), tmp_path_factory.mktemp("undisturbed")
    os.chdir(root)
    try:
        write_corpora(root)
        train(write_config(tiny_config()))
        return hashes()
    finally:
        os.chdir(before)


def die_at(module: Any, function: str, when: Callable[..., bool], *, after: bool) -> None:
    """Kill this process before or after a matching call."""
    original = getattr(module, function)

    def call(*args: Any, **kwargs: Any) -> Any:
        matches = when(*args, **kwargs)
        if matches and not after:
            kill_self()
        result = original(*args, **kwargs)
        if matches:
            kill_self()
        return result

    setattr(module, function, call)


def is_stage(path: object) -> bool:
    return Path(str(path)).parent.name == "stages"


@needs_fork
@pytest.mark.parametrize(
    ("function", "when", "after", "trained_again"),
    [
        ("sync", lambda path: path.name == "config.json", False, True),
        ("sync", lambda path: path.name == "manifest.json" and is_stage(path.parent), True, True),
        ("_publish", lambda tmp, target: is_stage(target), False, True),
        ("_publish", lambda tmp, target: is_stage(target), True, False),
    ],
    ids=["while its files are written", "before the rename", "at the rename", "after the rename"],
)
def test_killed_in_a_commit(
    lab: Path, expected: list[str], function: str, when: Callable[..., bool], after: bool, trained_again: bool
) -> None:
    write_config(tiny_config())

    def action() -> None:
        die_at(directories, function, when, after=after)
        train()

    child = fork(action)
    assert child.wait() == -signal.SIGKILL, child.output
    there = [path.name for path in (lab / "mlruns/stages").glob("fruit-*")]
    assert len(there) == (0 if trained_again else 1)
    left = list((lab / "mlruns/stages").glob(".tmp-*"))
    assert len(left) == (1 if trained_again else 0)
    adopted = tree(lab / "mlruns/stages")
    report, _ = train()
    assert list((lab / "mlruns/stages").glob(".tmp-*")) == []
    assert hashes() == expected
    if not trained_again:  # adopted as it was, and known as this run's own
        assert {path: time for path, time in tree(lab / "mlruns/stages").items() if path in adopted} == adopted
    assert [stage["shared"] for stage in report["stages"]] == [False, False]


@needs_fork
def test_killed_while_a_step_checkpoint_is_written(lab: Path, expected: list[str]) -> None:
    write_config(tiny_config())

    def action() -> None:
        die_at(directories, "_publish", lambda tmp, target: target.name == "step-0-00000008", after=False)
        train()

    assert fork(action).wait() == -signal.SIGKILL
    assert len(list((lab / "mlruns").glob("work/*/.tmp-*"))) == 1
    _, printed = train()
    assert "fruit: continuing from step-0-00000004" in printed
    assert hashes() == expected


@needs_fork
def test_killed_while_an_evaluation_is_written(lab: Path) -> None:
    write_config(tiny_config(("fruit",)))

    def action() -> None:
        die_at(files, "sync", lambda path: path.parent.parent.name == "evaluations", after=False)
        train()

    assert fork(action).wait() == -signal.SIGKILL
    assert len(list((lab / "mlruns/evaluations").glob(".tmp-*"))) == 1
    train()
    assert list((lab / "mlruns").rglob(".tmp-*")) == []


@needs_fork
def test_killed_between_ledger_report_and_head(lab: Path, expected: list[str]) -> None:
    write_config(tiny_config())
    for name in ("report.json", "head.json"):

        def action(name: str = name) -> None:
            def when(path: Path, text: str) -> bool:
                return path.name == name and len(list((lab / "mlruns/stages").glob("*"))) == 2

            from lifelong_moe.store import runs

            die_at(runs, "write_atomic", when, after=False)
            train()

        assert fork(action).wait() == -signal.SIGKILL
    train()
    assert hashes() == expected
    events = [json.loads(line) for line in (lab / "mlruns/runs/tiny/ledger.jsonl").read_text().splitlines()]
    assert {event["name"] for event in events} == {"fruit", "code"}


@pytest.mark.usefixtures("known_stages")
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_flipped_byte_in_a_committed_stage(lab: Path, capsys: pytest.CaptureFixture[str], file: str) -> None:
    write_config(tiny_config(("fruit",)))
    train()
    path = stage_directory("fruit") / file
    recorded = json.loads((path.parent / "manifest.json").read_text())["files"][file]["sha256"]
    flip_byte(path)
    before = tree()
    assert exit_code(lambda: train()) == CorruptError.exit_code == 7
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(path) in error and recorded in error
    assert error.count("SHA-256") == 1 and len([word for word in error.split() if len(word.strip(".,")) == 64]) == 2
    assert {name: time for name, time in tree().items() if not name.startswith("mlruns/runs")} == {
        name: time for name, time in before.items() if not name.startswith("mlruns/runs")
    }


@pytest.mark.usefixtures("known_stages")
def test_manifest_gone_or_file_gone(lab: Path) -> None:
    write_config(tiny_config(("fruit",)))
    train()
    directory = stage_directory("fruit")
    shutil.copytree(directory, lab / "copy")
    (directory / "metrics.json").unlink()
    with pytest.raises(CorruptError, match=r"metrics.json: missing"):
        train()
    shutil.copy(lab / "copy/metrics.json", directory)
    (directory / "manifest.json").unlink()
    with pytest.raises(CorruptError, match=r"manifest.json: missing"):
        train()


@contextmanager
def stopped_after(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let training end with an error of ours at a step of the first stage, checkpoints and all."""
    original = callbacks.StepCheckpoint.on_train_batch_end

    def on_train_batch_end(self: Any, trainer: Any, *args: Any) -> None:
        original(self, trainer, *args)
        if trainer.global_step == step:
            raise ResourceError("stopped by the test")

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.StepCheckpoint, "on_train_batch_end", on_train_batch_end)
        with pytest.raises(ResourceError, match="by the test"):
            yield


def step_checkpoints(lab: Path) -> list[Path]:
    return sorted((lab / "mlruns").glob("work/*/step-*"))


@pytest.mark.parametrize("file", ["state.safetensors", "manifest.json"])
def test_truncated_checkpoint_is_passed_over(
    lab: Path, expected: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    write_config(tiny_config())
    with stopped_after(8, monkeypatch):
        train()
    older, newest = step_checkpoints(lab)
    with (newest / file).open("r+b") as stream:
        stream.truncate(20)
    _, printed = train()
    assert f"fruit: continuing from {older.name}" in printed
    warned = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert len(warned) == 1 and f"{newest.name}/{file}" in warned[0]
    assert hashes() == expected


def test_all_checkpoints_bad_never_means_step_zero(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tiny_config(("fruit",)))
    with stopped_after(8, monkeypatch):
        train()
    for path in step_checkpoints(lab):
        flip_byte(path / "state.safetensors")
    assert exit_code(lambda: train()) == 7
    assert "none of its 2 step checkpoints verifies" in capsys.readouterr().err.splitlines()[-1]
    assert list((lab / "mlruns/stages").glob("fruit-*")) == []
    shutil.rmtree(step_checkpoints(lab)[0].parent)  # the remedy that the message names
    train()


def test_newest_two_checkpoints_are_kept(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tiny_config(("fruit",), checkpoint={"every_steps": 2}))
    with stopped_after(10, monkeypatch):
        train()
    assert [path.name for path in step_checkpoints(lab)] == ["step-0-00000008", "step-0-00000010"]


def test_disk_full_leaves_the_old_state(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tiny_config())
    train(write_config(tiny_config(("fruit",)), "one.yaml"))
    before = tree(lab / "mlruns/stages")

    def no_space(path: Path) -> None:
        if ".tmp-" in str(path) and "stages" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(directories, "sync", no_space)
        assert exit_code(lambda: train()) == ResourceError.exit_code == 8
    assert "no space left" in capsys.readouterr().err.splitlines()[-1]
    assert tree(lab / "mlruns/stages") == before
    train()


@pytest.mark.parametrize("trunk", ["full", "frozen"])
def test_frozen_tensors_keep_their_bits_over_three_stages(lab: Path, trunk: str) -> None:
    config = tiny_config(("fruit", "code", "sea"))
    config["stage_defaults"]["trunk"] = {"train": trunk}
    config["stage_defaults"]["optim"]["weight_decay"] = 0.5
    write_config(config)
    report, _ = train()
    store = StageStore(Path("mlruns"))
    stages = [store.get(stage["key"]) for stage in report["stages"]]
    tensors = [store.tensors(stage) for stage in stages]
    own = [set(load_file(stage.path / "model.safetensors")) for stage in stages]
    bits = [{name: tensor.numpy().tobytes() for name, tensor in one.items()} for one in tensors]
    experts = [{name for name in one if ".moe." in name} for one in bits]
    assert experts[0] < experts[1] < experts[2]
    for born in (0, 1):
        later = experts[born] - (experts[born - 1] if born else set())
        assert len(later) == 2 * (2 * 2 + 1)  # layers × (two matrices for each of two experts, and the router's rows)
        for i in range(born + 1, 3):
            assert all(bits[i][name] == bits[born][name] for name in later)
            assert not later & own[i]  # stored once, by the stage that bore it
            holders = {store.holders(stages[i])[name] for name in later}
            assert holders == {stages[born].key}
    trunk_names = set(bits[0]) - experts[0]
    moved = {name for name in trunk_names if bits[2][name] != bits[0][name]}
    assert moved == (trunk_names if trunk == "full" else set())
    for i in range(3):
        assert own[i] | set(store.holders(stages[i])) == set(bits[i])
        assert not own[i] & set(store.holders(stages[i]))


def test_only_safetensors_and_json_are_written(lab: Path) -> None:
    write_config(tiny_config())
    train()
    files = [path for path in (lab / "mlruns").rglob("*") if path.is_file() and path.name != ".lock"]
    # What people look at; a command reads no more of it than whether it is of this report.
    shown = {path for path in files if lab / "mlruns/runs/tiny" in path.parents and path.suffix in (".html", ".png")}
    assert shown and {path.suffix for path in {*files} - shown} == {".safetensors", ".json", ".jsonl"}
    for path in (lab / "mlruns/stages").rglob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN and Infinity are no JSON


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    names = ("model.pt", "model.bin", "index.faiss", "model.pkl", "model", "renamed.safetensors")
    write_directory(tmp_path / "bombs", {name: lambda path: path.write_bytes(pickle.dumps(Bomb())) for name in names})
    for name in names:
        with pytest.raises(CorruptError, match="not a safetensors file"):
            load_weights(verify_directory(tmp_path / "bombs"), name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("known_stages")
def test_a_borrowed_tensor_that_is_not_there(lab: Path) -> None:
    write_config(tiny_config())
    report, _ = train()
    first, second = (stage_directory(name) for name in ("fruit", "code"))
    weights = load_file(first / "model.safetensors")
    lost = next(name for name in weights if ".moe.banks." in name)
    del weights[lost]
    save_file(weights, first / "model.safetensors")
    entry = {"bytes": (first / "model.safetensors").stat().st_size}
    entry["sha256"] = file_sha256(first / "model.safetensors")
    manifest = json.loads((first / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = entry
    (first / "manifest.json").write_text(json.dumps(manifest))
    store = StageStore(Path("mlruns"))
    with pytest.raises(CorruptError, match=rf"code-\w+: .*{re.escape(lost)}"):
        load_model(store, store.get(report["stages"][1]["key"]))
    assert second.is_dir()


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the gradient NaN in some steps."""
    from lifelong_moe.training.loop.module import StageModule

    original = StageModule.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        output = original(self, batch, batch_idx)
        if self.trainer.global_step in steps:
            output["loss"] = output["loss"] * float("nan")
            self.means._sums *= float("nan")
        return output

    monkeypatch.setattr(StageModule, "training_step", training_step)


def test_divergence_commits_nothing(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tiny_config())
    poison(monkeypatch, set(range(5, 100)))
    assert exit_code(lambda: train()) == DivergedError.exit_code == 6
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("DivergedError: stage fruit: 3 steps in a row") and "nothing was committed" in last
    assert list((lab / "mlruns/stages").glob("*")) == []


@pytest.mark.parametrize("steps", [{11}, {5, 6, 8, 9}])
def test_single_steps_without_a_finite_gradient_are_skipped(
    lab: Path, monkeypatch: pytest.MonkeyPatch, steps: set[int]
) -> None:
    write_config(tiny_config(("fruit",)))
    poison(monkeypatch, steps)
    report, _ = train()
    assert report["stages"][0]["training"]["nonfinite_steps"] == len(steps)
    weights = load_file(stage_directory("fruit") / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


@pytest.mark.usefixtures("known_stages")
def test_another_vocabulary_than_the_parents_is_refused(lab: Path) -> None:
    train(write_config(tiny_config(("fruit",))))
    given = lab / "given.json"
    shutil.copy(next((lab / "data/cache/tokenizers").glob("*.json")), given)
    config = tiny_config(("fruit",), tokenizer={"file": str(given)})
    with pytest.raises(ConfigError, match="another configuration or other data"):
        train(write_config(config))
    train(write_config(config), "run=given")  # the same text from a file is another recipe
    changed = json.loads(given.read_text())
    changed["model"]["merges"].pop()
    given.write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match="run=given exists with another configuration"):
        train(write_config(config), "run=given")
