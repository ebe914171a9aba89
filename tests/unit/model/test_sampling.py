from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lifelong_moe.errors import ConfigError
from lifelong_moe.model.cache import KeyValueCache
from lifelong_moe.model.domains import label_domain
from lifelong_moe.model.sampling import Prompts, sample, sample_batch, sample_steps, sample_token
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Generation

Make = Callable[..., LanguageModel]
PROMPT = [5, 17, 3]


def group_row(model: LanguageModel, ids: list[int], distribution: str | None) -> Tensor:
    if model.document_clusters is not None:
        return torch.from_numpy(model.document_clusters.domain_ids(np.asarray(ids))).unsqueeze(0)
    return torch.full((1, len(ids)), label_domain(model.architecture, distribution))


def greedy_without_cache(model: LanguageModel, count: int, distribution: str | None) -> list[int]:
    """The whole text again for each token."""
    ids, context = [0, *PROMPT], model.architecture.model.context
    for _ in range(count):
        assert len(ids) <= context
        with torch.no_grad():
            hidden = model(
                TokenBatch(torch.tensor([ids]), domain_ids_BS=group_row(model, ids, distribution))
            ).hidden_BSD
            last = group_row(model, ids, distribution)[:, -1]
            ids.append(int(model.head.logits(hidden[:, -1], last).argmax()))
    return ids[4:]


@pytest.fixture
def second(router_kind: str) -> Generation:
    """Two experts, with changes of the trunk where a token's group is a bundle."""
    by_generation = router_kind in ("label", "bundles", "labelled_bundles")
    return Generation("s1", 2, delta_rank=3 if by_generation else 0)


@pytest.mark.parametrize("distribution", [None, "d1"])
def test_the_cache_gives_what_a_full_forward_pass_gives(
    make_model: Make, router_kind: str, second: Generation, distribution: str | None
) -> None:
    for seed in range(3):
        model = make_model(router_kind, (4, second), seed=seed).eval()
        expected = greedy_without_cache(model, 12, distribution)
        if 0 in expected:
            expected = expected[: expected.index(0)]
        found = sample(model, PROMPT, max_new_tokens=12, temperature=0, distribution=distribution)
        assert list(found) == expected


def test_cached_logits_equal_full_logits(make_model: Make, router_kind: str, second: Generation) -> None:
    model = make_model(router_kind, (4, second)).eval()
    ids = torch.randint(1, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    domains = torch.arange(12).expand(2, 12) // 6
    with torch.no_grad():
        full = model(TokenBatch(ids, domain_ids_BS=domains)).hidden_BSD
        cache = KeyValueCache(len(model.blocks), 12)
        output = model(TokenBatch(ids[:, :5], domain_ids_BS=domains[:, :5]), cache=cache)
        torch.testing.assert_close(output.hidden_BSD, full[:, :5], atol=1e-5, rtol=0)
        for t in range(5, 12):
            output = model(TokenBatch(ids[:, t : t + 1], domain_ids_BS=domains[:, t : t + 1]), cache=cache)
            torch.testing.assert_close(output.hidden_BSD[:, 0], full[:, t], atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_keys", [{}, {"attention_softcap": 5.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("kind", ["document", "bundles"])
def test_cached_logits_of_packed_documents(make_model: Make, kind: str, model_keys: dict[str, float]) -> None:
    model = make_model(kind, (4, 2), model=model_keys).eval()
    ids = torch.randint(1, 61, (3, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = ids[0, 3] = ids[0, 8] = ids[1, 6] = 0  # before the first step with a cache, and after
    documents = (ids == 0).cumsum(dim=1)
    domains = torch.zeros_like(ids)
    with torch.no_grad():
        full, without = (model(TokenBatch(ids, one, domains)).hidden_BSD for one in (documents, None))
        alone = model(TokenBatch(ids[:1, 8:], domain_ids_BS=domains[:1, 8:])).hidden_BSD  # positions are relative
        cache, found = KeyValueCache(len(model.blocks), 12), []
        for part in (slice(0, 5), *(slice(t, t + 1) for t in range(5, 12))):
            found.append(model(TokenBatch(ids[:, part], documents[:, part], domains[:, part]), cache=cache).hidden_BSD)
    torch.testing.assert_close(torch.cat(found, dim=1), full, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat(found, dim=1)[:1, 8:], alone, atol=1e-5, rtol=0)
    assert float((full - without).abs().max()) > 0.1


def test_a_text_longer_than_the_context_goes_on(make_model: Make, router_kind: str) -> None:
    model = make_model(router_kind, (4, 2))
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append((args[0].ids_BS.shape[1], kwargs["cache"].length > 0)), with_kwargs=True
    )
    with torch.no_grad():
        model.head.weight[0] = 0.0  # BOS is never the most probable token
    model.head.weight.requires_grad_(False)
    tokens = list(sample(model, list(range(1, 31)), max_new_tokens=25, temperature=0))
    hook.remove()
    assert len(tokens) == 25
    # Context 16: BOS and the newest 8, then one by one until the cache is full, then again.
    prefills = [i for i, (_, cached) in enumerate(lengths) if not cached]
    assert [lengths[i][0] for i in prefills] == [9] * len(prefills)
    assert prefills == [0, 8, 16, 24]


def test_it_stops_at_the_document_s_end(make_model: Make) -> None:
    model = make_model().eval()
    with torch.no_grad():
        model.head.weight.zero_()
        model.norm.weight.zero_()
    assert list(sample(model, PROMPT, max_new_tokens=9, temperature=0)) == []  # argmax of equal logits is BOS, 0


def test_rows_that_stand_for_no_token_are_never_sampled(make_model: Make) -> None:
    model = make_model()
    with torch.no_grad():
        model.head.weight[40:] *= 100
    drawn = dict(max_new_tokens=12, seed=1)
    assert max(max(sample(model, PROMPT, temperature=one, **drawn)) for one in (0.0, 1.0)) >= 40
    model.tokenizer_size = 40
    for temperature in (0.0, 1.0):
        assert max(sample(model, PROMPT, temperature=temperature, **drawn)) < 40
        assert max(map(max, sample_batch(model, [PROMPT] * 3, temperature=temperature, **drawn))) < 40


def test_seeds_decide(make_model: Make) -> None:
    model = make_model()
    texts = [list(sample(model, PROMPT, max_new_tokens=12, temperature=2.0, top_p=1.0, seed=s)) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert list(sample(model, PROMPT, max_new_tokens=0)) == []


def test_top_p_cuts_the_tail() -> None:
    # Probabilities 0.5, 0.3, 0.15, 0.05: the smallest set with at least 0.6 is the first two.
    logits, generator = torch.tensor([0.15, 0.5, 0.05, 0.3]).log(), torch.Generator().manual_seed(0)
    drawn = [sample_token(logits, 1.0, 0.6, generator) for _ in range(400)]
    assert set(drawn) == {1, 3}
    assert drawn.count(1) / 400 == pytest.approx(0.5 / 0.8, abs=0.07)
    assert {sample_token(logits, 1.0, 0.5, generator) for _ in range(50)} == {1}
    assert {sample_token(logits, 1.0, 1.0, generator) for _ in range(400)} == {0, 1, 2, 3}
    assert sample_token(logits, 0, 0.1, generator) == 1


def random_prompts(count: int, length: int) -> list[list[int]]:
    return torch.randint(1, 61, (count, length), generator=torch.Generator().manual_seed(4)).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_each_text_of_a_batch_is_what_it_is_alone(
    make_model: Make, router_kind: str, second: Generation, temperature: float
) -> None:
    model = make_model(router_kind, (4, second))
    with torch.no_grad():
        model.head.weight[0] *= 2  # some texts may end, others outgrow the context
    how = {"max_new_tokens": 14, "temperature": temperature, "distribution": "d1"}
    prompts = random_prompts(6, 7)
    alone = [list(sample(model, prompt, seed=3 + i, **how)) for i, prompt in enumerate(prompts)]
    assert sample_batch(model, prompts, seed=3, **how) == alone


def test_each_text_of_a_batch_ends_by_itself(make_model: Make) -> None:
    model = make_model()
    with torch.no_grad():
        model.head.weight[0] *= 4
    forwards = []
    hook = model.register_forward_pre_hook(lambda _, args: forwards.append(args[0].ids_BS.shape))
    found = sample_batch(model, random_prompts(6, 5), max_new_tokens=60, temperature=1.5)
    hook.remove()
    lengths = [len(text) for text in found]
    assert len(set(lengths)) > 2 and max(lengths) < 60
    assert not any(0 in text for text in found)
    assert len(forwards) == max(lengths) + 1  # nothing is computed after the last one's end


def test_what_is_not_continued_together(make_model: Make) -> None:
    with pytest.raises(ConfigError, match="same number of tokens"):
        sample_batch(make_model(), [[1, 2], [3]], max_new_tokens=2)
    assert sample_batch(make_model(), [], max_new_tokens=2) == []
    assert sample_batch(make_model(), [[], []], max_new_tokens=0) == [[], []]


def test_tokens_that_are_not_read_choose_domains_alone(make_model: Make, second: Generation, router_kind: str) -> None:
    model = make_model(router_kind, (4, second))
    texts = [[0, *PROMPT, 9, 4], [0, 40, 2, 8, 11, 30]]
    prompts = Prompts(texts, "d1", unread=2)
    steps = [*sample_steps(model, prompts, 3, temperature=0.0, top_p=1.0, seed=0)]
    for i, text in enumerate(texts):
        ids = [*text]
        for step in steps:
            domains = group_row(model, ids, "d1")[:, 2:]
            with torch.no_grad():
                hidden = model(TokenBatch(torch.tensor([ids[2:]]), domain_ids_BS=domains)).hidden_BSD
                assert step[i] == int(model.head.logits(hidden[:, -1], domains[:, -1]).argmax())
            ids.append(step[i])
