"""Likelihoods of ends of texts: the sums of held-out losses, whatever shares a batch with them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.data.tokens.windows import evaluation_windows
from lifelong_moe.errors import ConfigError
from lifelong_moe.evaluation.documents import measure_documents
from lifelong_moe.evaluation.requests import Pass, Request, score
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel

Make = Callable[..., LanguageModel]
CONTEXT = 16
HOW = Pass(CONTEXT)


def texts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random texts, BOS first."""
    rng = np.random.default_rng(seed)
    return [[0, *rng.integers(1, 61, size=n - 1).tolist()] for n in lengths]


def whole(documents: list[list[int]]) -> list[Request]:
    return [Request(i, len(text), len(text) - 1) for i, text in enumerate(documents)]


@pytest.mark.parametrize("distribution", [None, "d1"])
def test_a_whole_text_has_its_held_out_loss(make_model: Make, router_kind: str, distribution: str | None) -> None:
    model, documents = make_model(router_kind, (4, 2)), texts(9, 17, 2, 12)
    tokens = np.array([token for text in documents for token in text], np.uint16)
    shard = TokenShard(tokens, np.cumsum([0, 9, 17, 2, 12]), np.ones(4, np.int64))
    windows = evaluation_windows(shard, CONTEXT, 10**9)
    expected = measure_documents(model, windows, distribution=distribution, batch_tokens=64)
    found = score(model, documents, whole(documents), Pass(CONTEXT, distribution=distribution))
    np.testing.assert_allclose(found.nats, -expected.nats, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, None])
def test_an_end_is_scored_from_what_precedes_it(make_model: Make, rows: int | None) -> None:
    model, documents = make_model(), texts(6, 14, 9)
    asked = [Request(1, 14, 3), Request(0, 6, 1), Request(2, 9, 8), Request(1, 7, 2)]
    found = score(model, documents, asked, Pass(CONTEXT, rows))
    for i, one in enumerate(asked):
        ids = torch.tensor([documents[one.text][: one.end]])
        with torch.no_grad():
            logits = model.head.logits(model(TokenBatch(ids[:, :-1])).hidden_BSD[0])[-one.scored :]
        targets = ids[0, -one.scored :]
        expected = -float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        assert found.nats[i] == pytest.approx(expected, rel=1e-5)
        assert found.is_greedy[i] == bool((logits.argmax(-1) == targets).all())


def test_what_the_model_writes_is_greedy(make_model: Make) -> None:
    model, (text,) = make_model(), texts(5)
    for _ in range(3):
        with torch.no_grad():
            text.append(int(model.head.logits(model(TokenBatch(torch.tensor([text]))).hidden_BSD[0, -1]).argmax()))
    other = [*text[:-1], (text[-1] + 1) % 61]
    found = score(model, [text, other], [Request(0, 8, 3), Request(1, 8, 3)], HOW)
    assert found.is_greedy.tolist() == [True, False]


def test_a_long_text_loses_its_beginning_and_bos_with_it(make_model: Make) -> None:
    model, (text,) = make_model(), texts(40)
    cut = score(model, [text], [Request(0, 40, 4)], HOW)
    alone = score(model, [text[-CONTEXT - 1 :]], [Request(0, CONTEXT + 1, 4)], HOW)
    assert cut.nats[0] == pytest.approx(alone.nats[0], rel=1e-6)
    with_bos = score(model, [[0, *text[-CONTEXT:]]], [Request(0, CONTEXT + 1, 4)], HOW)
    assert abs(cut.nats[0] - with_bos.nats[0]) > 1e-4


def test_bos_is_read_only_where_it_stands(make_model: Make) -> None:
    model, (text,) = make_model(), texts(8)
    found = score(model, [text, text[1:]], [Request(0, 8, 2), Request(1, 7, 2)], HOW)
    with torch.no_grad():
        hidden_SD = model(TokenBatch(torch.tensor([text[1:-1]]))).hidden_BSD[0, -2:]
        logits = model.head.logits(hidden_SD).log_softmax(-1)
    assert found.nats[1] == pytest.approx(float(logits[[0, 1], text[-2:]].sum()), rel=1e-5)
    assert abs(found.nats[0] - found.nats[1]) > 1e-4


def test_domains_are_chosen_by_the_whole_text(make_model: Make) -> None:
    """Its beginning, too, which the model does not read."""
    model = make_model("bundles", (4, 2))
    assert model.document_clusters is not None
    chosen = {}
    for seed in range(20):
        (text,) = texts(40, seed=seed)
        domains_N = model.document_clusters.domain_ids(np.asarray(text))
        ids, domains = torch.tensor([text[-CONTEXT - 1 : -1]]), torch.from_numpy(domains_N[-CONTEXT - 1 : -1])
        with torch.no_grad():
            hidden_BSD = model(TokenBatch(ids, torch.zeros_like(ids), domains.unsqueeze(0))).hidden_BSD
            logits = model.head.logits(hidden_BSD[0, -1:], domains[-1:])
        expected = float(logits.log_softmax(-1)[0, text[-1]])
        assert score(model, [text], [Request(0, 40, 1)], HOW).nats[0] == pytest.approx(expected, rel=1e-5)
        chosen[int(domains[-1])] = True
    assert len(chosen) == 2


def test_nothing_is_asked_or_too_much(make_model: Make) -> None:
    model, (text,) = make_model(), texts(40)
    assert len(score(model, [text], [], HOW).nats) == 0
    with pytest.raises(ConfigError, match=r"17 tokens are to be scored at once, but the context is 16\."):
        score(model, [text], [Request(0, 40, 17)], HOW)
