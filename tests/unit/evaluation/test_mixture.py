"""A mixture over generations in held-out losses, requests and generated text, beside one forward pass a token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lifelong_moe.config.routing.mixture import MixtureConfig
from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.data.tokens.windows import EvaluationSet, evaluation_windows
from lifelong_moe.evaluation import reading
from lifelong_moe.evaluation import requests as scoring
from lifelong_moe.evaluation.documents import measure_documents
from lifelong_moe.evaluation.loss import evaluate
from lifelong_moe.evaluation.probing import observe
from lifelong_moe.evaluation.reading import read_windows
from lifelong_moe.evaluation.requests import Pass, Request, score
from lifelong_moe.model.next_token import Prompts
from lifelong_moe.model.sampling import sample, sample_batch, sample_steps
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.ops.posterior import next_log_weights
from lifelong_moe.plan.architecture import Generation

Make = Callable[..., LanguageModel]
CONTEXT, VOCABULARY = 16, 61
BORN = (4, Generation("s1", 2, delta_rank=3), Generation("s2", 2, delta_rank=3))


@pytest.fixture(params=[(0.5, 0.05), (1.0, 0.0)], ids=["dropping", "all"])
def mixture(request: pytest.FixtureRequest) -> MixtureConfig:
    likelihood, drop = request.param
    return MixtureConfig(likelihood=likelihood, drop=drop)


@pytest.fixture
def model(make_model: Make, mixture: MixtureConfig) -> LanguageModel:
    return make_model("bundles", BORN, routing={"mixture": mixture}).eval()


def windows_of(documents: Sequence[Sequence[int]]) -> EvaluationSet:
    lengths = [len(document) for document in documents]
    tokens = np.array([token for document in documents for token in document], dtype=np.uint16)
    return evaluation_windows(TokenShard(tokens, np.cumsum([0, *lengths]), np.array(lengths)), CONTEXT, 10**9)


def random_documents(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[0, *rng.integers(1, VOCABULARY, size=n - 1).tolist()] for n in lengths]


def one_by_one(
    model: LanguageModel, document: Sequence[int], read: Callable[[int], list[int]]
) -> tuple[Tensor, Tensor]:
    """Log probabilities ``(N - 1, V)`` and log weights ``(N - 1, G)`` of a document, one forward pass a token.

    Args:
        model: In evaluation mode.
        document: BOS first.
        read: Which tokens are read to predict the token at a position.
    """
    mixture = model.architecture.mixture
    assert mixture is not None
    generations = len(model.architecture.generations)
    nats_G, left_G = torch.zeros(generations, dtype=torch.float64), torch.ones(generations, dtype=torch.bool)
    logs, weights = [], []
    for t in range(1, len(document)):
        log_weight_G, left_G = next_log_weights(-mixture.likelihood * nats_G, left_G, mixture.drop)
        ids = torch.tensor([read(t)])
        own = []
        for generation in range(generations):
            domains = torch.full_like(ids, generation)
            with torch.no_grad():
                hidden = model(TokenBatch(ids, domain_ids_BS=domains)).hidden_BSD[:, -1]
                own.append(model.head.logits(hidden, domains[:, -1])[0].double().log_softmax(dim=-1))
        own_GV = torch.stack(own)
        logs.append((own_GV + log_weight_G.unsqueeze(1)).logsumexp(dim=0))
        weights.append(log_weight_G)
        nats_G = nats_G - own_GV[:, document[t]]
    return torch.stack(logs), torch.stack(weights)


def window_reads(document: Sequence[int]) -> Callable[[int], list[int]]:
    def read(t: int) -> list[int]:
        start = 1
        while t >= start + CONTEXT:  # window k begins at token 1 + k * 8 and is 16 tokens long
            start += CONTEXT // 2
        return [document[0], *document[start:t]]

    return read


@pytest.mark.parametrize("first", [2, 32])
def test_losses_are_those_of_one_pass_a_token(
    model: LanguageModel, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is read together, and whether or not a beginning is read before the rest."""
    monkeypatch.setattr(reading, "FIRST", first)
    documents, nats, weights = random_documents([40, 7, 17, 2, 16]), [], []
    for document in documents:
        logs_TV, log_weights_TG = one_by_one(model, document, window_reads(document))
        nats.append(-logs_TV[torch.arange(len(document) - 1), document[1:]])
        weights.append(log_weights_TG.exp())
    expected, weights_TG = torch.cat(nats), torch.cat(weights)
    for batch_tokens in (16, 40, 10_000):
        found = evaluate(model, windows_of(documents), distribution=None, batch_tokens=batch_tokens)
        assert found.tokens == len(expected)
        assert found.nats_per_token == pytest.approx(float(expected.mean()), abs=1e-5)
        assert found.shares == pytest.approx(weights_TG.mean(dim=0).tolist(), abs=1e-5)
        assert found.readers == pytest.approx(float((weights_TG > 0).sum(dim=1).double().mean()))
        assert [sum(counts) for counts in found.expert_counts] == pytest.approx([2 * found.tokens] * 2)
        by_document = measure_documents(model, windows_of(documents), distribution=None, batch_tokens=batch_tokens)
        assert by_document.nats.tolist() == pytest.approx([float(one.sum()) for one in nats], abs=1e-4)
        assert np.allclose(by_document.expert_counts, found.expert_counts)
    seen = observe(model, windows_of(documents), distribution=None)
    assert seen.shares_TG is not None
    assert np.allclose(seen.shares_TG, weights_TG.numpy(), atol=1e-5)
    births = np.repeat([0, 1, 2], [4, 2, 2])
    for expert_ids_TK in seen.expert_ids:
        assert (births[expert_ids_TK] == weights_TG.argmax(dim=1).numpy()[:, None]).all()


def test_some_generation_is_left_out_and_some_is_not(model: LanguageModel, mixture: MixtureConfig) -> None:
    """Else the tests of this file would show less than they say."""
    readers = evaluate(model, windows_of(random_documents([40] * 8)), distribution=None, batch_tokens=64).readers
    assert readers == 3 if not mixture.drop else 1 < readers < 2.9


def test_no_later_token_changes_a_loss_or_a_weight(model: LanguageModel) -> None:
    [document], other = random_documents([40]), random_documents([40], seed=1)[0]

    def look(text: Sequence[int]) -> tuple[list[float], Tensor]:
        nats, weights = torch.zeros(39, dtype=torch.float64), torch.zeros(39, 3, dtype=torch.float64)
        windows = windows_of([text])
        for batch in read_windows(model, windows, distribution=None, batch_tokens=16):
            rows, columns = batch.arrays["scored"].nonzero(as_tuple=True)
            at = torch.from_numpy(windows.start[batch.places_B])[rows] - 1 + columns
            nats[at], weights[at] = batch.nats_T, batch.weights_TG
        return nats.tolist(), weights

    nats, weights_TG = look(document)
    for cut in (1, 2, 15, 16, 17, 24, 25, 39):
        changed_nats, changed_TG = look([*document[:cut], *other[cut:]])
        assert changed_nats[: cut - 1] == nats[: cut - 1]
        assert changed_TG[:cut].equal(weights_TG[:cut])  # also the weights for the first token that differs


def test_what_is_certain_is_the_generation_s_own(model: LanguageModel) -> None:
    """Of two generations that are equal but for a text that one can only just write, the other alone counts."""
    sure = replace(model.architecture.routing, mixture=MixtureConfig(likelihood=1.0, drop=0.9))
    model.architecture = replace(model.architecture, routing=sure)
    windows = windows_of(random_documents([30]))
    [*batches] = read_windows(model, windows, distribution=None, batch_tokens=64)
    last = batches[-1]
    weights_TG = last.weights_TG
    [generation] = weights_TG[-1].nonzero().flatten().tolist()
    assert weights_TG[:, generation].eq(1).all()
    [member] = last.members
    scored, domain_ids = last.arrays["scored"], member.domain_ids_RP
    own = model.head.token_nats(member.output.hidden_BSD[scored], last.arrays["target_ids"][scored], domain_ids[scored])
    assert last.nats_T.equal(own.double())


def test_requests_are_scored_by_the_text_that_they_read(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, wanted, greedy = random_documents([9, 14, 6], seed=3), [], []
    requests = [Request(0, 9, 3), Request(1, 14, 13), Request(2, 6, 1), Request(1, 10, 2)]
    for one in requests:
        text = texts[one.text][: one.end]
        logs_TV = one_by_one(model, text, lambda t, text=text: text[:t])[0][-one.scored :]  # type: ignore[misc]
        targets = torch.tensor(text[-one.scored :])
        wanted.append(float(logs_TV[torch.arange(one.scored), targets].sum()))
        greedy.append(bool((logs_TV.argmax(dim=1) == targets).all()))
    for tokens, at_once in ((16, 1), (1000, 3), (1000, 1000)):
        monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", at_once)  # tokens that some generation does not read
        found = score(model, texts, requests, Pass(CONTEXT, tokens=tokens))
        assert found.nats.tolist() == pytest.approx(wanted, abs=1e-4)
        assert found.is_greedy.tolist() == greedy


def test_greedy_text_is_what_the_mixture_finds_most_probable(model: LanguageModel) -> None:
    prompts = random_documents([5, 5, 5], seed=4)
    texts = sample_batch(model, [one[1:] for one in prompts], max_new_tokens=11, temperature=0)
    for prompt, text in zip(prompts, texts, strict=True):
        assert list(sample(model, prompt[1:], max_new_tokens=11, temperature=0)) == text
        document = [*prompt, *text, 0][:16]
        logs_TV = one_by_one(model, document, lambda t, document=document: document[:t])[0]  # type: ignore[misc]
        assert logs_TV[4:].argmax(dim=1).tolist() == document[5:]


def test_a_text_longer_than_the_context_goes_on(model: LanguageModel) -> None:
    prompts = random_documents([20, 20], seed=5)

    def steps(*ids: list[int]) -> list[list[int]]:
        return [*sample_steps(model, Prompts(ids), 40, temperature=0.0, top_p=1.0, seed=0)]

    both = steps(*prompts)
    assert len(both) == 40
    assert both == [[*a, *b] for a, b in zip(steps(prompts[0]), steps(prompts[1]), strict=True)]


def test_a_generation_that_is_out_is_not_read(model: LanguageModel, mixture: MixtureConfig) -> None:
    rows: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0].ids_BS)), with_kwargs=False)
    list(sample(model, random_documents([9])[0][1:], max_new_tokens=7, temperature=0))
    hook.remove()
    assert rows[0] == 3 and rows == sorted(rows, reverse=True)
    assert (rows[-1] == 3) == (not mixture.drop) or rows[-1] < 3


@pytest.mark.parametrize("keys", [{"likelihood": -0.1}, {"drop": 1.0}, {"likelihood": math.nan}])
def test_keys_have_bounds(keys: dict[str, float]) -> None:
    with pytest.raises(Exception, match=rf"routing\.mixture\.{next(iter(keys))}="):
        MixtureConfig(**keys)
