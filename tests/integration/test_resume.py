"""Killed at any moment and continued by the same command: the weights of a run that nothing disturbed, bit for bit."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lifelong_moe.errors import TryAgainError
from lifelong_moe.storage import directories
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.callbacks import checkpoint
from lifelong_moe.training.callbacks import progress as callbacks
from lifelong_moe.training.callbacks.energy import EnergyCounter
from lifelong_moe.training.callbacks.progress import StepCheckpoint
from tests.tiny import STEPS, Child, fork, hashes, kill_self, tiny_config, train, write_config, write_corpora

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="autograd does not survive a fork once CUDA is there")

EVEN = {"top_k": 1, "renormalize": False}
MODES: dict[str, dict[str, Any]] = {
    "learned": {"routing": EVEN},
    "embedding": {"routing": {**EVEN, "mode": "cluster", "sample_tokens": 2048}},
    "hidden": {"routing": {**EVEN, "mode": "cluster", "features": "hidden", "sample_tokens": 2048}},
    "document": {
        "routing": {**EVEN, "mode": "cluster", "level": "document", "chunk_tokens": 8, "sample_tokens": 2048},
        "model": {"document_mask": True},
    },
    "label": {"routing": {**EVEN, "mode": "label"}},
    "noisy": {
        "routing": {"mode": "noisy_topk", "top_k": 2, "load_loss": 0.1},
        "model": {"experts": 4},
    },
    "switch": {"routing": {**EVEN, "mode": "switch", "jitter": 0.3, "capacity": {"factor": 1.0}}},
    "biased": {"routing": {**EVEN, "score": "sigmoid", "bias_rate": 0.01}},
    "relu": {"routing": {**EVEN, "mode": "relu"}},
    "bundles": {
        "routing": {**EVEN, "bundles": "cluster", "chunk_tokens": 4, "clusters": 2},
        "model": {"document_mask": True},
        "stage_defaults": {"trunk": {"train": "frozen"}},
    },
    "tied": {"routing": EVEN, "model": {"tie_embeddings": True}},
    "accumulating": {"routing": EVEN, "trainer": {"accumulate_grad_batches": 2}},
    "bf16": {"routing": EVEN, "trainer": {"precision": "bf16-true"}},
    "review": {"routing": EVEN, "stage_defaults": {"review": {"fraction": 0.5}}},
    "ewc": {"routing": EVEN, "method": "ewc", "stage_defaults": {"penalty": {"fisher_tokens": 512}}},
    "generated": {"routing": EVEN, "stage_defaults": {"replay": {"fraction": 0.25, "source": "generated"}}},
    "deltas": {
        "routing": {**EVEN, "bundles": "label"},
        "model": {"document_mask": True},
        "stage_defaults": {"trunk": {"train": "deltas", "rank": 2}},
    },
    "mixture": {  # of which the later one rehearses old text and distils half of its new text
        "routing": EVEN,
        "stages": [
            {"name": "fruit", "data": {"fruit": 0.7, "sea": 0.3}},
            {"name": "code", "data": {"code": 2, "fruit": 1}, "distill": {"text": "new", "fraction": 0.5}},
        ],
    },
    "settling": {  # old experts and router rows stop half way; layer 0 does not grow
        "routing": EVEN,
        "stage_defaults": {
            "grow": {"experts": 2, "sample_tokens": 512, "layers": [1], "old_lr_scale": 0.5, "old_until": 0.5},
            "optim": {"lr": 3.0e-3, "batch_tokens": 128, "schedule": "wsd", "rewarm": 0.5, "router_until": 0.5},
        },
    },
}
Point = tuple[str, str, int]
"""Stage, phase, and the trainer's step in it."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[list[str], dict[str, Any]]]:
    """Hashes and report of a mode's run that nothing disturbed; made once a mode."""
    made: dict[str, tuple[list[str], dict[str, Any]]] = {}

    def of(mode: str) -> tuple[list[str], dict[str, Any]]:
        if mode not in made:
            before, root = os.getcwd(), tmp_path_factory.mktemp(mode)
            os.chdir(root)
            try:
                write_corpora(root)
                report, _ = train(write_config(tiny_config(**MODES[mode])))
                made[mode] = hashes(), report
            finally:
                os.chdir(before)
        return made[mode]

    return of


def at(point: Point, act: Callable[[], object], *, saved: bool) -> None:
    """Make this process act at a step boundary: before its checkpoint, or once that is committed."""
    original = StepCheckpoint.on_train_batch_end

    def on_train_batch_end(
        self: StepCheckpoint, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        here = (pl_module.spec.name, pl_module.phase.name, trainer.global_step) == point
        if here and not saved:
            act()
        original(self, trainer, pl_module, outputs, batch, batch_idx)
        if here and saved:
            act()

    StepCheckpoint.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign]


def killed(point: Point, *, saved: bool = False, config: str = "tiny.yaml") -> Child:
    """A run in a child process that gets SIGKILL at a point."""

    def action() -> None:
        at(point, kill_self, saved=saved)
        train(config)

    child = fork(action)
    assert child.wait() == -signal.SIGKILL, child.output
    return child


def measured(report: dict[str, Any]) -> dict[str, Any]:
    """What of a report must not depend on interruptions: everything but the clock."""
    plain = json.loads(json.dumps(report))
    for stage in plain["stages"]:
        del stage["seconds"], stage["tokens_per_second"], stage["training"]["data_fraction"]
        for key in ("flops_per_second", "energy_joules", "joules_per_token"):
            stage["training"].pop(key, None)
    return plain


@pytest.mark.parametrize(
    ("mode", "point", "saved", "continues"),
    [
        ("learned", ("fruit", "train", 3), False, None),
        ("learned", ("fruit", "train", 8), True, "fruit: continuing from step-0-00000008"),
        ("learned", ("fruit", "train", 12), True, "fruit: continuing from step-0-00000012"),
        ("learned", ("code", "train", 8), False, "code: continuing from step-0-00000004"),
        ("embedding", ("code", "train", 8), True, "code: continuing from step-0-00000008"),
        ("document", ("code", "train", 8), True, "code: continuing from step-0-00000008"),
        ("label", ("code", "train", 6), False, "code: continuing from step-0-00000004"),
        ("noisy", ("code", "train", 6), False, "code: continuing from step-0-00000004"),
        ("switch", ("code", "train", 6), False, "code: continuing from step-0-00000004"),
        ("biased", ("code", "train", 6), False, "code: continuing from step-0-00000004"),
        ("relu", ("code", "train", 6), False, "code: continuing from step-0-00000004"),
        ("bundles", ("code", "train", 8), True, "code: continuing from step-0-00000008"),
        ("tied", ("code", "train", 8), True, "code: continuing from step-0-00000008"),
        ("accumulating", ("code", "train", 6), False, "code: continuing from step-0-00000004"),
        ("bf16", ("code", "train", 6), False, "code: continuing from step-0-00000004"),
        ("review", ("code", "train", 6), True, "code: continuing from step-0-00000004"),
        ("review", ("code", "review", 2), False, "code: continuing from step-0-00000004"),
        ("review", ("code", "review", 5), False, "code: continuing from step-1-00000004"),
        ("ewc", ("code", "train", 6), False, "code: continuing from step-0-00000004"),
        ("generated", ("code", "train", 6), False, "code: continuing from step-0-00000004"),
        ("deltas", ("code", "train", 8), True, "code: continuing from step-0-00000008"),
        ("mixture", ("fruit", "train", 6), False, "fruit: continuing from step-0-00000004"),
        ("mixture", ("code", "train", 8), True, "code: continuing from step-0-00000008"),
        ("settling", ("code", "train", 8), True, "code: continuing from step-0-00000008"),
    ],
)
def test_killed_in_a_stage(
    lab: Path,
    uninterrupted: Callable[[str], tuple[list[str], dict[str, Any]]],
    mode: str,
    point: Point,
    saved: bool,
    continues: str | None,
) -> None:
    expected, expected_report = uninterrupted(mode)
    write_config(tiny_config(**MODES[mode]))
    killed(point, saved=saved)
    report, printed = train()
    assert hashes() == expected
    assert measured(report) == measured(expected_report)
    said = [line for line in printed.splitlines() if "continuing" in line]
    assert said == ([continues] if continues else [])
    assert [path.name for path in (lab / "mlruns/work").iterdir()] == []
    assert list((lab / "mlruns").rglob(".tmp-*")) == []


@pytest.mark.parametrize(
    ("point", "saved", "continues"),
    [
        (("fruit", "hash", 5), False, "fruit: continuing from step-0-00000004"),
        (("fruit", "train", 2), False, "fruit: continuing from step-0-00000004"),
        (("fruit", "train", 4), True, "fruit: continuing from step-1-00000004"),
        (("code", "train", 6), False, "code: continuing from step-0-00000004"),
    ],
)
def test_killed_in_each_phase_of_clusters_of_hidden_states(
    lab: Path,
    uninterrupted: Callable[[str], tuple[list[str], dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    point: Point,
    saved: bool,
    continues: str | None,
) -> None:
    monkeypatch.setattr("lifelong_moe.plan.spec.HASH_WARMUP", 0.5)
    expected, expected_report = uninterrupted("hidden")
    assert expected_report["stages"][0]["training"]["steps"] == STEPS
    write_config(tiny_config(**MODES["hidden"]))
    killed(point, saved=saved)
    report, printed = train()
    assert hashes() == expected
    assert measured(report) == measured(expected_report)
    said = [line for line in printed.splitlines() if "continuing" in line]
    assert said == ([continues] if continues else [])


def test_a_stage_reports_the_time_of_all_its_phases_and_attempts(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lifelong_moe.plan.spec.HASH_WARMUP", 0.5)
    write_config(tiny_config(("fruit",), **MODES["hidden"]))

    def count(joules: int) -> None:
        """Readings of the device's energy, so much apart."""
        read = partial(next, itertools.count(step=joules))
        monkeypatch.setattr(callbacks, "energy_counters", lambda device: [EnergyCounter(read, 1.0)])

    def slow_hashing() -> None:
        count(1000)
        at(("fruit", "hash", 1), lambda: time.sleep(1.0), saved=False)
        at(("fruit", "train", 4), kill_self, saved=True)
        train()

    assert fork(slow_hashing).wait() == -signal.SIGKILL
    count(1)
    report, _ = train()
    stage = report["stages"][0]
    training = stage["training"]
    assert stage["seconds"] > 1.0
    assert stage["tokens_per_second"] == pytest.approx(stage["tokens"] / stage["seconds"])
    assert training["flops_per_second"] == pytest.approx(stage["active_flops"] / stage["seconds"])
    before, since = divmod(training["energy_joules"], 1000)
    assert before >= 2 and since >= 1  # both phases of the killed run, and the one that went on
    assert training["joules_per_token"] == pytest.approx(training["energy_joules"] / stage["tokens"])


def test_killed_between_two_stages_and_twice_in_one(
    lab: Path, uninterrupted: Callable[[str], tuple[list[str], dict[str, Any]]]
) -> None:
    expected, expected_report = uninterrupted("learned")
    write_config(tiny_config(**MODES["learned"]))

    def after_first_commit() -> None:
        commit = StageStore.commit

        def commit_and_die(self: StageStore, *args: Any, **kwargs: Any) -> Any:
            commit(self, *args, **kwargs)
            kill_self()

        StageStore.commit = commit_and_die  # type: ignore[method-assign]
        train()

    assert fork(after_first_commit).wait() == -signal.SIGKILL
    first = next((lab / "mlruns/stages").glob("fruit-*/model.safetensors")).stat()
    killed(("code", "train", 5))
    killed(("code", "train", 7))
    report, printed = train()
    assert next((lab / "mlruns/stages").glob("fruit-*/model.safetensors")).stat() == first
    assert "code: continuing from step-0-00000004" in printed
    assert hashes() == expected
    assert measured(report) == measured(expected_report)
    assert list((lab / "mlruns/work").iterdir()) == []


def test_number_of_data_workers_changes_nothing(
    lab: Path, uninterrupted: Callable[[str], tuple[list[str], dict[str, Any]]]
) -> None:
    expected, expected_report = uninterrupted("learned")
    write_config(tiny_config(**MODES["learned"], trainer={"num_workers": 2}))
    killed(("code", "train", 6))
    report, printed = train()  # at once: orphaned workers of the killed run hold no lock
    assert "code: continuing from step-0-00000004" in printed
    assert hashes() == expected
    assert measured(report) == measured(expected_report)


def terminate() -> None:
    """Ask this process to stop."""
    os.kill(os.getpid(), signal.SIGTERM)


def press_ctrl_c() -> None:
    """What a terminal does: SIGINT to this process, which leads a group of its own, and to all that it started."""
    os.killpg(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("mode", "workers", "ask", "code", "told"),
    [
        ("learned", 0, terminate, TryAgainError.exit_code, "TryAgainError"),
        ("accumulating", 0, terminate, TryAgainError.exit_code, "TryAgainError"),
        ("accumulating", 0, press_ctrl_c, 130, "interrupted"),
        ("learned", 2, press_ctrl_c, 130, "interrupted"),
    ],
    ids=["SIGTERM", "SIGTERM within a step", "Ctrl-C within a step", "Ctrl-C with data workers"],
)
def test_a_signal_checkpoints_and_the_run_continues(
    lab: Path,
    uninterrupted: Callable[[str], tuple[list[str], dict[str, Any]]],
    mode: str,
    workers: int,
    ask: Callable[[], None],
    code: int,
    told: str,
) -> None:
    expected, expected_report = uninterrupted(mode)
    write_config(tiny_config(**MODES[mode]))

    def action() -> None:
        os.setpgid(0, 0)
        start = StepCheckpoint.on_train_batch_start

        def on_train_batch_start(
            self: StepCheckpoint, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            here = (pl_module.spec.name, trainer.global_step) == ("code", 5)
            if here and not self.interrupt.requested:  # with accumulation: in the middle of a step
                ask()
            start(self, trainer, pl_module, batch, batch_idx)

        StepCheckpoint.on_train_batch_start = on_train_batch_start  # type: ignore[method-assign]
        train("tiny.yaml", f"trainer.num_workers={workers}")

    child = fork(action)
    assert child.wait() == code, child.output
    assert "stopping after this step; a second one ends at once" in child.output and "Traceback" not in child.output
    assert child.output.splitlines()[-1] == (
        f"{told}: stopped after step 6, which is checkpointed; run the same command again to continue."
    )
    report, printed = train()
    assert "code: continuing from step-0-00000006" in printed
    assert hashes() == expected
    assert measured(report) == measured(expected_report)


@pytest.mark.parametrize(
    ("owner", "function", "after", "continues"),
    [
        (checkpoint, "write_hashed", False, 4),
        (checkpoint, "write_hashed", True, 4),
        (directories, "_publish", False, 4),
        (directories, "_publish", True, 8),
    ],
    ids=["before its tensors", "after its tensors", "before its name", "after its name"],
)
def test_killed_while_a_checkpoint_is_written(
    lab: Path,
    uninterrupted: Callable[[str], tuple[list[str], dict[str, Any]]],
    owner: Any,
    function: str,
    after: bool,
    continues: int,
) -> None:
    """That of step 8, in the background of training, which has taken step 10 by then: it is there whole or not."""
    write_config(tiny_config(**MODES["learned"]))

    def action() -> None:
        step_10, original, calls = threading.Event(), getattr(owner, function), itertools.count(1)

        def call(*args: Any, **kwargs: Any) -> Any:
            is_second = threading.current_thread().name == checkpoint.WRITER and next(calls) == 2
            result = original(*args, **kwargs) if after or not is_second else None
            if is_second:
                assert step_10.wait(60)
                kill_self()
            return result

        setattr(owner, function, call)
        at(("fruit", "train", 10), step_10.set, saved=False)
        train()

    child = fork(action)
    assert child.wait() == -signal.SIGKILL, child.output
    _, printed = train()
    assert f"fruit: continuing from step-0-{continues:08d}" in printed
    assert hashes() == uninterrupted("learned")[0]
    assert list((lab / "mlruns").rglob(".tmp-*")) == []


def test_sigint_that_was_ignored_stays_ignored(
    lab: Path, uninterrupted: Callable[[str], tuple[list[str], dict[str, Any]]]
) -> None:
    """So nohup and shells without job control start what goes on in the background."""
    write_config(tiny_config(**MODES["learned"]))

    def action() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        at(("fruit", "train", 6), lambda: os.kill(os.getpid(), signal.SIGINT), saved=False)
        train()

    child = fork(action)
    assert child.wait() == 0, child.output
    assert hashes() == uninterrupted("learned")[0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, TryAgainError.exit_code), (signal.SIGINT, 130)])
@pytest.mark.parametrize("function", ["pipelines.run.run.prepare", "pipelines.run.run.build_report"])
def test_a_signal_outside_of_training(
    lab: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: signal.Signals, code: int
) -> None:
    write_config(tiny_config(("fruit",)))
    monkeypatch.setattr(function, lambda *args, **kwargs: os.kill(os.getpid(), number))
    child = fork(train)
    assert child.wait() == code, child.output
    assert "Traceback" not in child.output
    assert child.output.splitlines()[-1].endswith("two steps of work; run the same command again to continue.")
    monkeypatch.undo()
    monkeypatch.chdir(lab)
    train()


def test_sigterm_after_the_last_step_stops_before_the_next_stage(lab: Path) -> None:
    write_config(tiny_config())

    def action() -> None:
        end = StepCheckpoint.on_train_end

        def on_train_end(self: StepCheckpoint, trainer: Any, pl_module: Any) -> None:
            terminate()
            end(self, trainer, pl_module)

        StepCheckpoint.on_train_end = on_train_end  # type: ignore[method-assign]
        train()

    child = fork(action)
    assert child.wait() == TryAgainError.exit_code, child.output
    _, printed = train()
    assert "fruit: continuing from step-0-00000012" in printed


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ((signal.SIGTERM, signal.SIGTERM), TryAgainError.exit_code),
        ((signal.SIGINT, signal.SIGINT), 130),
        ((signal.SIGTERM, signal.SIGINT), 130),
    ],
)
def test_a_second_signal_exits_at_once(lab: Path, signals: tuple[signal.Signals, ...], code: int) -> None:
    write_config(tiny_config(("fruit",)))

    def action() -> None:
        at(("fruit", "train", 6), lambda: [os.kill(os.getpid(), one) for one in signals], saved=False)
        train()

    child = fork(action)
    assert child.wait() == code, child.output
    assert "is checkpointed" not in child.output
    assert [path.name for path in (lab / "mlruns").glob("work/*/step-*")] == ["step-0-00000004"]
    train()
