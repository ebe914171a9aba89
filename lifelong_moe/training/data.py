"""The stage's training blocks as a LightningDataModule; sample order is a pure function of seed and step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lifelong_moe.data.blocks import BlockDataset, BlockSource
from lifelong_moe.data.order import SampleOrder, StepBatchSampler
from lifelong_moe.data.shards import TokenizedCorpus, TokenShard
from lifelong_moe.model.groups import label_group
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.training.spec import StageSpec


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
        spec: For the global batch.
        first_step: Steps of the phases before this one.
        steps: Steps of this phase.
        accumulate: Micro-batches a step.
        num_workers: Loader processes.
    """

    def __init__(
        self, dataset: BlockDataset, spec: StageSpec, *, first_step: int, steps: int, accumulate: int, num_workers: int
    ) -> None:
        super().__init__()
        self.dataset: Dataset[dict[str, Tensor]] = dataset
        self.spec, self.first_step, self.steps = spec, first_step, steps
        self.accumulate, self.num_workers = accumulate, num_workers

    def train_dataloader(self) -> StepLoader:
        """The rest of the phase, from the step that the trainer stands at."""
        assert self.trainer is not None
        sampler = StepBatchSampler(
            self.first_step + self.steps,
            self.spec.global_batch,
            accumulate=self.accumulate,
            start_step=self.first_step + self.trainer.global_step,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
        )
        return StepLoader(
            self.dataset,
            batch_sampler=_Phase(sampler, self.steps * self.accumulate),
            num_workers=self.num_workers,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )


class _Phase:
    """A batch sampler that counts as long as the phase, wherever in it iteration begins."""

    def __init__(self, sampler: StepBatchSampler, length: int) -> None:
        self.sampler, self.length = sampler, length

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return self.length


def group_ids(model: LanguageModel, shard: TokenShard, distribution: str) -> NDArray[np.int64] | None:
    """Group of every token of a shard, from the text before it in its document; None if routing has no groups."""
    if model.document_clusters is not None:
        return np.concatenate(
            [model.document_clusters.group_ids(shard.document(i)) for i in range(shard.num_documents)]
        )
    if model.architecture.routing.mode == "label":
        return np.full(shard.num_tokens, label_group(model.architecture, distribution), dtype=np.int64)
    return None


def stage_dataset(
    model: LanguageModel,
    teacher: LanguageModel | None,
    spec: StageSpec,
    corpora: Mapping[str, TokenizedCorpus],
    seed: int,
) -> BlockDataset:
    """New text first, then each replayed distribution, with the groups that model and teacher give them now."""
    bos, context = model.architecture.bos_id, spec.model.context
    sources = []
    for name in (spec.data, *spec.replayed):
        shard = corpora[name].train
        taught = group_ids(teacher, shard, name) if teacher else None
        sources.append(BlockSource(shard, context, bos, group_ids(model, shard, name), taught))
    return BlockDataset(sources, SampleOrder([len(s) for s in sources], spec.replay_fraction, seed))


def new_text_sample(model: LanguageModel, spec: StageSpec, corpus: TokenizedCorpus, tokens: int) -> dict[str, Tensor]:
    """Blocks of the new text, evenly drawn, for growth and clustering."""
    shard, context = corpus.train, spec.model.context
    source = BlockSource(shard, context, model.architecture.bos_id, group_ids(model, shard, spec.data))
    order = SampleOrder([len(source)], 0.0, spec.seed)
    dataset = BlockDataset([source], order)
    count = min(len(source), max(1, tokens // context))
    samples = [dataset[n] for n in range(count)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
