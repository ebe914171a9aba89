from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lifelong_moe.model.domains import label_domain
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.retention.generated import DomainIdsOf, generate_blocks, sample_tokens

Make = Callable[..., LanguageModel]
Ids = NDArray[np.int64]
KEYS = {"context": 16, "seed": 3}


def domains_of(model: LanguageModel) -> DomainIdsOf | None:
    """As the data module gives them, for text of the newest label."""
    if model.document_clusters is not None:
        return model.document_clusters.domain_ids
    if model.architecture.routing.mode == "label":
        return lambda ids: np.full(len(ids), label_domain(model.architecture, "d1"))
    return None


def eager_for_bos(model: LanguageModel) -> LanguageModel:
    """BOS is among the likely tokens, so that documents end."""
    with torch.no_grad():
        model.norm.weight.fill_(0.1)  # nearly uniform
        model.head.weight[1:] -= model.head.weight[1:].mean(dim=1, keepdim=True)
    return model


def readable(model: LanguageModel, block: int, context: int, seed: int, ends: tuple[int, ...] = ()) -> list[int]:
    """One block, one token at a time, the whole text again for each, groups of each document from its start."""
    uniform = np.random.default_rng(np.random.SeedSequence([seed, block])).random(context, dtype=np.float32)
    bos_id = model.architecture.bos_id
    ids, ask = [bos_id], domains_of(model)
    for u in uniform:
        token_ids = np.array(ids)
        documents = np.cumsum(token_ids == bos_id)
        groups = np.zeros_like(token_ids)
        for document in np.unique(documents) if ask else ():
            groups[documents == document] = ask(token_ids[documents == document])  # type: ignore[misc]
        with torch.no_grad():
            arrays = [torch.from_numpy(a).unsqueeze(0) for a in (token_ids, documents, groups)]
            output = model(TokenBatch(arrays[0], arrays[1], arrays[2]))
            probs = model.head.logits(output.hidden_BSD[0, -1]).softmax(dim=-1).double().numpy()
        sampled = int(np.argmax(np.cumsum(probs) / probs.sum() > u))
        ids.append(bos_id if sampled in ends else sampled)
    return ids


def test_it_is_what_full_forward_passes_sample(make_model: Make, router_kind: str) -> None:
    model = eager_for_bos(make_model(router_kind, (4, 2))).eval()
    blocks = generate_blocks(model, 12, **KEYS, domain_ids_of=domains_of(model))
    assert blocks.shape == (12, 17) and blocks.dtype == np.int64
    assert blocks.tolist() == [readable(model, i, **KEYS) for i in range(12)]
    assert int((blocks[:, 1:-1] == 0).sum()) > 0  # documents begin inside


@pytest.mark.parametrize("kind", ["learned", "bundles"])
def test_where_another_token_ends_a_text_the_next_document_begins(make_model: Make, kind: str) -> None:
    model, ends = make_model(kind, (4, 2)).eval(), (7, 30)
    assert (generate_blocks(model, 12, **KEYS) == 7).any()  # it is among what the model says
    blocks = generate_blocks(model, 12, **KEYS, ends=ends, domain_ids_of=domains_of(model))
    assert not np.isin(blocks, ends).any()
    assert blocks.tolist() == [readable(model, i, **KEYS, ends=ends) for i in range(12)]


@pytest.mark.parametrize("kind", ["learned", "bundles"])
def test_a_document_ends_as_often_as_the_model_ends_it(make_model: Make, kind: str) -> None:
    model = make_model(kind)
    with torch.no_grad():
        model.head.weight.zero_()  # each of the 61 tokens is as probable, BOS among them
    ends = int((generate_blocks(model, 400, **KEYS)[:, 1:] == 0).sum())
    assert abs(ends - 6400 / 61) < 3 * (6400 / 61 * 60 / 61) ** 0.5


def test_a_block_has_its_own_random_numbers(make_model: Make) -> None:
    model = make_model()
    blocks = generate_blocks(model, 7, **KEYS)
    assert np.array_equal(generate_blocks(model, 7, **KEYS), blocks)
    assert np.array_equal(generate_blocks(model, 7, **KEYS, batch_size=3), blocks)
    assert np.array_equal(generate_blocks(model, 2, **KEYS), blocks[:2])
    assert len(np.unique(blocks, axis=0)) == 7
    assert not np.array_equal(generate_blocks(model, 7, **(KEYS | {"seed": 4})), blocks)


@pytest.mark.parametrize("training", [True, False])
def test_it_leaves_the_model_and_the_random_state_alone(make_model: Make, training: bool) -> None:
    model, state = make_model().train(training), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generate_blocks(model, 2, **KEYS)
    assert model.training is training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_cache_takes_one_token_at_a_time(make_model: Make) -> None:
    # num_blocks * context tokens are computed, and none twice.
    model, seen = make_model(), []
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(args[0].ids_BS.numel()))
    generate_blocks(model, 5, **KEYS, batch_size=4)
    hook.remove()
    assert sum(seen) == 5 * 16 and seen == [4] * 16 + [1] * 16


def test_groups_are_asked_at_chunk_borders_of_each_document(make_model: Make) -> None:
    model = eager_for_bos(make_model("document", (4, 2)))
    asked: list[Ids] = []

    def ask(token_ids_N: Ids) -> Ids:
        asked.append(token_ids_N.copy())
        return np.zeros_like(token_ids_N)

    blocks = generate_blocks(model, 12, **KEYS, domain_ids_of=ask)
    expected = []
    for block in blocks[:, :-1]:
        for document in np.split(block, np.flatnonzero(block == 0)[1:]):
            expected += [document[: n + 1].tolist() for n in range(0, len(document), 4)]  # routing.chunk_tokens = 4
    assert sorted(ids.tolist() for ids in asked) == sorted(expected)
    assert all(ids[0] == 0 and 0 not in ids[1:] for ids in asked)


def test_frequencies_are_the_model_s_probabilities(make_model: Make) -> None:
    model = make_model().eval()
    first = generate_blocks(model, 4000, context=1, seed=0, batch_size=1000)[:, 1]
    with torch.no_grad():
        hidden = model(TokenBatch(torch.tensor([[0]]))).hidden_BSD[0, 0]
        probs = model.head.logits(hidden).softmax(dim=-1).double().numpy()
    found = np.bincount(first, minlength=61) / 4000
    assert np.abs(found - probs).max() < 4 * np.sqrt(0.25 / 4000)


def test_sampling_by_hand() -> None:
    # Cumulative 0.25, 0.25, 0.75, 1: a token without probability is never drawn, nor one past the last.
    logits = torch.tensor([0.25, 0.0, 0.5, 0.25]).log().expand(6, 4)
    below_one = 1 - 2.0**-24
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, below_one])
    assert sample_tokens(logits, uniform).tolist() == [0, 0, 2, 2, 3, 3]
    first_impossible = torch.tensor([[-torch.inf, 0.0]])
    assert sample_tokens(first_impossible, torch.tensor([0.0])).tolist() == [1]
    last_impossible = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert sample_tokens(last_impossible, torch.tensor([below_one])).tolist() == [1]


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_number_stays_in_a_large_vocabulary(seed: int) -> None:
    logits = torch.randn(8, 50_000, generator=torch.Generator().manual_seed(seed))
    assert int(sample_tokens(logits, torch.full((8,), 1 - 2.0**-24)).max()) < 50_000


def test_nothing_asked_for(make_model: Make) -> None:
    assert generate_blocks(make_model(), 0, **KEYS).shape == (0, 17)
    assert generate_blocks(make_model(), 2, **(KEYS | {"context": 1}), batch_size=1).shape == (2, 2)
    for bad in ({"context": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            generate_blocks(make_model(), 1, **(KEYS | bad))  # type: ignore[arg-type]
