"""What a stage's samples carry besides tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lifelong_moe.data.shards import TokenizedCorpus, TokenShard
from lifelong_moe.methods.graph import stage_specs
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.training import data as training_data
from lifelong_moe.training.data import group_ids, stage_dataset


def corpus(name: str) -> TokenizedCorpus:
    """Ten documents of 40 tokens."""
    tokens = np.tile(np.concatenate([[0], np.arange(1, 40)]), 10).astype(np.uint16)
    shard = TokenShard(tokens, np.arange(11) * 40, np.full(10, 100))
    return TokenizedCorpus(name, shard, shard, "", "", "")


def test_the_teacher_sees_groups_of_its_own(make_run: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters that a stage adds do not exist for its teacher."""
    student, teacher = make_model(), make_model()

    def fake(model: LanguageModel, shard: TokenShard, distribution: str) -> Any:
        return np.full(shard.num_tokens, 7 if model is student else 3)

    monkeypatch.setattr(training_data, "group_ids", fake)
    spec = stage_specs(make_run())[1]
    corpora = {name: corpus(name) for name in (spec.data, *spec.replayed)}
    sample = stage_dataset(student, teacher, spec, corpora, seed=0)[0]
    assert set(sample["group_ids"].tolist()) == {7} and set(sample["teacher_group_ids"].tolist()) == {3}
    alone = stage_dataset(student, None, spec, corpora, seed=0)[0]
    assert set(alone["teacher_group_ids"].tolist()) == {0}


def test_each_stage_has_an_order_of_its_own(make_run: Any, make_model: Any) -> None:
    spec = stage_specs(make_run())[1]
    corpora = {name: corpus(name) for name in (spec.data, *spec.replayed)}
    corpora[spec.data].train.tokens[:] = np.arange(400) % 64  # blocks that differ
    orders = [
        [stage_dataset(make_model(), None, spec, corpora, seed)[n]["token_ids"].tolist() for n in range(12)]
        for seed in (0, 0, 1000)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_routing_without_groups_has_none(make_model: Any) -> None:
    assert group_ids(make_model(), corpus("a").train, "a") is None
