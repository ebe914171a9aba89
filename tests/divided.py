"""The second stage of a tiny run in float64, and its steps divided into micro-batches and among processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from lifelong_moe.config.run import RunConfig
from lifelong_moe.config.training import FinetuneConfig, TrainerConfig
from lifelong_moe.data.tokens.blocks import BlockDataset
from lifelong_moe.data.tokens.shards import TokenizedCorpus, TokenShard
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.retention.penalty import make_anchor
from lifelong_moe.retention.teacher import make_teacher
from lifelong_moe.training.loop.context import StageModels
from lifelong_moe.training.loop.data import StageData, phase_dataset
from lifelong_moe.training.loop.handover import PhaseJob
from lifelong_moe.training.loop.module import StageModule
from lifelong_moe.training.loop.optimizer import phase_parameters, training_only
from lifelong_moe.training.loop.rollback import Rollbacks
from lifelong_moe.training.loop.trainer import build_trainer
from tests.forked import run_forked

MakeRun = Callable[..., RunConfig]
MakeModel = Callable[..., LanguageModel]
Begin = Callable[[], tuple[StageModule, BlockDataset]]
SEQUENCES, CONTEXT, STEPS = 8, 32, 4
SEPARATOR = 60
OLD = "stage_defaults.replay.fraction=0.25"
CASES: dict[str, tuple[str, ...]] = {
    "replay, distilled": (OLD, "stage_defaults.distill.text=replay"),
    "new text, half of it distilled": (OLD, "stage_defaults.distill={text: new, fraction: 0.5}"),
    "answers": ("stage_defaults.replay.fraction=0", "stage_defaults.distill.weight=0"),
    "answers, distilled, and replay": (OLD, "stage_defaults.distill.text=new"),
    "penalty": ("method=l2",),
    "review": ("stage_defaults.review={fraction: 0.5, replay_fraction: 0.4, old_loss: 0.5}",),
}


def text(name: str, seed: int) -> TokenizedCorpus:
    """Forty documents of random tokens."""
    draw = np.random.default_rng(seed)
    return _corpus(name, [[0, *draw.integers(1, 60, n)] for n in draw.integers(5, 40, 40)], None)


def pairs(name: str, seed: int) -> TokenizedCorpus:
    """Prompts of ten tokens with answers: thirty of one token, ten of eighteen."""
    draw = np.random.default_rng(seed)
    lengths = [1] * 30 + [18] * 10
    return _corpus(
        name, [[0, *draw.integers(1, 60, 10), SEPARATOR, *draw.integers(1, 60, n)] for n in lengths], SEPARATOR
    )


def _corpus(name: str, documents: list[list[int]], separator: int | None) -> TokenizedCorpus:
    offsets = np.cumsum([0, *map(len, documents)])
    sizes = np.ones(len(documents), dtype=np.int64)
    shard = TokenShard(np.concatenate(documents).astype(np.uint16), offsets, sizes, separator=separator)
    return TokenizedCorpus(name, shard, shard, "", "", "")


def second_stage(make_run: MakeRun, make_model: MakeModel, case: str, kind: str = "learned", **routing: Any) -> Begin:
    """What begins the second stage anew at each call, in its last phase."""
    settings = (
        f"model.context={CONTEXT}",
        "stage_defaults.optim.lr=0.01",
        f"stage_defaults.optim.batch_tokens={SEQUENCES * CONTEXT}",
        f"stage_defaults.tokens={2 * STEPS * SEQUENCES * CONTEXT}",
    )
    spec = stage_specs(make_run(*settings, *CASES[case]))[1]
    if "answers" in case:
        spec = replace(spec, finetune=FinetuneConfig())
    corpora = {"english": text("english", 1), "python": (pairs if "answers" in case else text)("python", 2)}

    def begin() -> tuple[StageModule, BlockDataset]:
        model = make_model(kind, (4, 2), routing=routing).double().train()
        teacher = make_teacher(make_model(kind, (4,), seed=1).double(), []) if spec.distill else None
        old = {name: p.detach() + 0.1 for name, p in model.named_parameters()}
        anchor = make_anchor(model, old, 0.05) if case == "penalty" else None
        phase = spec.phases()[-1]
        module = StageModule(model, spec, phase, teacher, anchor)
        return module, phase_dataset(StageModels(model, teacher), spec, phase, corpora, seed=3)

    return begin


class Watch(Callback):
    """The first step's gradient, before clipping, and each step's curves."""

    def __init__(self) -> None:
        self.gradient: dict[str, Tensor] = {}
        self.curves: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Keep the first."""
        if not self.gradient:
            named = pl_module.model.named_parameters()
            self.gradient = {n: p.grad.clone() for n, p in named if p.grad is not None}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """Keep each step's."""
        if trainer.global_step > len(self.curves):
            self.curves.append(pl_module.means.values | {"grad_norm": pl_module.grad_norm})


def take_steps(
    begin: Begin, accumulate: int, processes: int = 1, nodes: int = 1, **settings: Any
) -> tuple[dict[str, Tensor], Watch]:
    """Take the steps, each in so many micro-batches of each process; the weights, and what was seen.

    Processes are those of each node; the other settings are keys of ``trainer``.
    """
    (module, dataset), watch = begin(), Watch()
    config = TrainerConfig(
        accelerator="cpu",
        devices=processes,
        num_nodes=nodes,
        accumulate_grad_batches=accumulate,
        deterministic=False,
        **settings,
    )
    phase = replace(module.phase, steps=STEPS)
    data = StageData(dataset, PhaseJob(module.spec, phase, 0, 0, 0, 0, Path(), None, Rollbacks(), config))
    trainer = build_trainer(config, STEPS, [watch])
    with training_only(module.model, phase_parameters(module.model, module.phase).values()):
        trainer.fit(module, data)
    return module.model.state_dict(), watch


def take_steps_in_ranks(
    begin: Begin, accumulate: int, processes: int, folder: Path, **settings: Any
) -> tuple[dict[str, Tensor], Any]:
    """:func:`take_steps` in several processes; the weights of all of them, and the curves of the first."""

    def work(rank: int) -> Any:
        weights, watch = take_steps(begin, accumulate, processes, **settings)
        whole = {name: one.full_tensor() if isinstance(one, DTensor) else one for name, one in weights.items()}
        save_file(whole, folder / f"weights-{rank}.safetensors")
        return watch.curves

    curves = run_forked(processes, work, folder)
    found: dict[str, Tensor] = {}
    for rank in range(processes):
        weights = load_file(folder / f"weights-{rank}.safetensors")
        # What several processes have is the same in each.
        assert all(torch.equal(found.get(name, tensor), tensor) for name, tensor in weights.items())
        found |= weights
    return found, curves
