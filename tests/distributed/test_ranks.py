"""Two gloo processes take training steps; everything else stays with the main process, whatever happens to them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lifelong_moe.errors import ConfigError, DataError, ResourceError, TryAgainError
from lifelong_moe.evaluation.measurements import Measurements
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training import stage as training_stage
from lifelong_moe.training.callbacks import checkpoint
from lifelong_moe.training.loop import module as training_module
from lifelong_moe.training.loop.module import StageModule
from lifelong_moe.training.loop.phase import train_phase
from lifelong_moe.training.loop.rollback import read_rollbacks
from lifelong_moe.training.ranks import supervise
from pipelines.run.record import MlflowRecord
from tests.forked import ForkedProcess, run_forked
from tests.tiny import (
    EVERY,
    SEQUENCES,
    STEPS,
    fork,
    hashes,
    kill_self,
    tiny_config,
    train,
    wait_for_checkpoint,
    write_config,
    write_corpora,
)

pytestmark = pytest.mark.usefixtures("forked")

DELTAS: dict[str, Any] = {
    "routing": {"top_k": 1, "renormalize": False, "bundles": "label"},
    "model": {"document_mask": True},
}
Step = Callable[[StageModule, dict[str, torch.Tensor]], None]


def configure(stages: tuple[str, ...] = ("fruit", "code"), mode: dict[str, Any] | None = None, **trainer: Any) -> str:
    """Write a configuration of two processes, unless ``devices`` says otherwise."""
    config = tiny_config(stages, trainer={"devices": 2, **trainer}, **(mode or {}))
    if mode:
        config["stage_defaults"]["trunk"] = {"train": "deltas", "rank": 2}
    return write_config(config)


def weights(run: str) -> list[dict[str, torch.Tensor]]:
    """What a run's stages committed, what they borrow included."""
    head, store = json.loads(Path(f"mlruns/runs/{run}/head.json").read_text()), StageStore(Path("mlruns"))
    return [store.tensors(store.get(key)) for key in head["stages"]]


def before_each_micro_batch(monkeypatch: pytest.MonkeyPatch, act: Step) -> None:
    original = StageModule.training_step

    def training_step(self: StageModule, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
        act(self, batch)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(StageModule, "training_step", training_step)


def at(monkeypatch: pytest.MonkeyPatch, rank: int, act: Callable[[], object], step: int = 5) -> None:
    """Let a rank act before a step of stage ``fruit``."""

    def look(module: StageModule, batch: dict[str, torch.Tensor]) -> None:
        if (module.spec.name, module.global_step, dist.get_rank()) == ("fruit", step, rank):
            act()

    before_each_micro_batch(monkeypatch, look)


def note(name: str, text: str) -> None:
    """Append a line to a file, from any process."""
    with Path(name).open("a") as file:
        file.write(f"{text}\n")


def gone(pid: int) -> bool:
    """Whether a process is no more, or a zombie that nobody has buried yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def no_children() -> bool:
    """Whether this process has no child, alive or unburied, but such as has a group of its own: a server of others."""
    try:
        return os.waitpid(0, os.WNOHANG) is None
    except ChildProcessError:
        return True


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Hashes of a run of two processes that nothing disturbed."""
    root = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervise, "Popen", ForkedProcess)
        patch.chdir(root)
        write_corpora(root)
        configure(("fruit",))
        train()
        return hashes()


@pytest.mark.parametrize(
    ("mode", "accumulate"), [(None, 1), (DELTAS, 1), (DELTAS, 2)], ids=["learned", "deltas", "deltas-accumulating"]
)
def test_two_processes_do_what_one_does(lab: Path, mode: dict[str, Any] | None, accumulate: int) -> None:
    # The same gradients but for the order in which they are added: rounding of float32, some 1e-7 a step, which AdamW
    # makes more of where a gradient is almost 0, in single numbers. (In float64: test_division.py.)
    report, _ = train(configure(mode=mode, accumulate_grad_batches=accumulate))
    found = weights("tiny")
    shutil.rmtree("mlruns")
    expected, _ = train(configure(mode=mode, devices=1, accumulate_grad_batches=accumulate))
    assert [stage["key"] for stage in report["stages"]] == [stage["key"] for stage in expected["stages"]]
    for two, one in zip(found, weights("tiny"), strict=True):
        assert two.keys() == one.keys()
        differences = torch.cat([(two[name] - one[name]).flatten() for name in two])
        assert float(differences.norm() / torch.cat([one[name].flatten() for name in one]).norm()) < 1e-5
    for ours, theirs in zip(report["loss_nats_per_token"], expected["loss_nats_per_token"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_processes_share_the_loads_that_biases_move_by(lab: Path) -> None:
    overrides = ("model.experts=5", "routing.score=sigmoid", "routing.bias_rate=0.01")
    train(configure(("fruit",)), *overrides, "routing.balance_loss=0")
    train(configure(("fruit",), devices=1), *overrides, "routing.balance_loss=0", "run=one")
    (two,), (one,) = weights("tiny"), weights("one")
    biases = [name for name in two if "bias_" in name]
    assert biases and all(bool(two[name].any()) for name in biases)
    for name in biases:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=0.0201)  # a sign may turn where loads are even
        assert float((two[name] == one[name]).float().mean()) > 0.5


def test_keys_do_not_know_the_number_of_processes(lab: Path) -> None:
    two, _ = train(configure())
    again, printed = train(configure(devices=1))
    assert "Nothing to train" in printed and hashes() == [stage["weights_sha256"] for stage in two["stages"]]
    one, _ = train(configure(devices=1), "seed=0", "run=other", "trainer.accumulate_grad_batches=2")
    # Another division into micro-batches, for each of which there is a balance loss: close, but not the same.
    for a, b in zip(again["loss_nats_per_token"], one["loss_nats_per_token"], strict=True):
        assert a == pytest.approx(b, abs=0.05)


def test_only_steps_are_taken_elsewhere(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def noting(what: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            note("log", f"{what} {os.getpid()}")
            return original(*args, **kwargs)

        return noted

    for owner, name in (
        (StageStore, "commit"), (Measurements, "evaluations"), (MlflowRecord, "curves"), (StageModule, "training_step"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, noting(name, getattr(owner, name)))
    monkeypatch.setattr("lifelong_moe.training.stage.locked", noting("lock", training_stage.locked))
    train(configure())
    seen: dict[str, Counter[int]] = {}
    for line in Path("log").read_text().splitlines():
        what, pid = line.split()
        seen.setdefault(what, Counter())[int(pid)] += 1
    steps = seen.pop("training_step")
    assert sorted(steps.values()) == [STEPS] * 4 and os.getpid() not in steps  # two processes for each stage
    assert seen["commit"] == {os.getpid(): 2} and seen["evaluations"] == {os.getpid(): 3}
    assert set(seen) == {"commit", "evaluations", "curves", "lock"}
    assert {pid for pids in seen.values() for pid in pids} == {os.getpid()}


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # more than there are cores
def test_the_same_samples_in_the_same_steps(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(module: StageModule, batch: dict[str, torch.Tensor]) -> None:
        for row in batch["token_ids"]:
            note("log", f"{module.spec.name} {module.global_step} {hashlib.sha256(row.numpy().tobytes()).hexdigest()}")

    before_each_micro_batch(monkeypatch, look)
    read = []
    for processes, workers in ((1, 0), (1, 2), (1, 4), (2, 0), (2, 2)):
        train(configure(devices=processes, num_workers=workers))
        read.append(sorted(Path("log").read_text().splitlines()))
        Path("log").unlink()
        shutil.rmtree("mlruns")
    assert len(read[0]) == 2 * STEPS * SEQUENCES
    assert all(one == read[0] for one in read)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_all(
    lab: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: list[str], rank: int
) -> None:
    configure(("fruit",))
    with monkeypatch.context() as patch:
        at(patch, rank, lambda: (wait_for_checkpoint(EVERY), kill_self()))  # rank 0's, in the background
        began = time.monotonic()
        with pytest.raises(TryAgainError, match=rf"^training process {rank} of 2 was ended by SIGKILL; .*continue"):
            train()
        assert time.monotonic() - began < 10
    assert no_children() and list(lab.glob("mlruns/stages/*")) == []
    _, printed = train()
    assert f"fruit: continuing from step-0-{EVERY:08d}" in printed
    assert hashes() == uninterrupted
    assert list(lab.glob("mlruns/work/*")) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_ends_all(
    lab: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: list[str], rank: int
) -> None:
    configure(("fruit",))
    with monkeypatch.context() as patch:
        patch.setattr(supervise, "TIMEOUT_SECONDS", 2.0)
        patch.setattr(supervise, "GRACE_SECONDS", 0.2)
        at(patch, rank, lambda: os.kill(os.getpid(), signal.SIGSTOP))
        with pytest.raises(TryAgainError, match=rf"^training process {rank} of 2 did not answer .* within 2 s; "):
            train()
    assert no_children() and list(lab.glob("mlruns/stages/*")) == []
    train()
    assert hashes() == uninterrupted


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_when_the_other_has_ended_ends_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr(supervise, "TIMEOUT_SECONDS", 2.0)
    with pytest.raises(TryAgainError, match=rf"^training process {rank} of 2 did not answer .* within 2 s; "):
        run_forked(2, lambda here: wait_for_ever() if here == rank else None, tmp_path)
    assert no_children()


def test_a_rank_without_memory_ends_all(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(("fruit",))
    at(monkeypatch, 1, lambda: torch.empty(1 << 60, dtype=torch.uint8))  # more than any machine has
    with pytest.raises(
        ResourceError, match=r"^stage fruit: the device ran out of memory on micro-batches of"
    ) as caught:
        train()
    assert caught.value.exit_code == 8 and no_children() and list(lab.glob("mlruns/stages/*")) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_while_a_checkpoint_is_written_leaves_the_one_before(
    lab: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: list[str], rank: int
) -> None:
    calls: list[None] = []
    # The first writes, the second only takes part.
    owner, name = [(checkpoint, "_write"), (training_module, "random_states")][rank]
    original = getattr(owner, name)

    def act(*args: Any) -> Any:
        calls.append(None)
        if dist.get_rank() == rank and len(calls) == 2:
            kill_self()
        return original(*args)

    configure(("fruit",))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, act)
        with pytest.raises(TryAgainError, match=rf"^training process {rank} of 2 was ended by SIGKILL"):
            train()
    _, printed = train()
    assert f"fruit: continuing from step-0-{EVERY:08d}" in printed and hashes() == uninterrupted


def ask_to_stop(pid: int, number: int = signal.SIGTERM) -> None:
    """Send a signal, and wait until this rank has the request too."""
    os.kill(pid, number)
    began = time.monotonic()
    while signal.SIGTERM not in signal.sigpending() and time.monotonic() - began < 10:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("whom", "number", "code", "told"),
    [
        (os.getppid, signal.SIGTERM, TryAgainError.exit_code, "TryAgainError"),
        (os.getppid, signal.SIGINT, 130, "interrupted"),
        (os.getpid, signal.SIGTERM, TryAgainError.exit_code, "TryAgainError"),
    ],
    ids=["the main process", "the main process, by Ctrl-C", "a rank"],
)
def test_a_signal_checkpoints_all_ranks_at_the_same_step(
    lab: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: list[str],
    whom: Callable[[], int],
    number: signal.Signals,
    code: int,
    told: str,
) -> None:
    configure(("fruit",))
    with monkeypatch.context() as patch:
        at(patch, 1, lambda: ask_to_stop(whom(), number))
        child = fork(train)
        assert child.wait() == code, child.output
    assert child.output.splitlines()[-1] == (
        f"{told}: stopped after step 6, which is checkpointed; run the same command again to continue."
    )
    _, printed = train()
    assert "fruit: continuing from step-0-00000006" in printed
    assert hashes() == uninterrupted


def test_a_rank_that_stops_does_not_end_one_that_still_writes(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = checkpoint.write_hashed

    def slowly(*args: Any) -> Any:
        time.sleep(20 * supervise.GRACE_SECONDS)
        return original(*args)

    configure(("fruit",))
    monkeypatch.setattr(supervise, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(checkpoint, "write_hashed", slowly)
    at(monkeypatch, 1, lambda: ask_to_stop(os.getppid()))
    assert fork(train).wait() == TryAgainError.exit_code
    assert list(Path("mlruns").glob("work/*/step-0-00000006/manifest.json"))


def test_ranks_draw_numbers_of_their_own_and_go_on_with_them(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = {"top_k": 1, "renormalize": False, "jitter": 0.3}
    write_config(tiny_config(("fruit",), routing=noisy, trainer={"devices": 2}))

    def look(module: StageModule, batch: dict[str, torch.Tensor]) -> None:
        drawn = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        note("drawn", f"{dist.get_rank()} {module.global_step} {drawn}")

    with monkeypatch.context() as patch:
        before_each_micro_batch(patch, look)
        train("tiny.yaml", "run=whole")
    whole = {line.rpartition(" ")[0]: line for line in Path("drawn").read_text().splitlines()}
    assert len(whole) == 2 * STEPS == len({line.split()[2] for line in whole.values()})
    expected = hashes(run_name="whole")
    for kept in (*Path("mlruns/stages").glob("fruit-*"), Path("mlruns/runs/whole")):
        shutil.rmtree(kept)
    with monkeypatch.context() as patch:
        at(patch, 1, lambda: ask_to_stop(os.getppid()))
        assert fork(train).wait() == TryAgainError.exit_code
    Path("drawn").unlink()
    with monkeypatch.context() as patch:
        before_each_micro_batch(patch, look)
        _, printed = train()
    assert "fruit: continuing from step-0-00000006" in printed and hashes() == expected
    again = {line.rpartition(" ")[0]: line for line in Path("drawn").read_text().splitlines()}
    assert len(again) == 2 * (STEPS - 6) and again.items() <= whole.items()


@pytest.mark.parametrize("draws", [False, True], ids=["nothing is drawn", "each rank draws"])
def test_another_number_of_ranks_goes_on_unless_they_draw(
    lab: Path, monkeypatch: pytest.MonkeyPatch, draws: bool
) -> None:
    noisy = {"top_k": 1, "renormalize": False, "jitter": 0.3}
    write_config(tiny_config(("fruit",), **({"routing": noisy} if draws else {})))

    def stop(module: StageModule, batch: dict[str, torch.Tensor]) -> None:
        if module.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        before_each_micro_batch(patch, stop)
        assert fork(train).wait() == TryAgainError.exit_code
    if draws:  # another number of ranks is another stage
        with pytest.raises(ConfigError, match="exists with another configuration"):
            train("tiny.yaml", "trainer.devices=2")
        return
    report, printed = train("tiny.yaml", "trainer.devices=2")
    assert "fruit: continuing from step-0-00000006" in printed and len(report["stages"]) == 1


def wait_for_ever() -> None:
    time.sleep(60)


def end_main(*signals: signal.Signals) -> None:
    """Send signals to the main process and wait for the end."""
    note("log", str(os.getpid()))
    for one in signals:
        os.kill(os.getppid(), one)
        time.sleep(0.3)
    wait_for_ever()


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ((signal.SIGTERM, signal.SIGTERM), TryAgainError.exit_code),
        ((signal.SIGKILL,), -signal.SIGKILL),
        ((signal.SIGINT, signal.SIGINT), 130),
    ],
    ids=["a second SIGTERM", "SIGKILL", "a second Ctrl-C"],
)
def test_ranks_end_with_the_main_process(
    lab: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: list[str], signals: tuple[signal.Signals], code: int
) -> None:
    configure(("fruit",))
    with monkeypatch.context() as patch:
        at(patch, 0, lambda: end_main(*signals))
        at(patch, 1, lambda: (note("log", str(os.getpid())), wait_for_ever()))
        child = fork(train)
        assert child.wait() == code, child.output
    pids = [int(line) for line in Path("log").read_text().splitlines()]
    began = time.monotonic()
    while not all(map(gone, pids)) and time.monotonic() - began < 5:
        time.sleep(0.01)
    assert len(pids) == 2 and all(map(gone, pids))
    train()
    assert hashes() == uninterrupted


def test_all_ranks_roll_back_when_one_of_them_has_no_finite_loss(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = StageModule.training_step

    def training_step(self: StageModule, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
        step: Any = original(self, batch, batch_idx)
        if (
            dist.get_rank() == 1
            and self.global_step in (5, 6, 7)
            and read_rollbacks(Path(os.environ["WORK"])).count < 1
        ):
            assert self.means._sums is not None
            self.means._sums *= float("nan")  # of the loss only, so that gradients say nothing
        return step

    def phase(module: StageModule, models: Any, run: Any) -> Any:
        monkeypatch.setenv("WORK", str(run.stage.work))
        return train_phase(module, models, run)

    monkeypatch.setattr(StageModule, "training_step", training_step)
    monkeypatch.setattr("lifelong_moe.training.stage.train_phase", phase)
    report, printed = train(configure(("fruit",)))
    assert f"fruit: continuing from step-0-{EVERY:08d}" in printed
    assert report["stages"][0]["training"]["rollbacks"] == 1
    assert report["stages"][0]["training"]["nonfinite_steps"] == 3


def test_what_a_rank_raises_is_raised_here(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise DataError("x.jsonl:3: unreadable")

    configure(("fruit",))
    with monkeypatch.context() as patch:
        at(patch, 1, refuse)
        with pytest.raises(DataError, match=r"^x\.jsonl:3: unreadable$"):
            train()
    with monkeypatch.context() as patch:
        at(patch, 1, lambda: [][0])
        with pytest.raises(RuntimeError, match=r"(?s)in a training process: Traceback.*IndexError"):
            train()
    assert list(lab.glob("mlruns/stages/*")) == []


def test_curves_are_sent_once(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(MlflowRecord, "curves", lambda self, run_id, points: sent.extend(points))
    configure(("fruit",))
    with monkeypatch.context() as patch:
        at(patch, 1, kill_self, step=9)
        with pytest.raises(TryAgainError):
            train()
    train()
    steps = Counter((key, step) for key, _, step in sent)
    assert {step for _, step in steps} == {4, 8, 12} and set(steps.values()) == {1}
    assert ("train/loss_nats_per_token", 12) in steps and ("train/grad_norm", 4) in steps


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("trainer.devices=3",),
            "trainer.devices=3 must divide the 4 sequences of a micro-batch (stages[0].optim.batch_tokens / "
            "model.context / trainer.accumulate_grad_batches); valid are 1, 2, 4.",
        ),
        (
            ("trainer.devices=4", "trainer.accumulate_grad_batches=2"),
            "trainer.devices=4 must divide the 2 sequences of a micro-batch (stages[0].optim.batch_tokens / "
            "model.context / trainer.accumulate_grad_batches); valid are 1, 2.",
        ),
        (
            ("trainer.accelerator=gpu",),
            "trainer.devices=2 with trainer.accelerator=gpu: several processes train on CPU only so far. Set "
            "trainer.devices=1, or trainer.accelerator=cpu and a number of devices.",
        ),
        (
            ("trainer.devices=[0, 1]",),
            "trainer.devices=[0, 1] with trainer.accelerator=cpu: several processes train on CPU only so far. Set "
            "trainer.devices=1, or trainer.accelerator=cpu and a number of devices.",
        ),
        (
            ("trainer.strategy=deepspeed",),
            "trainer.strategy=deepspeed with trainer.devices=2: several processes train with ddp or fsdp only. Set "
            "trainer.strategy=ddp.",
        ),
        (
            ("trainer.strategy=fsdp", "frozen.offload=cpu"),
            "frozen.offload=cpu with trainer.strategy=fsdp is not supported. Set trainer.strategy=ddp.",
        ),
        *(
            (
                ("trainer.expert_parallel=2", *overrides),
                f"{key} with trainer.expert_parallel=2 is not supported. Set trainer.expert_parallel=1.",
            )
            for key, overrides in {
                "frozen.offload=cpu": ["frozen.offload=cpu"],
                "routing.competitive=true": ["routing.mode=dense", "routing.competitive=true"],
            }.items()
        ),
        (
            ("trainer.expert_parallel=2", "trainer.compile=true"),
            "trainer.expert_parallel=2 does not support trainer.compile=true. Set it to false.",
        ),
        (
            ("trainer.expert_parallel=2", "trainer.strategy=fsdp", "routing.mode=dense", "routing.competitive=true"),
            "routing.competitive=true with trainer.expert_parallel=2 is not supported. Set trainer.expert_parallel=1.",
        ),
        (
            ("trainer.expert_parallel=3",),
            "trainer.expert_parallel=3 must divide the 2 processes of trainer.devices and num_nodes.",
        ),
        (
            ("trainer.expert_parallel=2", "stage_defaults.grow.experts=3"),
            "trainer.expert_parallel=2 must divide the experts that each stage adds to a layer, and stage code has 3.",
        ),
        (
            ("trainer.expert_parallel=2", "stage_defaults.grow.rank=2"),
            "trainer.expert_parallel=2 does not support low-rank experts, which stage code has.",
        ),
        (
            ("trainer.devices=1", "trainer.num_nodes=2"),
            "trainer.num_nodes=2: only `lifelong-moe run`, started on each machine by torchrun or srun, trains on "
            "several (docs/scheduling.md). Set trainer.num_nodes=1.",
        ),
        (
            ("trainer.num_nodes=3",),
            "trainer.devices=2 on trainer.num_nodes=3 machines must divide the 4 sequences of a micro-batch "
            "(stages[0].optim.batch_tokens / model.context / trainer.accumulate_grad_batches); valid are 1, 2, 4 "
            "processes in all.",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(lab: Path, overrides: tuple[str, ...], message: str) -> None:
    path = configure()
    with pytest.raises(ConfigError) as caught:
        train(path, *overrides)
    assert str(caught.value) == message and caught.value.exit_code == 2
    assert not Path("mlruns").exists()


def test_ranks_that_all_hang_end_with_a_second_request(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Outside of a collective nothing tells a hang from a long step, and after one request they go on to its end.
    def hang(module: StageModule, batch: dict[str, torch.Tensor]) -> None:
        note(f"hangs-{dist.get_rank()}", str(os.getpid()))
        wait_for_ever()

    before_each_micro_batch(monkeypatch, hang)
    child = fork(lambda: train(configure(("fruit",))))
    files = [Path("hangs-0"), Path("hangs-1")]
    while not all(path.exists() and path.read_text().endswith("\n") for path in files):
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGTERM)
    while "stopping after this step" not in child.output:
        time.sleep(0.02)
    assert not any(gone(int(path.read_text())) for path in files)
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == TryAgainError.exit_code
    while not all(gone(int(path.read_text())) for path in files):  # the system ends them with their parent
        time.sleep(0.02)
    assert list(lab.glob("mlruns/stages/*")) == []
