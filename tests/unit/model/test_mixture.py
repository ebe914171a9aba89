"""Competing experts: a mixture of predictions, by hand, and its gradient by the posterior."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from lifelong_moe.errors import ConfigError
from lifelong_moe.model.cache import KeyValueCache
from lifelong_moe.model.mixture import MixtureHead, pack, unpack
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from tests.conftest import VOCAB

Make = Callable[..., LanguageModel]
COMPETING = {"mode": "dense", "competitive": True, "balance_loss": 0.0, "z_loss": 0.0}


def ids() -> torch.Tensor:
    return torch.randint(1, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))


def head_of(weight_VD: torch.Tensor) -> MixtureHead:
    head = MixtureHead(*weight_VD.shape[::-1])
    head.weight.data = weight_VD
    return head


def test_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(5, 3, 4, generator=generator), torch.randn(7, 4, generator=generator)
    gates = torch.rand(5, 3, generator=generator).softmax(1)
    packed = pack(hidden, gates.log())
    assert torch.equal(unpack(packed, 4)[0], hidden)
    probs = (gates.unsqueeze(2) * (hidden @ head.t()).softmax(2)).sum(1)
    torch.testing.assert_close(head_of(head).logits(packed).exp(), probs)
    target = torch.tensor([0, 3, 6, 2, 2])
    nats = head_of(head).token_nats(packed, target)
    torch.testing.assert_close(nats, -probs.gather(1, target.unsqueeze(1)).log().squeeze(1))


def test_the_best_expert_learns_most() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 3, 4, generator=generator).requires_grad_()
    head, gates = torch.randn(7, 4, generator=generator), torch.tensor([[0.2, 0.5, 0.3]])
    head_of(head).cross_entropy(pack(hidden, gates.log()), torch.tensor([3])).backward()
    probs = (hidden.detach() @ head.t()).softmax(2)[0]
    posterior = gates[0] * probs[:, 3] / (gates[0] * probs[:, 3]).sum()
    alone = (probs - F.one_hot(torch.tensor(3), 7)) @ head  # each expert's own cross-entropy gradient
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad[0], posterior.unsqueeze(1) * alone)


def test_in_a_model(make_model: Make) -> None:
    model = make_model("dense", (3,), routing=COMPETING)
    output = model(TokenBatch(ids()))
    log_probs = model.head.logits(output.hidden_BSD)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 16))
    hidden, target = output.hidden_BSD[:, :-1].flatten(0, 1), ids()[:, 1:].flatten()
    loss = model.head.cross_entropy(hidden, target)
    torch.testing.assert_close(loss, F.nll_loss(log_probs[:, :-1].flatten(0, 1), target))
    torch.testing.assert_close(model.head.token_nats(hidden, target).mean(), loss.detach())
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        cache = KeyValueCache(len(model.blocks), 16)
        model(TokenBatch(ids()[:, :15]), cache=cache)
        cached = model(TokenBatch(ids()[:, 15:]), cache=cache).hidden_BSD[:, 0]
        torch.testing.assert_close(model.head.logits(cached), log_probs[:, -1].detach(), atol=2e-5, rtol=0)


def test_one_expert_alone_is_the_plain_model(make_model: Make) -> None:
    plain, competing = make_model("dense", (1,)), make_model("dense", (1,), routing=COMPETING)
    with torch.no_grad():
        expected = plain.head.logits(plain(TokenBatch(ids())).hidden_BSD).log_softmax(-1)
        found = competing.head.logits(competing(TokenBatch(ids())).hidden_BSD)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_what_cannot_compete(make_run: Callable[..., object]) -> None:
    with pytest.raises(ConfigError, match=r"routing\.competitive is for routing\.mode=dense"):
        make_run("routing.competitive=true")
    with pytest.raises(ConfigError, match="needs experts in the last layer"):
        make_run("routing.mode=dense", "routing.competitive=true", "model.shared_experts=1")
