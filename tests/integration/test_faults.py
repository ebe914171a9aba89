"""What goes wrong while a stage trains: losses, text, disk, memory. What is said, and the bits after it."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lifelong_moe.errors import ConfigError, DivergedError, ResourceError, TryAgainError
from lifelong_moe.storage import directories
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.callbacks.progress import StepCheckpoint
from lifelong_moe.training.loop import guard, rollback
from lifelong_moe.training.loop.module import StageModule
from pipelines.cli import exit_code
from tests.records import METRICS, made_record
from tests.tiny import CONTEXT, SEQUENCES, STEPS, VOCABULARIES, hashes, tiny_config, train, write_config, write_corpus

Batch = dict[str, torch.Tensor]
BEST_ROUTING = {"top_k": 1, "renormalize": False}


def before_each_micro_batch(monkeypatch: pytest.MonkeyPatch, look: Callable[[StageModule, Batch], float]) -> None:
    """Look at each micro-batch; its loss is multiplied by what is returned."""
    original = StageModule.training_step

    def training_step(self: Any, batch: Batch, batch_idx: int) -> Any:
        factor, cross_entropy = look(self, batch), self.model.head.cross_entropy
        with monkeypatch.context() as patch:
            if factor != 1:
                patch.setattr(self.model.head, "cross_entropy", lambda *args: factor * cross_entropy(*args))
            return original(self, batch, batch_idx)

    monkeypatch.setattr(StageModule, "training_step", training_step)


def batch_number(batch: Batch) -> int:
    """Of a stage without replay: its samples count from 0."""
    return int(batch["ordinal"][0]) // SEQUENCES


class Bad:
    """Batches of stage ``fruit`` whose loss is multiplied; remembers at which step which batch was read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, numbers: set[int], factor: float = float("nan")) -> None:
        self.read: list[tuple[int, int]] = []

        def look(module: StageModule, batch: Batch) -> float:
            number = batch_number(batch)
            self.read.append((module.global_step, number))
            return factor if number in numbers else 1.0

        before_each_micro_batch(monkeypatch, look)


def stop_once(monkeypatch: pytest.MonkeyPatch, step: int, *, rollbacks: int = 0, saved: bool = True) -> None:
    """Let training stop after a step, the first time it gets there: with a checkpoint, as on SIGTERM, or without."""
    original = StepCheckpoint.on_train_batch_end
    done: list[int] = []

    def on_train_batch_end(self: Any, trainer: Any, *args: Any) -> None:
        here = trainer.global_step == step and rollback.read_rollbacks(self.work).count == rollbacks
        if here and not done:
            done.append(step)
            if not saved:
                raise TryAgainError("stopped by the test")
            self.interrupt.requested = True
        original(self, trainer, *args)

    monkeypatch.setattr(StepCheckpoint, "on_train_batch_end", on_train_batch_end)


def training(report: dict[str, Any], index: int = 0) -> dict[str, Any]:
    return report["stages"][index]["training"]


# Rows 15 and 16: losses


def test_three_bad_steps_roll_back_past_the_text_read_since(
    lab: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad = Bad(monkeypatch, {5, 6, 7})
    report, printed = train(write_config(tiny_config(("fruit",))))
    # Steps 5, 6 and 7 were bad, so training returned to step 4, and past batches 4 to 7.
    assert bad.read == [(n, n) for n in range(8)] + [(n, n + 4) for n in range(4, STEPS)]
    assert "fruit: continuing from step-0-00000004" in printed
    said = [record.getMessage() for record in caplog.records if record.name.startswith("lifelong_moe.training")]
    assert len(said) == 4 and all("loss or gradient is not finite; step skipped" in line for line in said[:3])
    assert "rolling back to step 4, skipping the 4 batches read since" in said[3]
    measured = training(report)
    assert (measured["rollbacks"], measured["nonfinite_steps"], measured["skipped_spikes"]) == (1, 3, 0)
    weights = next((lab / "mlruns/stages").glob("fruit-*/model.safetensors"))
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(weights).values())
    assert list((lab / "mlruns/work").iterdir()) == []


def test_without_a_checkpoint_the_stage_begins_again(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Bad(monkeypatch, {0, 1, 2})
    report, printed = train(write_config(tiny_config(("fruit",))))
    assert bad.read == [(n, n) for n in range(3)] + [(n, n + 3) for n in range(STEPS)]
    assert "continuing" not in printed and training(report)["rollbacks"] == 1


@pytest.mark.parametrize(
    ("keep", "stop"),
    [
        (2, {"step": 6}),  # a checkpoint among the bad steps, to which no rollback returns
        (1, {"step": 7}),  # the same, and the checkpoint that it does return to is gone for it
        (2, {"step": 6, "rollbacks": 1, "saved": False}),  # rolled back, and nothing saved since
        (1, {"step": 8, "rollbacks": 1}),
        (2, {"step": 9, "rollbacks": 1}),
        (1, {"step": 11, "rollbacks": 2, "saved": False}),
    ],
)
def test_interrupted_around_a_rollback(
    lab: Path, monkeypatch: pytest.MonkeyPatch, keep: int, stop: dict[str, Any]
) -> None:
    bad = {5, 6, 7, 12, 13, 14}
    config = tiny_config(("fruit",), checkpoint={"every_steps": 4, "keep": keep})
    with monkeypatch.context() as patch:
        Bad(patch, bad)
        train(write_config(config), "run=straight")
    expected = hashes(run_name="straight")
    shutil.rmtree("mlruns")
    with monkeypatch.context() as patch:
        Bad(patch, bad)
        stop_once(patch, **stop)
        with pytest.raises(TryAgainError):
            train()
        report, _ = train()
    assert hashes() == expected
    measured = training(report)
    assert (measured["rollbacks"], measured["nonfinite_steps"]) == (2, 6)


def test_stopped_between_the_two_acts_of_a_rollback(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: Any) -> None:
        raise TryAgainError("stopped by the test")

    write_config(tiny_config(("fruit",)))
    with monkeypatch.context() as patch:
        Bad(patch, {5, 6, 7})
        train("tiny.yaml", "run=straight")
        expected = hashes(run_name="straight")
        shutil.rmtree("mlruns")
        with patch.context() as inner:
            inner.setattr(rollback, "write_atomic", stopped)
            with pytest.raises(TryAgainError):
                train()
        report, _ = train()
    assert hashes() == expected and training(report)["rollbacks"] == 1


def test_a_phase_that_goes_on_in_the_order_reads_nothing_twice(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lifelong_moe.plan.spec.HASH_WARMUP", 0.5)
    routing = {**BEST_ROUTING, "mode": "cluster", "features": "hidden", "sample_tokens": 2048}
    bad = Bad(monkeypatch, {2, 3, 4})  # in the first of two phases
    train(write_config(tiny_config(("fruit",), routing=routing)))
    assert [number for _, number in bad.read] == list(range(5 + STEPS))


def test_a_bad_half_of_a_step_counts_once(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(1000))
    before_each_micro_batch(monkeypatch, lambda module, batch: float("inf") if next(numbers) == 5 else 1.0)
    config = tiny_config(("fruit",), trainer={"accumulate_grad_batches": 2})
    report, _ = train(write_config(config))
    assert training(report)["nonfinite_steps"] == 1


def test_a_stage_that_diverges_again_and_again_ends(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Bad(monkeypatch, set(range(5, 1000)))
    write_config(tiny_config(("fruit",)))
    assert exit_code(lambda: train()) == DivergedError.exit_code == 6
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("DivergedError: stage fruit: 3 steps in a row") and "after 2 rollbacks" in last
    # From step 4 past batch 7; from step 0 past batch 10, as the checkpoint at step 4 is under suspicion by then.
    assert [number for _, number in bad.read] == list(range(14))
    assert [step for step, _ in bad.read] == [*range(8), 4, 5, 6, 0, 1, 2]
    assert list((lab / "mlruns/stages").glob("*")) == []
    assert exit_code(lambda: train()) == 6  # and again the next time, at once
    assert len(bad.read) == 17


def test_a_spike_is_skipped_and_the_window_survives_interruption(
    lab: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guard, "MIN_LOSSES", 5)
    write_config(tiny_config(("fruit",)))
    with monkeypatch.context() as patch:
        Bad(patch, {6}, factor=5.0)
        report, _ = train("tiny.yaml", "run=straight")
    assert training(report)["skipped_spikes"] == 1 and training(report)["nonfinite_steps"] == 0
    assert [line for line in caplog.messages if "stage fruit, step 6: loss jumped to" in line]
    expected, clean = hashes(run_name="straight"), set()
    shutil.rmtree("mlruns")
    with monkeypatch.context() as patch:
        Bad(patch, {6}, factor=5.0)
        stop_once(patch, 5)
        with pytest.raises(TryAgainError):
            train()
        again, _ = train()
        assert hashes() == expected and training(again)["skipped_spikes"] == 1
    shutil.rmtree("mlruns")
    for factor in (7.0, float("nan")):  # how high it jumped is of no consequence
        with monkeypatch.context() as patch:
            Bad(patch, {6}, factor=factor)
            train()
            clean.update(hashes())
        shutil.rmtree("mlruns")
    assert clean == set(expected)


def test_a_spike_moves_neither_weights_nor_moments(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MIN_LOSSES", 5)
    seen: dict[int, list[torch.Tensor]] = {}
    original = StepCheckpoint.on_train_batch_end

    def on_train_batch_end(self: Any, trainer: Any, module: Any, *args: Any) -> None:
        state = trainer.optimizers[0].state.values()
        tensors = [*module.model.parameters(), *(moment for one in state for moment in one.values())]
        seen[trainer.global_step] = [tensor.detach().clone() for tensor in tensors]
        original(self, trainer, module, *args)

    monkeypatch.setattr(StepCheckpoint, "on_train_batch_end", on_train_batch_end)
    Bad(monkeypatch, {6}, factor=5.0)
    train(write_config(tiny_config(("fruit",))))
    same = {step for step in range(2, STEPS + 1) if all(map(torch.equal, seen[step], seen[step - 1]))}
    assert same == {7}


# Rows 12 and 13: text


def blocks_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, bytes]]:
    """Stage, step and token ids of each sample from now on."""
    read: list[tuple[str, int, bytes]] = []

    def look(module: StageModule, batch: Batch) -> float:
        rows = [row.numpy().tobytes() for row in batch["token_ids"]]
        read.extend((module.spec.name, module.global_step, row) for row in rows)
        return 1.0

    before_each_micro_batch(monkeypatch, look)
    return read


def test_the_same_samples_and_bits_for_any_number_of_data_workers(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, seen, weights = blocks_read(monkeypatch), [], []
    for workers in (0, 2):
        train(write_config(tiny_config(trainer={"num_workers": workers})))
        seen.append(read.copy())
        weights.append(hashes())
        read.clear()
        shutil.rmtree("mlruns")
    assert seen[0] == seen[1] and len(seen[0]) == 2 * STEPS * SEQUENCES
    assert weights[0] == weights[1]


@pytest.mark.parametrize("past", [0, 1])
def test_resuming_at_the_end_of_an_epoch_drops_nothing_and_repeats_nothing(
    lab: Path, monkeypatch: pytest.MonkeyPatch, past: int
) -> None:
    write_corpus(lab / "fruit.jsonl", VOCABULARIES["fruit"].split(), seed=0, documents=14)
    config = tiny_config(("fruit",), checkpoint={"every_steps": 1})
    config["stage_defaults"] |= {"tokens": 30 * CONTEXT, "optim": {"lr": 3e-3, "batch_tokens": CONTEXT}}
    write_config(config)
    read = blocks_read(monkeypatch)
    train("tiny.yaml", "run=straight")
    expected, weights = read.copy(), hashes(run_name="straight")
    size = len({block for _, _, block in expected})  # a step reads one block, so an epoch ends with a step
    assert 10 <= size < 30
    read.clear()
    shutil.rmtree("mlruns")
    stop_once(monkeypatch, size + past)
    with pytest.raises(TryAgainError):
        train()
    assert len(read) == size + past
    train()
    assert read == expected and hashes() == weights
    assert set(Counter(block for _, _, block in read[:size]).values()) == {1}
    assert len({block for _, _, block in read[size : 2 * size]}) == min(size, 30 - size)


# Row 14: other text


def test_other_text_under_the_same_name_is_refused_with_both_fingerprints(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tiny_config())
    with monkeypatch.context() as patch:
        stop_once(patch, 8)
        with pytest.raises(TryAgainError):
            train()
    before = json.loads((lab / "mlruns/runs/tiny/head.json").read_text())["data"]
    with (lab / "fruit.jsonl").open("a") as file:
        file.write('{"text": "a pear that nobody picked yet"}\n')
    files = sorted(path for path in Path("mlruns").rglob("*") if path.is_file())
    assert exit_code(lambda: train()) == ConfigError.exit_code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "ConfigError" in line]
    assert files == sorted(path for path in Path("mlruns").rglob("*") if path.is_file())
    read = blocks_read(monkeypatch)
    _, printed = train(replace=True)
    assert "continuing" not in printed and read[0][:2] == ("fruit", 0)  # the other text's checkpoint is none of its own
    after = json.loads((lab / "mlruns/runs/tiny/head.json").read_text())["data"]
    assert set(before) == set(after) == {"fruit", "code"} and before["code"] == after["code"]
    assert f"other training text: fruit was {before['fruit'][:16]} and is {after['fruit'][:16]} (SHA-256)" in line
    assert "code" not in line and "--replace" in line


# Rows 9 and 10: disk and memory


def contents() -> dict[Path, bytes]:
    """Everything under ``mlruns`` but the locks."""
    return {path: path.read_bytes() for path in Path("mlruns").rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_run_that_cannot_fit_writes_nothing(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    write_config(tiny_config())
    assert exit_code(lambda: train()) == ResourceError.exit_code == 8
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ResourceError: run=tiny needs up to ") and "mlruns has 0.1 MB free" in last
    assert not Path("mlruns").exists()


def test_a_stage_that_cannot_fit_leaves_those_before_it(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tiny_config())
    train(write_config(tiny_config(("fruit",)), "one.yaml"))
    before = contents()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
        assert exit_code(lambda: train()) == 8
        train("one.yaml")  # what is committed needs no room
    assert "ResourceError: stage code needs up to " in capsys.readouterr().err
    assert contents() == before
    train()


def test_room_that_goes_while_a_run_is_under_way(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tiny_config())

    def usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(free=100_000 if list(Path("mlruns/stages").glob("fruit-*")) else 10**9)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", usage)
        with pytest.raises(ResourceError, match=r"^stage code needs up to"):
            train()
    assert len(hashes()) == 1 and not list(Path("mlruns/stages").glob("code-*"))
    assert not list(Path("mlruns/work").iterdir())
    train()


def test_what_a_stopped_stage_has_written_is_its_own(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tiny_config(("fruit",)))
    with monkeypatch.context() as patch:
        stop_once(patch, 8)
        with pytest.raises(TryAgainError):
            train()
    written = sum(path.stat().st_size for path in Path("mlruns/work").rglob("*") if path.is_file())
    assert written > 0
    needed: list[int] = []
    monkeypatch.setattr("pipelines.shared.workspace.require_space", lambda root, need, what: needed.append(need))
    train()
    whole = needed.copy()
    needed.clear()
    shutil.rmtree("mlruns")
    train()
    assert [more - less for more, less in zip(needed, whole, strict=True)] == [written, written]


OPERATIONS = [
    (os, "rename"),
    (os, "fsync"),
    (Path, "mkdir"),
    (Path, "write_text"),
    (Path, "chmod"),
    (safetensors.torch, "save_file"),
]
"""All that a commit does to the disk."""


def fill_disk_at(patch: pytest.MonkeyPatch, number: int) -> list[str]:
    """From operation ``number`` on the disk is full; returns the names of those asked for."""
    asked: list[str] = []

    def full(owner: Any, name: str) -> Callable[..., Any]:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            asked.append(name)
            if len(asked) <= number:
                return original(*args, **kwargs)
            if name == "save_file":  # which knows no OSError
                args[1].write_bytes(b"the beginning of a file")
                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
            raise OSError(errno.ENOSPC, "No space left on device")

        return call

    for owner, name in OPERATIONS:
        patch.setattr(owner, name, full(owner, name))
    return asked


def test_a_disk_that_fills_at_any_operation_of_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = StageStore(tmp_path)
    tensors = {"w": torch.ones(3)}
    old = stages.commit(made_record("a" * 64, "old"), METRICS, tensors)
    bytes_before = (old.path / "model.safetensors").read_bytes()
    failed = []
    for number in range(100):
        fresh = StageStore(tmp_path)
        with monkeypatch.context() as patch:
            asked = fill_disk_at(patch, number)
            try:
                fresh.commit(made_record("b" * 64, "new"), METRICS, tensors, "tokenizer")
                break
            except ResourceError as error:
                failed.append(asked[-1])
                assert "no space left on the disk" in str(error) and "\n" not in str(error)
            except OSError as error:  # before anything is made: the command line says the same
                failed.append(asked[-1])
                assert number == 0 and error.errno == errno.ENOSPC
        found = StageStore(tmp_path).find("b" * 64)  # verified
        assert found is None or "rename" in asked[:-1]
        assert StageStore(tmp_path).get("a" * 64).weights_hash == old.weights_hash
        assert (old.path / "model.safetensors").read_bytes() == bytes_before
        assert list((tmp_path / "stages").glob(".tmp-*")) == []
        if found is not None:
            shutil.rmtree(found.path)
    # The folder of stages is there: the one that is made is the half-written stage.
    assert Counter(failed) >= Counter(mkdir=1, save_file=1, write_text=4, chmod=4, fsync=7, rename=1)
    assert StageStore(tmp_path).get("b" * 64).name == "new"


@pytest.mark.parametrize(("failing", "heard"), [(1, 8), (3, 12)])
def test_a_disk_that_fills_while_a_checkpoint_is_written(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failing: int, heard: int
) -> None:
    """Heard of at the next checkpoint, or at the end; those before it stay."""
    write_config(tiny_config(("fruit",)))
    calls, steps, original, end = (
        itertools.count(1),
        list[int](),
        directories._publish,
        StepCheckpoint.on_train_batch_end,
    )

    def publish(work: Path, target: Path) -> None:
        if target.name.startswith("step-") and next(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(work, target)

    def on_train_batch_end(self: StepCheckpoint, trainer: Any, *args: Any) -> None:
        steps.append(trainer.global_step)
        end(self, trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(directories, "_publish", publish)
        patch.setattr(StepCheckpoint, "on_train_batch_end", on_train_batch_end)
        assert exit_code(lambda: train()) == ResourceError.exit_code == 8
    assert "no space left on the disk" in capsys.readouterr().err.splitlines()[-1]
    assert steps[-1] == heard
    assert len(list((lab / "mlruns").glob("work/*/step-*"))) == failing - 1
    assert list((lab / "mlruns").rglob(".tmp-*")) == []
    _, printed = train()
    assert ("continuing from step-0-00000008" in printed) == (failing == 3)


def exhaust_device() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has 8 GiB.")


HALVE = "Set trainer.accumulate_grad_batches=2, which leaves the global batch at 4 sequences."


@pytest.mark.parametrize(
    ("accumulate", "sequences", "remedy", "exhaust"),
    [
        (1, 4, HALVE, exhaust_device),
        (4, 1, "Set model.context or the model's size lower.", exhaust_device),
        (1, 4, HALVE, lambda: torch.empty(1 << 50)),
        (1, 4, HALVE, lambda: np.empty(1 << 50)),
    ],
    ids=["device", "device, one sequence", "CPU", "CPU, NumPy"],
)
def test_out_of_memory_says_what_was_asked_for(
    lab: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    accumulate: int,
    sequences: int,
    remedy: str,
    exhaust: Callable[[], object],
) -> None:
    sizes = []

    def look(module: StageModule, batch: Batch) -> float:
        sizes.append(len(batch["token_ids"]))
        if module.global_step == 5:
            exhaust()
        return 1.0

    before_each_micro_batch(monkeypatch, look)
    write_config(tiny_config(("fruit",), trainer={"accumulate_grad_batches": accumulate}))
    assert exit_code(lambda: train()) == ResourceError.exit_code == 8
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line == (
        f"ResourceError: stage fruit: the device ran out of memory on micro-batches of {sequences} sequences of "
        f"context {CONTEXT}; nothing was committed. {remedy}"
    )
    assert set(sizes) == {sequences} and len(sizes) == 5 * accumulate + 1  # tried once, never with another batch
    assert [path.name for path in Path("mlruns").glob("work/*/step-*")] == ["step-0-00000004"]
