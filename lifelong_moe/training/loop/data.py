"""A stage's training blocks as a LightningDataModule.

The order of samples is decided in :func:`phase_dataset`, by a
:class:`~lifelong_moe.data.tokens.order.SampleOrder`: a pure function of the sources' sizes, the replay fraction, the
seed and the sample's number. :meth:`StageData.train_dataloader` decides which numbers a process reads, and from which
step on.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from lifelong_moe.data.tokens.blocks import BlockDataset, BlockSource, RowSource
from lifelong_moe.data.tokens.order import SampleOrder, StepBatchSampler
from lifelong_moe.data.tokens.shards import TokenizedCorpus, TokenShard
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.phase import Phase
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.training.loop.context import StageModels
from lifelong_moe.training.loop.generations import generated_source, training_domains
from lifelong_moe.training.loop.handover import PhaseJob
from lifelong_moe.training.loop.shares import Batch, Tally, WeightedBatch, with_shares


class StepLoader(DataLoader[dict[str, Tensor]]):
    """A DataLoader whose position follows from the trainer's step, which Lightning saves."""

    # Without these two methods Lightning warns that resuming within an epoch is not reproducible; here it is.
    def state_dict(self) -> dict[str, object]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: object) -> None:
        """Ignore the state, which is empty."""


class StageData(LightningDataModule):
    """New and replayed blocks of one phase.

    Args:
        dataset: All samples of the phase's order; sample n is the same on every process.
        job: The phase and its place in the stage.
    """

    def __init__(self, dataset: BlockDataset, job: PhaseJob) -> None:
        super().__init__()
        self.dataset, self.job, self.spec = dataset, job, job.spec
        self._tally: tuple[int, Tally] | None = None
        """Number and counts of the current step, needed by each of its micro-batches."""

    def train_dataloader(self) -> StepLoader:
        """The rest of the phase, from the trainer's step on."""
        assert self.trainer is not None
        job, config = self.job, self.job.trainer
        # One sampler for each stretch between two rollbacks: steps count on, the batches read jump over the bad text.
        samplers = [
            StepBatchSampler(
                job.order_step + part.stop,
                self.spec.global_batch,
                accumulate=config.accumulate_grad_batches,
                start_step=job.order_step + part.start,
                rank=self.trainer.global_rank,
                world=self.trainer.world_size,
            )
            for part in job.rollbacks.batches(job.number, self.trainer.global_step, job.phase.steps)
        ]
        return StepLoader(
            self.dataset,
            batch_sampler=_Phase(samplers, job.phase.steps * config.accumulate_grad_batches),
            num_workers=config.num_workers,
            worker_init_fn=_ignore_ctrl_c,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> WeightedBatch:
        """Add each loss's share in the step to the batch."""
        assert self.trainer is not None
        # Here and not in training_step: the counts are read as Python numbers, which on a GPU would wait for it.
        step = int(batch["sample"][0]) // self.spec.global_batch
        accumulate = self.job.trainer.accumulate_grad_batches
        return with_shares(batch, self.spec, self.tally(step), accumulate * self.trainer.world_size)

    def tally(self, step: int) -> Tally:
        """Count the tokens and sequences of a whole step, over all micro-batches and processes."""
        if self._tally is None or self._tally[0] != step:
            size = self.spec.global_batch
            # The order is a pure function, so a process counts the others' samples without communication.
            samples = range(step * size, (step + 1) * size)
            real_B, scored_B = torch.tensor([self.dataset.sizes(n) for n in samples]).t()
            replayed_B, ordinal_B = torch.tensor([self.dataset.place(n) for n in samples]).t()
            self._tally = step, Tally.of(real_B, scored_B, replayed_B.bool(), ordinal_B, self.spec.distill)
        return self._tally[1]


def _ignore_ctrl_c(worker: int) -> None:
    """Leave Ctrl-C, which a terminal sends to data workers too, to the main process, which needs them for its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Phase:
    """A batch sampler with the length of the whole phase, wherever in it iteration begins."""

    def __init__(self, samplers: list[StepBatchSampler], length: int) -> None:
        self.samplers, self.length = samplers, length

    def __iter__(self) -> Iterator[list[int]]:
        return chain.from_iterable(self.samplers)

    def __len__(self) -> int:
        return self.length


def phase_dataset(
    models: StageModels, spec: StageSpec, phase: Phase, corpora: Mapping[str, TokenizedCorpus], seed: int
) -> BlockDataset:
    """The samples of a phase in their order, with the generations that model and teacher give their tokens.

    Args:
        models: The student, and the teacher if there is one.
        spec: The stage.
        phase: Holds the share of replayed text.
        corpora: Tokenized text by distribution.
        seed: Of the order.
    """
    model, teacher = models.model, models.teacher
    bos, context = model.architecture.bos_id, spec.model.context
    domains_of, teacher_domains_of = model.corpus_domains(), teacher.corpus_domains() if teacher else None
    # New text first; SampleOrder deals the others in rounds.
    sources: list[BlockSource | RowSource] = []
    for name in (*spec.new, *spec.reads):
        shard = corpora[name].train
        teacher_domains = teacher_domains_of.of(shard, name) if teacher_domains_of else None
        # Replayed text is old text: its generation is the one that evaluation would choose.
        is_new = name in spec.new
        domains = training_domains(model, spec, shard, name, domains_of) if is_new else domains_of.of(shard, name)
        bound = None if is_new else spec.buffer_blocks
        sources.append(BlockSource(shard, context, bos, domains, teacher_domains, bound))
    if models.generated is not None:
        sources.append(generated_source(model, teacher, models.generated))
    return in_order(sources, spec, phase, seed)


def in_order(sources: Sequence[BlockSource | RowSource], spec: StageSpec, phase: Phase, seed: int) -> BlockDataset:
    """The samples of a phase, given its text; arguments as of :func:`phase_dataset`."""
    # Generated text is one source, whatever distributions its model had learned.
    weights = (1,) * (len(sources) - len(spec.new)) if spec.generates else spec.replay_weights
    blocks = [len(source) for source in sources]
    return BlockDataset(sources, SampleOrder(blocks, phase.replay_fraction, seed, weights, spec.shares))


def written_sample(model: LanguageModel, rows: NDArray[np.int64]) -> dict[str, Tensor]:
    """All blocks that the parent's model wrote, in the form of :func:`text_sample`."""
    source = generated_source(model, None, rows)
    return _stacked([source.block(n) for n in range(len(source))], model)


def text_sample(
    model: LanguageModel, spec: StageSpec, corpus: TokenizedCorpus, tokens: int, limit: int | None = None
) -> dict[str, Tensor]:
    """Blocks drawn from a distribution's training text, ``(B, S)`` each, for growth, clustering and Fisher information.

    Args:
        model: Decides the generation of each token.
        spec: The stage.
        corpus: The distribution.
        tokens: Wanted number, rounded down to whole blocks; at least one block.
        limit: Draw from the first blocks only, as many as replay keeps.
    """
    return _drawn(model, spec, [corpus], (1,), tokens, limit)


def new_text_sample(
    model: LanguageModel, spec: StageSpec, corpora: Mapping[str, TokenizedCorpus], tokens: int
) -> dict[str, Tensor]:
    """As :func:`text_sample`, of the stage's new text: of a mixture, each distribution has its share."""
    return _drawn(model, spec, [corpora[name] for name in spec.new], spec.shares, tokens)


def _drawn(
    model: LanguageModel,
    spec: StageSpec,
    corpora: Sequence[TokenizedCorpus],
    shares: Sequence[int],
    tokens: int,
    limit: int | None = None,
) -> dict[str, Tensor]:
    """Blocks drawn from the training text of distributions, in the order of a mixture with these shares."""
    bos, context = model.architecture.bos_id, spec.model.context
    sources = [BlockSource(corpus.train, context, bos, limit=limit) for corpus in corpora]
    # The first blocks of a random permutation, not of the text, whose beginning may be one long document.
    order = SampleOrder([len(source) for source in sources], 0.0, spec.seed, new_weights=shares)
    count = min(sum(map(len, sources)), max(1, tokens // context))
    drawn: list[list[int]] = [[] for _ in sources]
    for source, block in map(order.at, range(count)):
        drawn[source].append(block)
    assigned = [
        replace(one, domain_ids=_domains_of(model, corpus.name, one.shard, one.documents(blocks))) if blocks else one
        for one, corpus, blocks in zip(sources, corpora, drawn, strict=True)
    ]
    dataset = BlockDataset(assigned, order)
    return _stacked([dataset[n] for n in range(count)], model)


def _stacked(samples: list[dict[str, Tensor]], model: LanguageModel) -> dict[str, Tensor]:
    """Samples as one batch, where the model is that reads them."""
    device = model.embedding.weight.device
    return {name: torch.stack([sample[name] for sample in samples]).to(device) for name in samples[0]}


def _domains_of(
    model: LanguageModel, distribution: str, shard: TokenShard, wanted_D: NDArray[np.int64]
) -> NDArray[np.integer] | None:
    """Domain of each token of some documents of a shard; tokens of all others, which nobody asks for, have 0."""
    documents = [shard.document(number) for number in wanted_D]
    offsets = np.cumsum([0, *map(len, documents)])
    part = TokenShard(np.concatenate(documents), offsets, shard.text_bytes[wanted_D])
    if (ids := model.domain_ids(part, distribution)) is None:
        return None
    found = np.zeros(shard.num_tokens, ids.dtype)
    for number, begin, end in zip(wanted_D, offsets[:-1], offsets[1:], strict=True):
        found[shard.offsets[number] : shard.offsets[number + 1]] = ids[begin:end]
    return found
