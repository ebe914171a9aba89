from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lifelong_moe.config.evaluation import EvaluateConfig
from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.data.tokens.windows import EvaluationSet, evaluation_windows
from lifelong_moe.evaluation.loss import evaluate
from lifelong_moe.model.domains import DocumentClusters, label_domain
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel

Make = Callable[..., LanguageModel]
CONTEXT = 16


def shard_of(documents: Sequence[Sequence[int]]) -> TokenShard:
    lengths = [len(document) for document in documents]
    return TokenShard(
        tokens=np.array([token for document in documents for token in document], dtype=np.uint16),
        offsets=np.cumsum([0, *lengths]),
        text_bytes=np.array([10 * (length - 1) for length in lengths]),
    )


def random_documents(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[0, *rng.integers(1, 61, size=n - 1).tolist()] for n in lengths]


def windows_of(documents: Sequence[Sequence[int]]) -> EvaluationSet:
    return evaluation_windows(shard_of(documents), CONTEXT, 10**9)


def naive(model: LanguageModel, documents: Sequence[Sequence[int]], distribution: str | None) -> list[float]:
    """Cross-entropy of each token, one forward pass a token, from the window that has most text before it."""
    nats = []
    for document in documents:
        if model.document_clusters is not None:
            domains = model.document_clusters.domain_ids(np.asarray(document)).tolist()
        else:
            domains = [label_domain(model.architecture, distribution)] * len(document)
        for t in range(1, len(document)):
            start = 1
            while t >= start + CONTEXT:  # window k begins at token 1 + k * 8 and is 16 tokens long
                start += CONTEXT // 2
            ids = [document[0], *document[start:t]]
            domain = [domains[0], *domains[start:t]]
            with torch.no_grad():
                hidden = model(TokenBatch(torch.tensor([ids]), domain_ids_BS=torch.tensor([domain]))).hidden_BSD[0, -1]
                nats.append(-float(model.head.logits(hidden).log_softmax(-1)[document[t]]))
    return nats


def test_each_token_is_scored_once_as_one_by_one(make_model: Make, top_k_kind: str) -> None:
    model = make_model(top_k_kind, (4, 2))
    documents = random_documents([40, 7, 17, 2, 16])
    expected = naive(model.eval(), documents, "d1")
    for batch_tokens in (16, 40, 10_000):
        found = evaluate(model, windows_of(documents), distribution="d1", batch_tokens=batch_tokens)
        assert found.tokens == len(expected) == 39 + 6 + 16 + 1 + 15
        assert found.nats_per_token == pytest.approx(np.mean(expected), abs=1e-5)
        assert found.bytes == 10 * found.tokens and found.documents == 5
        assert found.bits_per_byte == pytest.approx(found.nats_per_token / math.log(2) / 10)
        assert [sum(counts) for counts in found.expert_counts] == [2 * found.tokens] * 2
        assert all(len(counts) == 6 for counts in found.expert_counts)


def test_the_mode_stays_as_it_was(make_model: Make) -> None:
    model, windows = make_model(), windows_of(random_documents([9]))
    for training in (True, False):
        model.train(training)
        evaluate(model, windows, distribution=None, batch_tokens=64)
        assert model.training is training
    assert all(p.grad is None for p in model.parameters())


def test_domains_are_found_a_batch_of_documents_at_a_time(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Centroids are read once for all documents, not once for each; windows are filled as they are scored."""
    model, documents = make_model("document", (4, 2)), random_documents([9] * 300)
    read, filled = [], []
    centroids, batch = DocumentClusters.centroids, EvaluationSet.batch

    def counting(self: DocumentClusters) -> list[Tensor]:
        read.append(self)
        return centroids(self)

    def filling(self: EvaluationSet, rows: slice) -> Any:
        found = batch(self, rows)
        filled.append(found["token_ids"].shape)
        return found

    monkeypatch.setattr(DocumentClusters, "centroids", counting)
    monkeypatch.setattr(EvaluationSet, "batch", filling)
    found = evaluate(model, windows_of(documents), distribution=None, batch_tokens=80)
    assert len(read) == 1 and filled == [(10, 8)] * 30 and found.tokens == 300 * 8


def test_a_uniform_model_costs_ln_v(make_model: Make) -> None:
    model = make_model()
    with torch.no_grad():
        model.head.weight.zero_()
    found = evaluate(model, windows_of(random_documents([40, 5])), distribution=None, batch_tokens=64)
    assert found.nats_per_token == pytest.approx(math.log(61), abs=1e-6)


def record_scores(model: LanguageModel, documents: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Token losses in the order of the batches; one document, one window a batch."""
    kept: list[Tensor] = []

    score = model.head.token_nats

    def recording(*args: Any) -> Tensor:
        kept.append(score(*args))
        return kept[-1]

    with monkeypatch.context() as patch:
        patch.setattr(model.head, "token_nats", recording)
        evaluate(model, windows_of(documents), distribution=None, batch_tokens=CONTEXT)
    return kept


def test_later_text_changes_no_earlier_score(
    make_model: Make, router_kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(router_kind, (4, 2))
    (document,) = random_documents([32])  # tokens 1–16, 9–24, 17–31: two whole windows and a shorter one
    (other,) = random_documents([32], seed=1)
    # Same first 24 tokens, another end: document clusters of the first two windows must not see it.
    changed = document[:25] + other[25:]
    before, after = (record_scores(model, [d], monkeypatch) for d in (document, changed))
    assert [len(scores) for scores in before] == [16, 8, 7]
    for first, second in zip(before[:2], after[:2], strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    assert not torch.allclose(before[2], after[2])


def test_the_label_decides_and_an_unknown_one_is_the_first(make_model: Make) -> None:
    model, windows = make_model("label", (4, 2)), windows_of(random_documents([40]))
    first, second, unknown = (
        evaluate(model, windows, distribution=name, batch_tokens=64) for name in ("d0", "d1", "other")
    )
    assert np.array(first.expert_counts)[:, 4:].sum() == 0 and np.array(second.expert_counts)[:, :4].sum() == 0
    assert unknown == first != second


def test_other_routing_ignores_the_label(make_model: Make) -> None:
    model, windows = make_model("learned", (4, 2)), windows_of(random_documents([20]))
    results = [evaluate(model, windows, distribution=name, batch_tokens=64) for name in ("d0", "d1", None)]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("key", ["tokens", "batch_tokens"])
def test_values_out_of_range(key: str) -> None:
    with pytest.raises(Exception, match=rf"evaluate\.{key}=0 must be positive"):
        EvaluateConfig(**{key: 0})
