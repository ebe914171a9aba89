"""Documents end: training teaches ends, and text that the trained model writes ends as what it was trained on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lifelong_moe.config.run import RunConfig
from lifelong_moe.data.tokens.blocks import BlockSource
from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.retention.generated import generate_blocks
from lifelong_moe.training.loop.module import StageModule

CONTEXT, LONGEST = 16, 10


def countdowns(documents: int) -> TokenShard:
    """Documents such as BOS 4 3 2 1, which end after 1."""
    lengths = np.random.default_rng(0).integers(1, LONGEST, documents)
    rows = [[0, *range(length, 0, -1)] for length in lengths.tolist()]
    offsets = np.cumsum([0, *map(len, rows)])
    return TokenShard(np.concatenate(rows), offsets, lengths)


def blocks_of(source: BlockSource) -> dict[str, Tensor]:
    samples = [source.block(i) for i in range(len(source))]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


@pytest.fixture(scope="module")
def trained(make_model: Callable[..., LanguageModel], make_run: Callable[..., RunConfig]) -> LanguageModel:
    """A model that was trained in the stages' own loss, documents masked from each other."""
    model = make_model(model={"document_mask": True, "init_std": 0.05})
    spec = stage_specs(make_run())[0]
    module = StageModule(model, spec, spec.phases()[0])
    blocks = blocks_of(BlockSource(countdowns(600), CONTEXT, 0))
    blocks |= {"replayed": torch.zeros(len(blocks["mask"]), dtype=torch.bool)}
    blocks |= {"ordinal": torch.arange(len(blocks["mask"]))}
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for step in range(80):
        rows = torch.arange(step * 24, step * 24 + 24) % len(blocks["mask"])
        optimizer.zero_grad()
        module.training_step({name: tensor[rows] for name, tensor in blocks.items()}, 0)["loss"].backward()
        optimizer.step()
    return model


def test_training_teaches_where_a_document_ends(trained: LanguageModel) -> None:
    batch = blocks_of(BlockSource(countdowns(200), CONTEXT, 0))
    with torch.no_grad():
        hidden = trained(TokenBatch(batch["token_ids"], batch["document_ids"])).hidden_BSD
        ends_BS = trained.head.logits(hidden).softmax(dim=-1)[..., 0]
    is_end_BS = (batch["target_ids"] == 0) & batch["mask"]
    assert int(is_end_BS.sum()) == 200  # each document's end is a target, also at a block's border
    assert float(ends_BS[is_end_BS].min()) > 0.9
    assert float(ends_BS[~is_end_BS & batch["mask"]].max()) < 0.1


def test_written_documents_end_as_those_of_the_training_text(trained: LanguageModel) -> None:
    rows = generate_blocks(trained, 200, context=CONTEXT, seed=0)
    documents = [part.tolist() for row in rows for part in np.split(row, np.flatnonzero(row == 0)[1:])[:-1]]
    whole = [document == [0, *range(len(document) - 1, 0, -1)] for document in documents]
    assert len(documents) > 250 and np.mean(whole) > 0.9
    # The first document of a block is whole, since none is longer than the block.
    first = np.array([np.flatnonzero(row == 0)[1] - 1 for row in rows if (row == 0).sum() > 1])
    real = np.diff(countdowns(600).offsets) - 1
    assert len(first) > 190 and abs(first.mean() - real.mean()) < 3 * real.std() * (1 / 200 + 1 / 600) ** 0.5
