"""The stage's training blocks as a LightningDataModule; sample order is a pure function of seed and step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from lifelong_moe.config.routing.base import Bundles
from lifelong_moe.data.tokens.blocks import BlockDataset, BlockSource, RowSource
from lifelong_moe.data.tokens.order import SampleOrder, StepBatchSampler
from lifelong_moe.data.tokens.shards import TokenizedCorpus, TokenShard
from lifelong_moe.evaluation.loss import domain_ids
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.phase import Phase
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.training.loop.context import PhaseRun, StageModels
from lifelong_moe.training.loop.shares import Tally, with_shares


class StepLoader(DataLoader[dict[str, Tensor]]):
    """A DataLoader whose position is the trainer's step, which Lightning saves anyway."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing of its own to save."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing of its own to restore."""


class StageData(LightningDataModule):
    """New and replayed blocks of one phase.

    Args:
        dataset: All samples of the stage; sample n is the same whoever asks.
        run: Which phase, and how its steps are divided.
    """

    def __init__(self, dataset: BlockDataset, run: PhaseRun) -> None:
        super().__init__()
        self.dataset, self.run, self.spec = dataset, run, run.stage.spec
        self._tally: tuple[int, Tally] | None = None
        """Of the step under way, which each of its micro-batches asks for."""

    def train_dataloader(self) -> StepLoader:
        """The rest of the phase, from the step that the trainer stands at."""
        assert self.trainer is not None
        run, config = self.run, self.run.stage.environment.trainer
        samplers = [
            StepBatchSampler(
                run.order_step + part.stop,
                self.spec.global_batch,
                accumulate=config.accumulate_grad_batches,
                start_step=run.order_step + part.start,
                rank=self.trainer.global_rank,
                world=self.trainer.world_size,
            )
            for part in run.rollbacks.batches(run.number, self.trainer.global_step, run.phase.steps)
        ]
        return StepLoader(
            self.dataset,
            batch_sampler=_Phase(samplers, run.phase.steps * config.accumulate_grad_batches),
            num_workers=config.num_workers,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Say what the batch weighs in its step while it is on the CPU, so that no device is asked how much it is."""
        assert self.trainer is not None
        step = int(batch["sample"][0]) // self.spec.global_batch
        accumulate = self.run.stage.environment.trainer.accumulate_grad_batches
        return with_shares(batch, self.spec, self.tally(step), accumulate * self.trainer.world_size)

    def tally(self, step: int) -> Tally:
        """What there is in all micro-batches of a step, on all processes."""
        if self._tally is None or self._tally[0] != step:
            size = self.spec.global_batch
            samples = range(step * size, (step + 1) * size)
            real_B, scored_B = torch.tensor([self.dataset.sizes(n) for n in samples]).t()
            replayed_B, ordinal_B = torch.tensor([self.dataset.place(n) for n in samples]).t()
            self._tally = step, Tally.of(real_B, scored_B, replayed_B.bool(), ordinal_B, self.spec.distill)
        return self._tally[1]


class _Phase:
    """A batch sampler that counts as long as the phase, wherever in it iteration begins."""

    def __init__(self, samplers: list[StepBatchSampler], length: int) -> None:
        self.samplers, self.length = samplers, length

    def __iter__(self) -> Iterator[list[int]]:
        return chain.from_iterable(self.samplers)

    def __len__(self) -> int:
        return self.length


def own_domain_ids(model: LanguageModel, spec: StageSpec, shard: TokenShard) -> NDArray[np.integer] | None:
    """Groups of the text that a stage learns, as :func:`domain_ids`, but for each document's first chunk.

    Nothing precedes it, so evaluation and generation give it to the first bundle. In training its bundle is known: it
    is the one that this stage trains, and an old one, which is frozen, would learn nothing from it.
    """
    ids, architecture = domain_ids(model, shard, spec.data), model.architecture
    trained = len(architecture.generations) - 1 if spec.grow is not None else architecture.continued
    if ids is None or architecture.routing.bundles != Bundles.cluster or trained is None:
        return ids
    places = np.arange(shard.num_tokens) - np.repeat(shard.offsets[:-1], np.diff(shard.offsets))
    return np.where(places < architecture.routing.chunk_tokens, trained, ids).astype(ids.dtype)


def phase_dataset(
    models: StageModels, spec: StageSpec, phase: Phase, corpora: Mapping[str, TokenizedCorpus], seed: int
) -> BlockDataset:
    """New text first, then what is replayed, with the groups that model and teacher give them now.

    Args:
        models: Being trained, and distilled from.
        spec: The stage.
        phase: Gives the share of replayed text.
        corpora: Tokenized text by distribution.
        seed: Of the sample order.
    """
    model, teacher = models.model, models.teacher
    bos, context = model.architecture.bos_id, spec.model.context
    sources: list[BlockSource | RowSource] = []
    for name in (spec.data, *spec.reads):
        shard = corpora[name].train
        taught = domain_ids(teacher, shard, name) if teacher else None
        bound = spec.buffer_blocks if name != spec.data else None
        groups = own_domain_ids(model, spec, shard) if name == spec.data else domain_ids(model, shard, name)
        sources.append(BlockSource(shard, context, bos, groups, taught, bound))
    if models.generated is not None:
        sources.append(_generated_source(model, teacher, models.generated))
    weights = (1,) * (len(sources) - 1) if spec.generates else spec.replay_weights
    return BlockDataset(sources, SampleOrder([len(s) for s in sources], phase.replay_fraction, seed, weights))


def _generated_source(model: LanguageModel, teacher: LanguageModel | None, rows: NDArray[np.int64]) -> RowSource:
    bos = model.architecture.bos_id
    tokens = rows.flatten()
    begins = np.flatnonzero(tokens == bos)  # every row begins with one
    shard = TokenShard(tokens, np.append(begins, len(tokens)), np.zeros(len(begins), dtype=np.int64))
    groups = (None if m is None else domain_ids(m, shard, "") for m in (model, teacher))
    return RowSource(rows, bos, *(None if ids is None else ids.reshape(rows.shape) for ids in groups))


def written_sample(model: LanguageModel, rows: NDArray[np.int64]) -> dict[str, Tensor]:
    """Blocks that the parent's model wrote, as :func:`text_sample` gives blocks of stored text."""
    source = _generated_source(model, None, rows)
    samples = [source.block(n) for n in range(len(source))]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def text_sample(
    model: LanguageModel, spec: StageSpec, corpus: TokenizedCorpus, tokens: int, limit: int | None = None
) -> dict[str, Tensor]:
    """Blocks of a distribution's training text, or of its first ``limit`` blocks, evenly drawn.

    Growth, clustering and Fisher information are measured on them.
    """
    shard, context = corpus.train, spec.model.context
    groups = domain_ids(model, shard, corpus.name)
    source = BlockSource(shard, context, model.architecture.bos_id, groups, limit=limit)
    order = SampleOrder([len(source)], 0.0, spec.seed)
    dataset = BlockDataset([source], order)
    count = min(len(source), max(1, tokens // context))
    samples = [dataset[n] for n in range(count)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
