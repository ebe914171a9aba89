"""What is seen of a model while it reads; and that looking changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.data.tokens.windows import EvaluationSet, evaluation_windows
from lifelong_moe.evaluation.loss import evaluate
from lifelong_moe.evaluation.probing import (
    expert_names,
    expert_similarities,
    observe,
    observe_text,
    routing_columns,
    shuffled_experts,
)
from lifelong_moe.evaluation.specialization import derangement
from lifelong_moe.model.transformer import LanguageModel, initialize
from lifelong_moe.plan.architecture import Architecture, Generation
from lifelong_moe.reports.inspection import Readings, build_inspection

Make = Callable[..., LanguageModel]
CONTEXT = 16
LENGTHS = [40, 7, 17, 2, 16]


def documents_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[0, *rng.integers(1, 61, size=n - 1).tolist()] for n in lengths]


def windows_of(documents: Sequence[Sequence[int]]) -> EvaluationSet:
    tokens = np.array([token for document in documents for token in document], dtype=np.uint16)
    offsets = np.cumsum([0, *(len(document) for document in documents)])
    shard = TokenShard(tokens, offsets, np.array([len(document) for document in documents]))
    return evaluation_windows(shard, CONTEXT, 10**9)


def loss(model: LanguageModel, windows: EvaluationSet) -> float:
    return evaluate(model, windows, distribution="d0", batch_tokens=64).nats_per_token


@pytest.fixture
def uneven(make_architecture: Callable[..., Architecture]) -> LanguageModel:
    """A model of which only the second layer grew."""
    generations = (Generation("s0", 4), Generation("s1", 2, layers=(1,)))
    model = LanguageModel(dataclasses.replace(make_architecture("learned", (4, 2)), generations=generations))
    initialize(model, 0)
    return model


def test_every_token_that_predicts_is_seen_once_in_reading_order(make_model: Make, top_k_kind: str) -> None:
    model, documents = make_model(top_k_kind, (4, 2)), documents_of(LENGTHS)
    windows = windows_of(documents)
    seen = observe(model, windows, distribution="d1")
    assert model.training
    assert seen.token_ids_T.tolist() == [token for document in documents for token in document[:-1]]
    assert seen.position_T.tolist() == [t for n in LENGTHS for t in range(n - 1)]
    assert seen.document_T.tolist() == [i for i, n in enumerate(LENGTHS) for _ in range(n - 1)]
    counts = [np.bincount(ids_TK.ravel(), minlength=6).tolist() for ids_TK in seen.expert_ids]
    assert counts == evaluate(model, windows, distribution="d1", batch_tokens=64).expert_counts
    assert [weights.shape for weights in seen.weights] == [(len(seen), 2)] * 2


def test_a_text_is_seen_to_its_last_token_and_never_ahead(make_model: Make, router_kind: str) -> None:
    model = make_model(router_kind, (4, 2))
    (first,), (second,) = documents_of([41]), documents_of([41], seed=1)
    ids, changed = first[1:], first[1:30] + second[30:]
    seen, other, start = (observe_text(model, part, distribution="d0") for part in (ids, changed, ids[:29]))
    assert seen.token_ids_T.tolist() == ids and len(start) == 29
    for layer in range(2):
        for beginning in (other.expert_ids[layer][:29], start.expert_ids[layer]):
            np.testing.assert_array_equal(seen.expert_ids[layer][:29], beginning)
        np.testing.assert_allclose(seen.weights[layer][:29], start.weights[layer], atol=1e-6)
    with pytest.raises(ValueError, match="no token"):
        observe_text(model, [], distribution=None)


def test_shuffled_experts_are_those_of_a_model_whose_experts_swapped_places(make_model: Make, top_k_kind: str) -> None:
    model, windows = make_model(top_k_kind, (4, 2)), windows_of(documents_of(LENGTHS))
    before, state = loss(model, windows), {name: t.clone() for name, t in model.state_dict().items()}
    with shuffled_experts(model, seed=5):
        shuffled = loss(model, windows)
    assert loss(model, windows) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    rng = np.random.default_rng(5)
    for layer in model.moe_layers():
        experts = layer.banks.matrices()
        copies = [(into.clone(), down.clone()) for into, down in experts]
        for (into, down), e in zip(experts, derangement(6, rng), strict=True):
            into.copy_(copies[e][0])
            down.copy_(copies[e][1])
    assert loss(model, windows) == pytest.approx(shuffled, abs=1e-6)
    assert abs(shuffled - before) > 1e-3


def test_an_error_within_restores_the_experts(make_model: Make) -> None:
    model, windows = make_model("learned", (4,)), windows_of(documents_of([20]))
    before = loss(model, windows)
    with pytest.raises(RuntimeError), shuffled_experts(model):
        raise RuntimeError
    assert loss(model, windows) == before


def test_similarity_of_experts_that_are_equal_and_opposite(make_model: Make) -> None:
    model, windows = make_model("learned", (4,)), windows_of(documents_of(LENGTHS))
    for layer in model.moe_layers():
        (gate_up, down), second, third, _ = layer.banks.matrices()
        for expert, sign in ((second, 1.0), (third, -1.0)):
            expert[0].copy_(gate_up)
            expert[1].copy_(sign * down)
    for matrix in expert_similarities(model, [(windows, None), (windows, None)], num_inputs=30):
        np.testing.assert_allclose(matrix[:3, :3], [[1, 1, -1], [1, 1, -1], [-1, -1, 1]], atol=1e-6)
        assert abs(matrix[0, 3]) < 0.9 and matrix[3, 3] == pytest.approx(1.0)
    assert not any(layer._forward_pre_hooks for layer in model.moe_layers())


def test_layers_of_different_size(uneven: LanguageModel) -> None:
    model, windows = uneven, windows_of(documents_of(LENGTHS))
    assert expert_names(model.architecture, 0) == [f"s0/L0/E{e}" for e in range(4)]
    assert expert_names(model.architecture, 1)[3:] == ["s0/L1/E3", "s1/L1/E4", "s1/L1/E5"]
    observed = {name: observe(model, windows, distribution=name) for name in ("d0", "d1")}
    with shuffled_experts(model):
        loss(model, windows)
    found = build_inspection(
        model.architecture,
        Readings(observed, {"s0": observed}, expert_similarities(model, [(windows, None)]), {"d0": (2.0, 3.0)}),
        stages=["s0", "s1"],
        learned_in={"d0": 0, "d1": 1},
        name_token=str,
    )
    first, second = found["layers"]
    assert (len(first["similarity"]), len(second["similarity"])) == (4, 6)
    assert (len(first["coactivation"]), len(second["coactivation"])) == (4, 6)
    later = sum(second["counts"]["d0"][4:]) / sum(second["counts"]["d0"])
    assert first["leak"] == {"d0": 0.0, "d1": 0.0}
    assert second["leak"] == {"d0": pytest.approx(later), "d1": 0.0} and later > 0
    # Both distributions are the same text here, so that experts know nothing of it, and a model agrees with itself.
    assert second["distribution"]["nats"] == pytest.approx(0.0, abs=1e-12)
    assert found["saturation"] == {"s0": {"d0": [1.0, 1.0], "d1": [1.0, 1.0]}}
    assert found["shuffled"] == {"d0": {"nats_per_token": 2.0, "shuffled_nats_per_token": 3.0}}


def test_columns_have_a_row_a_token_and_layer(uneven: LanguageModel) -> None:
    seen = observe_text(uneven, [7, 9, 7], distribution=None)
    tables = list(routing_columns(uneven.architecture, seen, "d0", lambda token_id: f"<{token_id}>"))
    assert [table["layer"].tolist() for table in tables] == [[0] * 3, [1] * 3]
    assert tables[1]["token"] == ["<7>", "<9>", "<7>"] and tables[1]["position"].tolist() == [1, 2, 3]
    for table in tables:
        indices = [[int(name.rsplit("E", 1)[1]) for name in row] for row in table["experts"]]
        assert indices == table["expert_ids"].tolist()
