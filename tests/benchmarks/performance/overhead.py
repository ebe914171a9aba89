"""What a step costs beyond its mathematics: waiting for data, and Lightning, logging and checks around it.

A phase is trained as a stage trains it. Between its steps a bare loop over an equal model takes as many, so both see
the same machine. Checkpoints are off meanwhile; what one costs is given beside it.
"""

from __future__ import annotations

import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console

from lifelong_moe.config.training import CheckpointConfig, FrozenConfig, TrainerConfig
from lifelong_moe.data.tokens.blocks import BlockDataset, BlockSource
from lifelong_moe.data.tokens.identity import DataIdentity, TokenizerIdentity
from lifelong_moe.data.tokens.order import SampleOrder, StepBatchSampler
from lifelong_moe.data.tokens.shards import TokenizedCorpus, TokenShard
from lifelong_moe.plan.planned import PlannedStage
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.callbacks.interrupt import Interrupt
from lifelong_moe.training.loop.context import PhaseRun, StageEnvironment, StageModels, StageRun
from lifelong_moe.training.loop.data import StepLoader
from lifelong_moe.training.loop.module import StageModule
from lifelong_moe.training.loop.phase import train_phase
from lifelong_moe.training.loop.rollback import Rollbacks
from tests.benchmarks.performance.clock import Ratio, ratio, timed
from tests.benchmarks.performance.goals import judged
from tests.benchmarks.performance.subjects import DEVICE, REFERENCE, Size, Step, our_step, stage_spec

ROUNDS = 16
ROUND_STEPS = 2
WARMUP_STEPS = 4
DOCUMENT_TOKENS = 500
TRAINER = TrainerConfig(accelerator="cpu")
if DEVICE == "cuda":
    TRAINER = TrainerConfig(accelerator="gpu", precision="bf16-true")


class Interleaved(StageModule):
    """A stage's module that takes steps of a bare loop between its own, and tells the times of both."""

    def __init__(self, bare: Step, spec: StageSpec, size: Size, work: Path) -> None:
        super().__init__(size.model(), spec, spec.phases()[0])
        self.bare, self.work = bare, work
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.checkpoint_seconds = 0.0
        self._mark = 0.0

    def on_train_batch_end(self, *args: Any) -> None:
        """The last hook of a step: after a round, let the bare loop take as many."""
        step = self.trainer.global_step
        if step < WARMUP_STEPS or (step - WARMUP_STEPS) % ROUND_STEPS:
            return
        if step > WARMUP_STEPS:
            self.ours.append(_now() - self._mark)
            self.theirs.append(timed(lambda: [self.bare() for _ in range(ROUND_STEPS)]))
        else:
            for _ in range(WARMUP_STEPS):
                self.bare()
        if step == self.phase.steps:
            self.checkpoint_seconds = timed(lambda: self.trainer.save_checkpoint(self.work / "measured"))
        self._mark = _now()


def _now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(size: Size | None = None, rounds: int = ROUNDS) -> dict[str, Any]:
    """Shares of a step at the reference size; on a CPU of processor time, on one thread."""
    size = size or REFERENCE
    with tempfile.TemporaryDirectory() as folder:
        shard = random_shard(size, Path(folder))
        module = interleaved(size, shard, rounds, Path(folder))
        loading, copying = data_path(size, shard)
    times = ratio(module.ours, module.theirs)
    step = times.seconds[0] / ROUND_STEPS
    every = CheckpointConfig().every_steps
    waits = statistics.quantiles([s / step for s in loading], n=4)
    return {
        "goals": {
            "P6 data": judged(waits[1], waits[0], waits[2], "<= 0.01", ""),
            "P6 loop": judged(*_share(times), "<= 0.03", ""),
        },
        "detail": {
            "step_seconds": [round(s / ROUND_STEPS, 5) for s in times.seconds],
            "rounds": times.rounds,
            "tokens_per_second_loaded": round(size.tokens / statistics.median(loading)),
            "tokens_per_second_copied": round(size.tokens / statistics.median(copying)),
            "checkpoint_seconds": round(module.checkpoint_seconds, 3),
            "checkpoint_share_by_default": round(module.checkpoint_seconds / (every * step), 4),
        },
    }


def _share(times: Ratio) -> tuple[float, float, float]:
    """Of our step, what the bare loop does without; data included."""
    return 1 - 1 / times.ratio, 1 - 1 / times.low, 1 - 1 / times.high


def random_shard(size: Size, folder: Path) -> TokenShard:
    """Random tokens in a memory map, as many as some hundred steps take."""
    number = 200 * size.tokens
    tokens = np.random.default_rng(0).integers(1, size.vocab, number, dtype=np.uint16)
    offsets = np.arange(0, number + 1, DOCUMENT_TOKENS)
    tokens[offsets[:-1]] = 0  # BOS
    tokens.tofile(folder / "tokens.bin")
    mapped = np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="r")
    return TokenShard(mapped, offsets, np.full(len(offsets) - 1, 4 * DOCUMENT_TOKENS))


def interleaved(size: Size, shard: TokenShard, rounds: int, folder: Path) -> Interleaved:
    """Train a phase of so many rounds; its module has the times."""
    steps = WARMUP_STEPS + rounds * ROUND_STEPS
    spec = replace(stage_spec(size), tokens=steps * size.tokens)
    module = Interleaved(our_step(size), spec, size, folder)
    environment = StageEnvironment(
        store=StageStore(folder / "mlruns"),
        work=folder,
        trainer=TRAINER,
        checkpoint=CheckpointConfig(every_steps=10**6),
        frozen=FrozenConfig(),
        interrupt=Interrupt(),
        console=Console(file=io.StringIO()),
        send=lambda rows: None,
    )
    corpora = {spec.data: TokenizedCorpus(spec.data, shard, shard, "", "", "")}
    data: Any = SimpleNamespace(corpora=corpora)
    planned = PlannedStage.of(spec, 0, 0, None, DataIdentity({spec.data: ""}, TokenizerIdentity({}, ""), size.vocab, 0))
    run = PhaseRun(StageRun(planned, None, data, environment), 0, module.phase, 0, 0, 0, None, Rollbacks())
    train_phase(module, StageModels(module.model), run)
    return module


def data_path(size: Size, shard: TokenShard) -> tuple[list[float], list[float]]:
    """Seconds a batch of the loader alone, and of copying the same tokens out of the memory map."""
    source = BlockSource(shard, size.context, bos_id=0)
    order = SampleOrder([len(source)], 0.0, seed=0)
    dataset, steps = BlockDataset([source], order), len(source) // size.sequences
    loader = StepLoader(dataset, batch_sampler=StepBatchSampler(steps, size.sequences))
    batches = iter(loader)

    def copy(step: int) -> Callable[[], Any]:
        numbers = range(step * size.sequences, (step + 1) * size.sequences)
        starts = [order.at(n)[1] * size.context for n in numbers]
        return lambda: torch.from_numpy(
            np.stack([shard.tokens[s : s + size.context + 1] for s in starts]).astype(np.int64)
        )

    times = [(timed(lambda: next(batches)), timed(copy(step))) for step in range(steps)]
    loading, copying = zip(*times[5:], strict=True)
    return list(loading), list(copying)


def main() -> None:
    """Print what was measured as one line."""
    print(json.dumps(measure()))


if __name__ == "__main__":
    main()
