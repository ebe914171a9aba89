"""The divergence from kept predictions: that of all probabilities, or of those that were kept and the rest as one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lifelong_moe.config.routing.mixture import MixtureConfig
from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.data.tokens.windows import EvaluationSet, evaluation_windows
from lifelong_moe.evaluation import predictions
from lifelong_moe.evaluation.predictions import Predictions
from lifelong_moe.evaluation.reading import read_windows
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.ops.losses import distillation_loss
from lifelong_moe.plan.architecture import Generation

Make = Callable[..., LanguageModel]


@pytest.fixture
def windows() -> EvaluationSet:
    draw = np.random.default_rng(0)
    rows = [np.concatenate([[0], draw.integers(1, 61, n)]) for n in (30, 9, 14)]
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    return evaluation_windows(TokenShard(np.concatenate(rows), offsets, np.ones(3, np.int64)), 16, 1000)


def logits(model: LanguageModel, windows: EvaluationSet, distribution: str | None) -> Tensor:
    """Log probabilities of all scored tokens, in the order of the text."""
    parts = [*read_windows(model, windows, distribution=distribution, batch_tokens=1000)]
    order = torch.from_numpy(np.argsort(np.concatenate([one.tokens(windows) for one in parts])))
    return torch.cat([one.log_probabilities(model, torch.arange(len(one.nats_T))) for one in parts])[order].detach()


def moved(model: LanguageModel, factor: float = 1.2) -> LanguageModel:
    """The model with other weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


@pytest.mark.parametrize("kind", ["learned", "bundles", "mixture", "labelled_bundles", "dense"])
def test_it_is_the_divergence_of_all_probabilities_where_all_are_kept(
    make_model: Make, windows: EvaluationSet, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "CHUNK_TOKENS", 7)
    kind, routing = ("bundles", {"mixture": MixtureConfig()}) if kind == "mixture" else (kind, {})
    model = make_model(kind, (4, 2), routing=routing)
    before = logits(model, windows, "d1")
    kept = Predictions.of(model, windows, distribution="d1", batch_tokens=32)
    assert kept.ids_TK.shape == (53, 61) and not kept.rest_T.any()
    after = logits(moved(model), windows, "d1")
    found = kept.divergence(model, windows, distribution="d1", batch_tokens=48)
    assert found == pytest.approx(float(distillation_loss(after, before, 1.0)), rel=1e-5) and found > 0.01
    assert model.training


def test_what_is_not_kept_counts_as_one(
    make_model: Make, windows: EvaluationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "KEPT", 5)
    model = make_model()
    old = logits(model, windows, None).double().softmax(dim=1)
    kept = Predictions.of(model, windows, distribution=None, batch_tokens=32)
    new = logits(moved(model, 2.0), windows, None).double().softmax(dim=1)
    # By loops: five probabilities and what is left of 1, of both models.
    total = 0.0
    for p, q in zip(old, new, strict=True):
        top = p.argsort(descending=True)[:5]
        pairs = [(p[i], q[i]) for i in top] + [(1 - p[top].sum(), 1 - q[top].sum())]
        total += sum(float(a * (a / b).log()) for a, b in pairs)
    found = kept.divergence(model, windows, distribution=None, batch_tokens=32)
    assert found == pytest.approx(total / len(old), rel=1e-4)
    assert 0.01 < found < float((old * (old / new).log()).sum(dim=1).mean())


def test_a_model_that_has_not_moved_is_at_no_distance(make_model: Make, windows: EvaluationSet) -> None:
    model = make_model("bundles", (4, 2))
    kept = Predictions.of(model, windows, distribution=None, batch_tokens=32)
    assert kept.divergence(model, windows, distribution=None, batch_tokens=32) == pytest.approx(0, abs=1e-6)


def test_tokens_that_a_generation_may_not_predict_are_no_nan(make_model: Make, windows: EvaluationSet) -> None:
    model = make_model("labelled_bundles", (4, Generation("s1", 2, tokens=5)))
    # The text of the first generation, whose logits of the five added tokens are minus infinity.
    kept = Predictions.of(model, windows, distribution="d0", batch_tokens=32)
    assert kept.ids_TK.shape[1] == 61 and bool(kept.logs_TK.isfinite().all()) and not kept.rest_T.any()
    found = kept.divergence(moved(model), windows, distribution="d0", batch_tokens=32)
    assert 0.01 < found < 10
