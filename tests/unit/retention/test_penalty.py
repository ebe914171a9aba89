from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.ops.losses import linear_cross_entropy
from lifelong_moe.retention.penalty import fisher_diagonal, make_anchor, mean_fisher

Make = Callable[..., LanguageModel]
Batch = Callable[..., dict[str, Tensor]]
VOCAB = 61


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def linear(weight: list[float], bias: float) -> nn.Linear:
    module = nn.Linear(len(weight), 1)
    module.load_state_dict({"weight": torch.tensor([weight]), "bias": torch.tensor([bias])})
    return module


def test_l2_by_hand() -> None:
    # theta - anchor = (1, -2) and 3: 0.5 / 2 * (1 + 4 + 9); its gradient is 0.5 * (theta - anchor).
    module = linear([2.0, 1.0], 3.0)
    anchor = make_anchor(module, {"weight": torch.tensor([[1.0, 3.0]]), "bias": torch.zeros(1)}, 0.5)
    value = anchor.value(module)
    assert value.dtype == torch.float32 and value.item() == 3.5
    value.backward()
    assert module.weight.grad is not None and module.bias.grad is not None
    assert module.weight.grad.tolist() == [[0.5, -1.0]] and module.bias.grad.tolist() == [1.5]


def test_ewc_by_hand() -> None:
    # 0.5 / 2 * (2 * 1 + 0 * 4 + 4 * 9); gradient 0.5 * importance * (theta - anchor).
    module = linear([2.0, 1.0], 3.0)
    old = {"weight": torch.tensor([[1.0, 3.0]]), "bias": torch.zeros(1)}
    importances = {"weight": torch.tensor([[2.0, 0.0]]), "bias": torch.tensor([4.0]), "of no interest": torch.ones(9)}
    value = make_anchor(module, old, 0.5, importances).value(module)
    value.backward()
    assert value.item() == 9.5
    assert module.weight.grad is not None and module.bias.grad is not None
    assert module.weight.grad.tolist() == [[1.0, 0.0]] and module.bias.grad.tolist() == [6.0]


def test_l2_is_ewc_with_equal_importances(make_model: Make) -> None:
    old, new = make_model(seed=0), make_model(seed=1)
    ones = {name: torch.ones_like(tensor) for name, tensor in named(old).items()}
    values = [make_anchor(new, named(old), 0.3, importances).value(new) for importances in (None, ones)]
    assert values[0].item() > 0 and torch.equal(*values)


def test_nothing_pulls_at_the_anchor(make_model: Make) -> None:
    model = make_model()
    anchor = make_anchor(model, dict(model.named_parameters()), 7.0)
    anchor.value(model).backward()
    assert anchor.value(model).item() == 0.0
    assert all(p.grad is not None and not bool(p.grad.any()) for p in model.parameters())


def test_anchors_stay_where_they_were_made(make_model: Make) -> None:
    model = make_model()
    anchor, before = make_anchor(model, dict(model.named_parameters()), 2.0), named(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in anchor.anchors.items())
    count = sum(p.numel() for p in model.parameters())  # 2 / 2 * count * 1 squared
    assert anchor.value(model).item() == pytest.approx(count, rel=1e-5)


def test_frozen_and_new_parameters_are_free(make_model: Make, make_batch: Batch) -> None:
    old = make_model()
    fisher = fisher_diagonal(old, make_batch())
    grown = make_model("learned", (4, 2))  # the first generation is frozen, the second was not there
    grown.head.weight.requires_grad_(False)
    anchor = make_anchor(grown, named(old), 1.0, fisher)
    assert set(anchor.anchors) == set(grown.trunk_parameters()) - {"head.weight"}
    assert anchor.importances is not None and anchor.importances.keys() == anchor.anchors.keys()
    anchor.value(grown).backward()
    assert {n for n, p in grown.named_parameters() if p.grad is not None} == set(anchor.anchors)


def test_a_teacher_s_weights_serve_as_well(make_model: Make) -> None:
    # They require no gradient, and the penalty must give them none.
    model, teacher = make_model(seed=0), make_model(seed=1).requires_grad_(False)
    anchor = make_anchor(model, dict(teacher.named_parameters()), 1.0)
    assert anchor.anchors.keys() == dict(model.named_parameters()).keys()
    assert not any(tensor.requires_grad for tensor in anchor.anchors.values())


@pytest.mark.parametrize("fisher", [True, False])
def test_it_follows_to_a_device(fisher: bool) -> None:
    module = linear([1.0], 0.0)
    anchor = make_anchor(module, named(module), 1.5, named(module) if fisher else None)
    moved = anchor.to("meta")
    assert moved.weight == 1.5 and moved.anchors["bias"].device.type == "meta"
    assert (moved.importances is not None) is fisher
    if moved.importances is not None:
        assert moved.importances["weight"].device.type == "meta"


def test_what_does_not_fit_is_refused() -> None:
    module = linear([1.0, 1.0], 0.0)
    with pytest.raises(ValueError, match="no trainable parameter existed"):
        make_anchor(module, {"other": torch.zeros(1)}, 1.0)
    with pytest.raises(ValueError, match="weight=-1 must not be negative"):
        make_anchor(module, named(module), -1)
    with pytest.raises(ValueError, match=r"weight of shape \(1, 2\) has no anchor of that shape"):
        make_anchor(module, {"weight": torch.zeros(1, 3)}, 1.0)
    with pytest.raises(ValueError, match=r"bias of shape \(1,\) has no importance of that shape"):
        make_anchor(module, named(module), 1.0, {"weight": torch.zeros(1, 2)})


def uniform_model(make_model: Make) -> LanguageModel:
    """Every hidden state is a row of ones and every prediction uniform."""
    model = make_model(model={"norm_eps": 1e-12})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "embedding.weight":
                parameter.fill_(1.0)
            elif name.endswith(("attention.output.weight", ".down", "head.weight")):
                parameter.zero_()
    return model


def sample_of(targets: list[list[int]]) -> dict[str, Tensor]:
    target_ids = torch.tensor(targets)
    zeros = torch.zeros_like(target_ids)
    real = torch.ones_like(target_ids, dtype=torch.bool)
    ids = {"token_ids": zeros, "target_ids": target_ids, "document_ids": zeros, "domain_ids": zeros}
    return {**ids, "mask": real, "scored": real}


def test_fisher_by_hand(make_model: Make) -> None:
    # Gradient of the mean nats in the head's row v: (1/V - share of targets that are v) * hidden, and hidden is 1.
    # F_v = S * mean over the two sequences of its square, S = 4.
    fisher = fisher_diagonal(uniform_model(make_model), sample_of([[5, 5, 5, 7], [5, 5, 7, 7]]))
    p = 1 / VOCAB
    expected = torch.full((VOCAB,), 4 * p**2)
    expected[5] = 4 * ((p - 3 / 4) ** 2 + (p - 1 / 2) ** 2) / 2
    expected[7] = 4 * ((p - 1 / 4) ** 2 + (p - 1 / 2) ** 2) / 2
    torch.testing.assert_close(fisher["head.weight"], expected.unsqueeze(1).expand(VOCAB, 16), rtol=1e-5, atol=1e-9)
    assert not bool(fisher["embedding.weight"].any())  # a head of zeros passes no gradient on


def test_fisher_is_of_answers_alone(make_model: Make) -> None:
    # One scored target in the first sequence, three in the second, none in the third: sums of gradients, squared, over
    # four tokens.
    sample = sample_of([[5, 5, 5, 7], [5, 5, 7, 7], [5, 5, 5, 5]])
    sample["scored"] = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    fisher = fisher_diagonal(uniform_model(make_model), sample)
    p = 1 / VOCAB
    expected = torch.full((VOCAB,), (p**2 + (3 * p) ** 2) / 4)
    expected[5] = (p**2 + (3 * p - 1) ** 2) / 4
    expected[7] = ((p - 1) ** 2 + (3 * p - 2) ** 2) / 4
    torch.testing.assert_close(fisher["head.weight"], expected.unsqueeze(1).expand(VOCAB, 16), rtol=1e-5, atol=1e-9)


def test_fisher_is_the_curvature_where_the_text_is_as_predicted(make_model: Make) -> None:
    # Each of V targets once in V sequences of one token: the loss's second derivative in a logit is p (1 - p).
    fisher = fisher_diagonal(uniform_model(make_model), sample_of([[v] for v in range(VOCAB)]))
    p = 1 / VOCAB
    torch.testing.assert_close(fisher["head.weight"], torch.full((VOCAB, 16), p * (1 - p)), rtol=1e-5, atol=0)


def test_fisher_is_the_squared_gradient_of_each_sequence(make_model: Make, make_batch: Batch, router_kind: str) -> None:
    model, batch = make_model(router_kind, (4, 2)).eval(), make_batch(blocks=3, domains=2)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for row in range(3):
        model.zero_grad()
        ids, documents, groups = (batch[name][row : row + 1] for name in ("token_ids", "document_ids", "domain_ids"))
        hidden = model(TokenBatch(ids, documents, groups)).hidden_BSD[0]
        linear_cross_entropy(hidden, model.head.weight, batch["target_ids"][row]).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                expected[name] += 16 * parameter.grad**2 / 3
    model.zero_grad()
    fisher = fisher_diagonal(model, batch)
    assert fisher.keys() == expected.keys()
    for name, tensor in fisher.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-8, msg=name)


def test_fisher_counts_scored_tokens_alone(make_model: Make) -> None:
    """Three targets, of which a row of four has two: (2 p - 2)² and p² summed, over three tokens, in the row of 5."""
    sample = sample_of([[5, 5, 9, 9], [7, 9, 9, 9]])
    sample["scored"] = torch.tensor([[True, True, False, False], [True, False, False, False]])
    sample["mask"] = sample["scored"].clone()
    fisher = fisher_diagonal(uniform_model(make_model), sample)["head.weight"]
    p = 1 / VOCAB
    assert fisher[5].tolist() == pytest.approx([((2 * p - 2) ** 2 + p**2) / 3] * 16, rel=1e-5)
    assert fisher[7].tolist() == pytest.approx([((2 * p) ** 2 + (p - 1) ** 2) / 3] * 16, rel=1e-5)
    assert fisher[9].tolist() == pytest.approx([((2 * p) ** 2 + p**2) / 3] * 16, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_fisher_leaves_the_model_as_it_was(make_model: Make, make_batch: Batch, training: bool) -> None:
    model = make_model("learned", (4, 2)).train(training)
    model.norm.weight.grad = torch.full((16,), 3.0)
    before, trained = named(model), [p.requires_grad for p in model.parameters()]
    fisher = fisher_diagonal(model, make_batch())
    assert set(fisher) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert model.training is training and [p.requires_grad for p in model.parameters()] == trained
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["norm.weight"]
    assert model.norm.weight.grad.tolist() == [3.0] * 16
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert not any(tensor.requires_grad for tensor in fisher.values())


def test_the_mean_of_distributions() -> None:
    fishers = [{"a": torch.tensor([1.0, 4.0])}, {"a": torch.tensor([3.0, 0.0])}]
    assert mean_fisher(fishers)["a"].tolist() == [2.0, 2.0]
    assert mean_fisher(fishers[:1])["a"].tolist() == [1.0, 4.0]


def test_no_text_and_no_distribution_are_refused(make_model: Make) -> None:
    nothing = {name: tensor[:0] for name, tensor in sample_of([[1]]).items()}
    with pytest.raises(ValueError, match="at least one scored token"):
        fisher_diagonal(make_model(), nothing)
    with pytest.raises(ValueError, match="cannot average 0"):
        mean_fisher([])
    with pytest.raises(ValueError, match="cannot average 2"):
        mean_fisher([{"a": torch.ones(1)}, {"b": torch.ones(1)}])
