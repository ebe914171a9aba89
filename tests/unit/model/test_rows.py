"""Tokens that a generation added: rows of embedding and head that older generations neither see nor predict.

Legend: T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong_moe.config.growth import GrowConfig
from lifelong_moe.config.parts import Part, TensorName
from lifelong_moe.errors import ConfigError
from lifelong_moe.growth.grow import begin_rows, grow
from lifelong_moe.growth.remove import remove_generation
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Architecture, Generation
from lifelong_moe.plan.cost import count_parameters, parameters_by_part
from lifelong_moe.storage.plain import PlainError

Make = Callable[..., LanguageModel]
Batch = Callable[..., dict[str, Tensor]]
OLD = 61
PIECES = [[3, 7], [5, 5, 9], [7, 2]]


@pytest.fixture(params=["tied", "untied", "deltas", "tied deltas"])
def grown(request: pytest.FixtureRequest, make_model: Make, make_batch: Batch) -> tuple[LanguageModel, LanguageModel]:
    """A model before and after it grew by three tokens, bundles by label, its new parts changed as training would."""
    shape = {"tie_embeddings": "tied" in request.param.split(), "document_mask": True}
    rank = 2 * ("deltas" in request.param)
    before, model = (make_model("labelled_bundles", (4,), model=shape) for _ in range(2))
    grow(model, Generation("s1", 2, delta_rank=rank, tokens=3), GrowConfig(), make_batch(), 0, PIECES)
    with torch.no_grad():  # as if it had been trained: its means are then those of changed rows
        for parameter in model.parameters_of(generation=1).values():
            parameter += 0.1
    begin_rows(model, PIECES)
    return before, model


def outputs(model: LanguageModel, ids_BS: Tensor, generation: int) -> Tensor:
    domains_BS = torch.full_like(ids_BS, generation)
    return model.head.logits(model(TokenBatch(ids_BS, domain_ids_BS=domains_BS)).hidden_BSD, domains_BS)


@torch.no_grad()
def test_an_old_generation_predicts_what_it_did(grown: tuple[LanguageModel, LanguageModel], make_batch: Batch) -> None:
    before, model = grown
    ids_BS = make_batch()["token_ids"]
    then, now = outputs(before.eval(), ids_BS, 0), outputs(model.eval(), ids_BS, 0)
    assert now.shape[-1] == OLD + 3 and torch.equal(now[..., :OLD], then)
    assert now[..., OLD:].isneginf().all()
    hidden_TD, targets_T = model.embedding(ids_BS).flatten(0, 1), ids_BS.flatten()
    domains_T = torch.zeros_like(targets_T)
    found = model.head.token_nats(hidden_TD, targets_T, domains_T)
    assert torch.equal(found, before.head.token_nats(hidden_TD, targets_T, domains_T))


@torch.no_grad()
def test_new_rows_begin_as_the_mean_of_their_pieces(grown: tuple[LanguageModel, LanguageModel]) -> None:
    _, model = grown
    for row, ids in enumerate(PIECES):
        own = model.embedding.look_up(1, torch.tensor(ids)).mean(dim=0)
        assert torch.allclose(model.embedding.look_up(1, torch.tensor([OLD + row]))[0], own)
        if not model.architecture.model.tie_embeddings:
            assert torch.allclose(model.head.weight_of(1)[OLD + row], model.head.weight_of(1)[ids].mean(dim=0))
    assert len(model.head.weight_of(0)) == OLD


def test_a_mix_of_generations_by_hand(grown: tuple[LanguageModel, LanguageModel]) -> None:
    """Embedding, losses and gradients of both generations in one batch, against one token at a time."""
    _, model = grown
    ids_T, domains_T = torch.tensor([4, OLD + 1, 60, OLD, 4]), torch.tensor([0, 1, 0, 1, 1])
    looked_TD = model.embedding(ids_T, model.embedding.slices(domains_T))
    one_by_one = torch.stack(
        [model.embedding.look_up(int(g), i[None])[0] for g, i in zip(domains_T, ids_T, strict=True)]
    )
    assert torch.equal(looked_TD, one_by_one)
    hidden_TD = torch.randn(5, looked_TD.shape[-1], generator=torch.Generator().manual_seed(1))
    own = [parameter for name, parameter in model.named_parameters() if ".added." in name]
    assert own and all(parameter.requires_grad for parameter in own)
    expected = torch.stack([F.cross_entropy(F.linear(h, model.head.weight_of(int(g))), i)
                            for h, g, i in zip(hidden_TD, domains_T, ids_T, strict=True)]).mean()  # fmt: skip
    found = model.head.cross_entropy(hidden_TD, ids_T, domains_T)
    assert torch.allclose(found, expected, atol=1e-6)
    for one, other in zip(torch.autograd.grad(found, own[-1]), torch.autograd.grad(expected, own[-1]), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    nats_T = model.head.token_nats(hidden_TD, ids_T, domains_T)
    assert torch.allclose(nats_T.mean(), expected.detach(), atol=1e-6)


def test_rows_belong_to_their_generation(grown: tuple[LanguageModel, LanguageModel]) -> None:
    _, model = grown
    tied, architecture = model.architecture.model.tie_embeddings, model.architecture
    rows = {name: place for name, place in model.places().items() if ".added." in name}
    assert {*rows} == {"embedding.added.1"} | ({"head.added.1"} if not tied else set())
    assert all((place.generation, place.is_trunk) == (1, False) for place in rows.values())
    assert rows["embedding.added.1"].part == Part.embedding and TensorName.parse("head.added.1").generation == 1
    state = model.state_dict()
    assert ("head.added.1" in state, "head.weight" in state) == (not tied, not tied)
    again = LanguageModel(architecture)
    again.load_state_dict(state)
    assert torch.equal(again.head.added["1"], model.head.added["1"])
    assert (again.head.added["1"] is again.embedding.added["1"]) == tied
    model.freeze_generations()
    assert not any(model.get_parameter(name).requires_grad for name in rows)
    counted = {key: number for key, number in parameters_by_part(architecture).items() if number}
    for (part, generation), number in counted.items():
        if generation is not None:
            assert sum(p.numel() for p in model.parameters_of(part, generation).values()) == number, part
    assert count_parameters(architecture).total == sum(p.numel() for p in model.parameters())
    with pytest.raises(ConfigError, match=r"stage s1 added tokens \(vocabulary\.add\).*remove the newest stage first"):
        remove_generation(architecture, state, 1)


def test_a_third_generation_reads_the_tokens_of_the_second(make_model: Make, make_batch: Batch) -> None:
    model = make_model("labelled_bundles", (4,), model={"document_mask": True})
    for name, tokens, pieces in (("s1", 3, PIECES), ("s2", 1, [[OLD + 2, 4]])):
        grow(model, Generation(name, 2, tokens=tokens), GrowConfig(), make_batch(), 0, pieces)
    assert [len(model.head.weight_of(g)) for g in range(3)] == [OLD, OLD + 3, OLD + 4]
    mean = (model.head.added["1"][2] + model.head.weight[4]) / 2
    assert torch.allclose(model.head.weight_of(2)[-1], mean)
    assert [name for name, p in model.named_parameters() if ".added." in name and p.requires_grad] == [
        "embedding.added.2", "head.added.2",
    ]  # fmt: skip
    assert model.architecture.num_tokens == OLD + 4
    assert [model.architecture.vocabulary(g) for g in range(3)] == [0, 1, 2]
    logits_T = [outputs(model, torch.tensor([[2, 3]]), g)[0, 0] for g in range(3)]
    assert [int(one.isfinite().sum()) for one in logits_T] == [OLD, OLD + 3, OLD + 4]


def test_a_stored_architecture_is_checked(make_model: Make) -> None:
    architecture = make_model("labelled_bundles", (4, 2)).architecture
    born = architecture.generations
    fine = replace(architecture, generations=(born[0], replace(born[1], tokens=3)))
    assert Architecture.from_json(fine.to_json()) == fine
    assert "tokens" not in str(architecture.to_json()["generations"])
    for wrong in ((replace(born[0], tokens=1), born[1]), (born[0], replace(born[1], tokens=-1)),
                  (born[0], replace(born[1], tokens=2_000_000))):  # fmt: skip
        with pytest.raises(PlainError, match="generations"):
            Architecture.from_json(replace(architecture, generations=wrong).to_json())
    learned = make_model("learned", (4, 2)).architecture
    with pytest.raises(PlainError, match="routing by label"):
        Architecture.from_json(replace(learned, generations=(born[0], replace(born[1], tokens=3))).to_json())
