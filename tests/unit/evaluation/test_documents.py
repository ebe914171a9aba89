"""Losses and features by document: they add up to what the whole evaluation says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.data.tokens.windows import evaluation_windows
from lifelong_moe.evaluation.documents import generation_shares, measure_documents
from lifelong_moe.evaluation.loss import evaluate
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Architecture, Generation

Make = Callable[..., LanguageModel]
LENGTHS = (9, 40, 3, 21)


def shard_of(lengths: tuple[int, ...], seed: int = 0) -> TokenShard:
    draw = np.random.default_rng(seed)
    rows = [np.concatenate([[0], draw.integers(1, 61, n - 1)]) for n in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenShard(np.concatenate(rows), offsets, np.array([3 * n for n in lengths]))


@pytest.mark.parametrize("kind", ["learned", "bundles", "label"])
def test_documents_add_up_to_the_evaluation(make_model: Make, kind: str) -> None:
    model, windows = make_model(kind, (4, 2)), evaluation_windows(shard_of(LENGTHS), 16, 1000)
    measured = measure_documents(model, windows, distribution="d1", batch_tokens=32)
    whole = evaluate(model, windows, distribution="d1", batch_tokens=32)
    assert measured.document.tolist() == [0, 1, 2, 3]
    assert measured.tokens.tolist() == [n - 1 for n in LENGTHS]
    assert measured.nats.sum() / measured.tokens.sum() == pytest.approx(whole.nats_per_token, rel=1e-6)
    assert measured.expert_counts == whole.expert_counts
    assert measured.features.shape == (4, 16)


def test_a_document_s_row_is_its_own(make_model: Make) -> None:
    model, shard = make_model(), shard_of(LENGTHS)
    together = measure_documents(model, evaluation_windows(shard, 16, 1000), distribution=None, batch_tokens=64)
    for i, length in enumerate(LENGTHS):
        alone = TokenShard(shard.document(i), np.array([0, length]), shard.text_bytes[i : i + 1])
        one = measure_documents(model, evaluation_windows(alone, 16, 1000), distribution=None, batch_tokens=16)
        assert one.nats[0] == pytest.approx(together.nats[i], rel=1e-5)
        assert one.features[0] == pytest.approx(together.features[i], abs=1e-5)


def test_documents_beyond_the_asked_tokens_are_absent(make_model: Make) -> None:
    windows = evaluation_windows(shard_of(LENGTHS), 16, 10)  # 8 tokens of the first, so the second is needed too
    assert measure_documents(make_model(), windows, distribution=None, batch_tokens=64).document.tolist() == [0, 1]


def test_generation_shares_by_hand(make_architecture: Callable[..., Architecture]) -> None:
    grown = make_architecture("learned", (2, Generation("s1", 1, (1,))))  # the second layer alone grew
    assert generation_shares([[6, 2], [1, 0, 1]], grown) == {"s0": 0.9, "s1": 0.1}
    assert generation_shares([[0, 0], [0, 0, 0]], grown) == {"s0": 0.0, "s1": 0.0}
