from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong_moe.model.cache import KeyValueCache
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel, initialize
from lifelong_moe.ops.document_attention import document_attention_mask
from lifelong_moe.ops.rotary import inverse_frequencies, rotary_tables, rotate
from lifelong_moe.plan.architecture import Architecture, Generation
from lifelong_moe.routing.base import Router
from lifelong_moe.routing.routers.cluster import TokenClusterRouter

Make = Callable[..., LanguageModel]
MakeArchitecture = Callable[..., Architecture]


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(seed))


def first_domain(ids: Tensor, **more: Tensor) -> TokenBatch:
    """Tokens of the first generation or cluster, if a model has several."""
    return TokenBatch(ids, domain_ids_BS=torch.zeros_like(ids), **more)


def test_documents_of_a_block_do_not_see_each_other(make_model: Make, router_kind: str) -> None:
    model = make_model(router_kind, (4, 2), model={"document_mask": True}).eval()
    ids = random_ids(1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])
    with torch.no_grad():
        packed = model(first_domain(ids, document_ids_BS=documents)).hidden_BSD
        # Rotary positions only matter by their differences, so a document may begin at any of them.
        alone = torch.cat([model(first_domain(part)).hidden_BSD for part in ids.split([5, 4, 3], dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


def test_without_the_mask_a_block_is_one_sequence(make_model: Make) -> None:
    model, ids = make_model().eval(), random_ids(1, 12)
    documents = torch.tensor([[0] * 6 + [1] * 6])
    with torch.no_grad():
        together = model(TokenBatch(ids)).hidden_BSD
        assert torch.equal(model(TokenBatch(ids, document_ids_BS=documents)).hidden_BSD, together)


@pytest.mark.parametrize("kind", ["document", "label", "bundles", "labelled_bundles"])
def test_tokens_of_no_domain_are_an_error_and_not_the_first_generation_s(make_model: Make, kind: str) -> None:
    model, ids = make_model(kind, (4, 2)).eval(), random_ids(2, 8)
    with pytest.raises(
        ValueError, match=r"give domain_ids_BS, .* or read texts with the model that lifelong_moe\.load"
    ):
        model(TokenBatch(ids))
    assert model(first_domain(ids)).hidden_BSD.isfinite().all()
    if kind != "document":  # one generation has no other
        alone = make_model(kind, (4,)).eval()
        assert torch.equal(alone(TokenBatch(ids)).hidden_BSD, alone(first_domain(ids)).hidden_BSD)


def test_the_mask_by_hand() -> None:
    mask = document_attention_mask(torch.tensor([[3, 3, 5]]))
    assert mask.tolist() == [[[[True, False, False], [True, True, False], [False, False, True]]]]


def test_rotary_angles_by_hand() -> None:
    cos, sin = rotary_tables(3, inverse_frequencies(4, 100.0))
    angles = torch.tensor([[0.0, 0.0], [1.0, 0.1], [2.0, 0.2]]).repeat(1, 2)
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())
    # Halves turn against each other: (1, 0, 0, 0) at position 1 becomes (cos 1, 0, sin 1, 0).
    turned = rotate(torch.tensor([1.0, 0, 0, 0]), cos[1], sin[1])
    torch.testing.assert_close(turned, torch.tensor([math.cos(1), 0, math.sin(1), 0]))


def test_right_padding_changes_nothing(make_model: Make, router_kind: str) -> None:
    model, ids = make_model(router_kind, (4, 2)).eval(), random_ids(2, 10)
    padded = F.pad(ids, (0, 3))
    mask = torch.arange(13).expand(2, 13) < 10
    with torch.no_grad():
        found = model(first_domain(padded, mask_BS=mask)).hidden_BSD[:, :10]
        torch.testing.assert_close(found, model(first_domain(ids)).hidden_BSD, atol=1e-5, rtol=0)


def test_tied_embeddings_are_one_tensor(make_model: Make) -> None:
    model = make_model(model={"tie_embeddings": True})
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())
    hidden = model(TokenBatch(random_ids(1, 4))).hidden_BSD
    torch.testing.assert_close(model.head.logits(hidden), hidden @ model.embedding.weight.t())
    stored = model.state_dict()
    assert "head.weight" not in stored  # once, as the embedding
    other = make_model(model={"tie_embeddings": True}, seed=1)
    other.load_state_dict(stored, strict=True)
    assert other.head.weight is other.embedding.weight and torch.equal(other.head.weight, model.head.weight)
    assert "embedding.weight" in model.requires_grad_(False).stored_names(trained=False)
    untied = make_model()
    assert untied.head.weight is not untied.embedding.weight


def test_initialization_is_a_function_of_the_seed(make_architecture: MakeArchitecture) -> None:
    models = [LanguageModel(make_architecture()) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        torch.manual_seed(seed + len(model.blocks))  # the global generator is not looked at
        initialize(model, seed)
    first, second, other = ([p.detach() for p in model.parameters()] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True) if a.dim() > 1)


def test_initial_deviations(make_architecture: MakeArchitecture) -> None:
    shape = {"width": 64, "expert_width": 64, "layers": 2, "init_std": 0.02}
    model = LanguageModel(make_architecture(model=shape))
    initialize(model, 0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones(64))
        else:
            expected = 0.01 if name.endswith(("output.weight", "down")) else 0.02  # sqrt(2 * 2 layers) = 2
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.15), name


def test_banks_follow_the_architecture(make_model: Make) -> None:
    model = make_model("learned", (4, 2, 3))
    for layer in model.moe_layers():
        assert [(len(g), g.trains) for g in layer.banks.born] == [(4, False), (2, False), (3, True)]
        assert layer.router.generations == [4, 2, 3] and layer.router.num_experts == 9
        trained = [p.requires_grad for p in layer.router.parameters()]
        assert trained == [False, False, True]
    trainable = {n for n in model.stored_names(trained=True) if ".experts." in n}
    assert {int(name.split(".experts.")[1].split(".")[0]) for name in trainable} == {6, 7, 8}
    assert not any(".moe." in name for name in model.trunk_parameters())
    assert "blocks.0.attention.query.weight" in model.trunk_parameters()


def test_an_expert_without_tokens_has_a_zero_gradient_not_none(make_model: Make) -> None:
    model = make_model("label", (2, 2))
    model(TokenBatch(random_ids(2, 8), domain_ids_BS=torch.zeros(2, 8, dtype=torch.int64))).hidden_BSD.sum().backward()
    for layer in model.moe_layers():
        frozen, active = layer.banks.born
        assert all(p.grad is not None and not p.grad.any() for p in active.parameters())
        assert all(p.grad is None for p in frozen.parameters())


def test_weights_survive_a_state_dict(make_model: Make, make_architecture: MakeArchitecture, router_kind: str) -> None:
    model, ids = make_model(router_kind, (4, 2)).eval(), random_ids(2, 8)
    again = LanguageModel(make_architecture(router_kind, (4, 2))).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(model(first_domain(ids)).hidden_BSD, again(first_domain(ids)).hidden_BSD)
    routers: list[Router] = [layer.router for layer in again.moe_layers()]
    assert not any(isinstance(router, TokenClusterRouter) and router.hashing for router in routers)


def test_architecture_survives_json(make_architecture: MakeArchitecture, router_kind: str) -> None:
    architecture = make_architecture(router_kind, (4, 2), model={"tie_embeddings": True})
    assert Architecture.from_json(json.loads(json.dumps(architecture.to_json()))) == architecture


def test_architecture_grows_and_learns_labels(make_architecture: MakeArchitecture) -> None:
    first = make_architecture("learned", (4,)).labelled("english")
    second = first.grown(Generation("s1", 2)).labelled("python")
    assert (first.frozen, second.frozen) == (0, 1)
    assert second.expert_births(0) == second.expert_births(1) == ["s0"] * 4 + ["s1"] * 2
    assert second.num_experts == second.experts_in(0) == 6 and second.labels == (("english", 0), ("python", 1))
    # A distribution that comes back and grows moves to its new experts; otherwise they would never see a token.
    assert second.grown(Generation("s2", 2)).labelled("english").labels == (("english", 2), ("python", 1))


def test_generations_of_some_layers(make_architecture: MakeArchitecture) -> None:
    first = make_architecture("learned", (4,), model={"layers": 3})
    second = first.grown(Generation("s1", 2, layers=(0, 2))).grown(Generation("s2", 3, layers=(2,)))
    assert [second.experts_in(layer) for layer in range(3)] == [6, 4, 9] and second.num_experts == 9
    assert [second.expert_births(layer) for layer in range(3)] == [
        ["s0"] * 4 + ["s1"] * 2, ["s0"] * 4, ["s0"] * 4 + ["s1"] * 2 + ["s2"] * 3,
    ]  # fmt: skip
    assert Architecture.from_json(json.loads(json.dumps(second.to_json()))) == second


def test_growth_that_freezes_nothing(make_architecture: MakeArchitecture) -> None:
    first = make_architecture("learned", (4, 2))
    assert first.grown(Generation("s2", 2), freezes=False).frozen == 1
    assert first.grown(Generation("s2", 2)).frozen == 2


def test_deltas_belong_to_their_generation(make_model: Make, make_architecture: MakeArchitecture) -> None:
    born = (4, Generation("s1", 2, delta_rank=3), Generation("s2", 2, layers=(1,), delta_rank=2), Generation("s3", 1))
    architecture = make_architecture("labelled_bundles", born)
    assert architecture.has_deltas and not make_architecture("labelled_bundles", (4, 2)).has_deltas
    assert Architecture.from_json(json.loads(json.dumps(architecture.to_json()))) == architecture
    for count, newest in ((3, "2"), (2, "1")):
        model = LanguageModel(make_architecture("labelled_bundles", born[:count]))
        found = set(model.parameters_of(generation=count - 1))
        deltas = {name for name, _ in model.named_parameters() if f".deltas.{newest}." in name}
        assert len(deltas) == 20 and deltas < found
        assert {name for name, p in model.named_parameters() if p.requires_grad and p.numel()} == (
            found | set(model.trunk_parameters())
        )
        assert not any(".deltas." in name for name in model.trunk_parameters())
    assert not any(".0.moe." in name for name in LanguageModel(
        make_architecture("labelled_bundles", born[:3])).parameters_of(generation=2))  # fmt: skip
    model.freeze_generations()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(model.trunk_parameters())


def test_deltas_begin_at_zero(make_architecture: MakeArchitecture) -> None:
    born = (4, Generation("s1", 2, delta_rank=8))
    model = LanguageModel(make_architecture("labelled_bundles", born, model={"width": 64}))
    initialize(model, 0)
    for matrix in model.delta_matrices():
        delta = matrix.deltas["1"]
        assert not delta.up.any()
        assert float(delta.down.detach().std()) == pytest.approx(1 / 8, rel=0.15)  # 64 columns


def test_a_cache_takes_one_token_at_a_time(make_model: Make) -> None:
    model, ids = make_model().eval(), random_ids(1, 4)
    cache = KeyValueCache(len(model.blocks), 8)
    model(TokenBatch(ids), cache=cache)
    with pytest.raises(ValueError, match="one token at a time"):
        model(TokenBatch(ids), cache=cache)


def test_a_model_of_many_generations_is_made_in_one_walk(
    make_architecture: MakeArchitecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A walk through all modules for each generation would cost the square of their number."""
    walks: list[str] = []
    modules = LanguageModel.modules
    monkeypatch.setattr(LanguageModel, "modules", lambda self: (walks.append("walked"), modules(self))[1])
    monkeypatch.setattr(LanguageModel, "_apply", lambda self, *more: (walks.append("moved"), self)[1])
    architecture = make_architecture("learned", (2,) * 9)
    model = LanguageModel(architecture)
    assert len(model.architecture.generations) == 9
    assert walks == ["walked"]
    model.add_generation(Generation("more", 2))
    model.freeze_generations()
    assert walks == ["walked"]  # nor is it moved to where it is
