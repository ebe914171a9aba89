"""Head and cross-entropy in chunks against PyTorch's own, and distillation against its formula."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lifelong_moe.ops import losses
from lifelong_moe.ops.losses import TeacherTargets, distillation_loss, linear_cross_entropy, linear_losses, token_nats


def inputs(tokens: int, width: int, vocab: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=dtype)
    head = torch.randn(vocab, width, generator=generator, dtype=dtype)
    return [hidden, head, torch.randint(0, vocab, (tokens,), generator=generator)]


def value_and_gradients(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], hidden: Tensor, head: Tensor, target: Tensor
) -> list[Tensor]:
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    value = loss(hidden, head, target)
    (3.0 * value).backward()  # an upstream gradient other than 1
    assert hidden.grad is not None and head.grad is not None
    return [value.detach(), hidden.grad, head.grad]


def plain(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ head.t(), target)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 9), st.integers(1, 14), st.integers(0, 100))
def test_linear_cross_entropy_for_any_chunk(tokens: int, width: int, vocab: int, chunk: int, seed: int) -> None:
    case = inputs(tokens, width, vocab, seed)
    found = value_and_gradients(lambda h, w, t: linear_cross_entropy(h, w, t, chunk), *case)
    for ours, theirs in zip(found, value_and_gradients(plain, *case), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("taught", [[2], [7, 0, 3], list(range(9))])
def test_both_losses_in_one_pass(temperature: float, chunk: int, taught: list[int]) -> None:
    case, tokens = inputs(9, 4, 11), torch.tensor(taught)
    hidden, head, _ = inputs(len(taught), 3, 11, seed=1)  # a teacher of another width
    lesson = TeacherTargets(tokens, hidden, head, temperature, weight=0.7)
    values = []

    def readable(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        kl = distillation_loss((h @ w.t())[tokens], hidden @ head.t(), temperature)
        values.extend([plain(h, w, t).detach(), kl.detach()])
        return plain(h, w, t) + 0.7 * kl

    expected = value_and_gradients(readable, *case)
    found = value_and_gradients(lambda *args: linear_losses(*args, lesson, chunk)[0], *case)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    _, nats, kl = linear_losses(*case, lesson, chunk)
    torch.testing.assert_close(torch.stack([nats, kl]), torch.stack(values[:2]))


@pytest.mark.parametrize("taught", [[], [7, 0, 3]])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_low_rank_changes_are_those_of_the_whole_head(taught: list[int], chunk: int) -> None:
    hidden, head, target = inputs(9, 4, 11)
    factors = [inputs(9, 2, 11, seed=1)[:2], inputs(9, 3, 11, seed=2)[:2]]
    lesson = TeacherTargets(torch.tensor(taught), *inputs(len(taught), 3, 11, seed=3)[:2], 2.0, weight=0.7)
    leaves = [hidden, head, *(factor for pair in factors for factor in pair)]
    found = []
    for side_by_side in (True, False):
        for leaf in leaves:
            leaf.grad = None
            leaf.requires_grad_(leaf is not factors[1][1])  # the second pair's second is frozen
        if side_by_side:
            loss = linear_losses(hidden, head, target, lesson if taught else None, chunk, factors)[0]
        else:
            logits = hidden @ head.t() + sum(low @ up.t() for low, up in factors)
            loss = F.cross_entropy(logits, target)
            if taught:
                loss = loss + 0.7 * distillation_loss(logits[taught], lesson.hidden_ND @ lesson.head_VD.t(), 2.0)
        (3.0 * loss).backward()
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_only_the_sum_carries_gradients() -> None:
    hidden, head, target = inputs(5, 3, 4)
    lesson = TeacherTargets(torch.tensor([1]), hidden[:1], head, 2.0, 1.0)
    total, nats, kl = linear_losses(hidden.requires_grad_(), head, target, lesson)
    assert total.requires_grad and not nats.requires_grad and not kl.requires_grad


@pytest.mark.parametrize("tokens", [1023, 1024, 1025, 2049])
def test_the_default_chunk_s_borders(tokens: int) -> None:
    case = inputs(tokens, 4, 7, dtype=torch.float32)
    for ours, theirs in zip(
        value_and_gradients(linear_cross_entropy, *case), value_and_gradients(plain, *case), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, head, target = inputs(5, 3, 4, dtype=torch.float32)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, head, target).backward()
    assert hidden.grad is not None and head.grad is None
    hidden.grad, head = None, head.requires_grad_()
    linear_cross_entropy(hidden.detach(), head, target).backward()
    assert hidden.grad is None and head.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, head, target).requires_grad


def test_uniform_logits_cost_ln_v() -> None:
    loss = linear_cross_entropy(torch.zeros(3, 2), torch.randn(8, 2), torch.tensor([0, 5, 7]))
    assert float(loss) == pytest.approx(math.log(8), rel=1e-6)


def test_large_logits_do_not_overflow() -> None:
    # Logits 1000 and -1000: the right answer is free, the wrong one costs 2000 nats.
    loss = linear_cross_entropy(torch.ones(2, 1), torch.tensor([[1000.0], [-1000.0]]), torch.tensor([0, 1]))
    assert float(loss) == 1000.0


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_bf16_autocast_stays_close(hidden_dtype: torch.dtype) -> None:
    hidden, head, target = inputs(300, 16, 40, dtype=torch.float32)
    exact = value_and_gradients(plain, hidden, head, target)

    def loss(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear_cross_entropy(h.to(hidden_dtype), w, t, chunk=64)

    found = value_and_gradients(loss, hidden, head, target)
    assert found[0].dtype == torch.float32 and found[2].dtype == torch.float32
    assert float(found[0]) == pytest.approx(float(exact[0]), rel=1e-2)
    for ours, theirs in zip(found[1:], exact[1:], strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 2e-2
    assert not torch.equal(found[1], exact[1])  # it did compute in bf16


def test_token_nats_are_the_cross_entropies() -> None:
    hidden, head, target = inputs(10, 4, 6, dtype=torch.float32)
    expected = F.cross_entropy(hidden @ head.t(), target, reduction="none")
    torch.testing.assert_close(token_nats(hidden, head, target, chunk=3), expected)
    assert token_nats(hidden[:0], head, target[:0]).shape == (0,)


def test_a_large_vocabulary_is_read_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, softmax = [], losses._softmax
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 33)
    monkeypatch.setattr(losses, "_softmax", lambda logits: (seen.append(len(logits)), softmax(logits))[1])
    hidden, head, target = inputs(10, 4, 11)
    torch.testing.assert_close(linear_cross_entropy(hidden, head, target), plain(hidden, head, target))
    assert seen == [3, 3, 3, 1]


STUDENT = torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, -3.0]])
TEACHER = torch.tensor([[0.5, 1.5, -0.5], [2.0, 0.0, 1.0]])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_distillation_by_its_formula(temperature: float) -> None:
    total = 0.0
    for student, teacher in zip(STUDENT.tolist(), TEACHER.tolist(), strict=True):
        q = [math.exp(z / temperature) for z in student]
        p = [math.exp(z / temperature) for z in teacher]
        total += sum(pi / sum(p) * math.log((pi / sum(p)) / (qi / sum(q))) for pi, qi in zip(p, q, strict=True))
    loss = distillation_loss(STUDENT, TEACHER, temperature)
    assert float(loss) == pytest.approx(temperature**2 * total / 2, rel=1e-5)


def test_two_words_by_hand() -> None:
    # Teacher (1/2, 1/2), student (3/4, 1/4): KL = ln 2 - (ln 3) / 2.
    loss = distillation_loss(torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2), 1.0)
    assert float(loss) == pytest.approx(math.log(2) - math.log(3) / 2, abs=1e-6)


def test_identical_models_have_none() -> None:
    assert float(distillation_loss(TEACHER, TEACHER.clone(), 2.0)) == pytest.approx(0.0, abs=1e-7)
    assert float(distillation_loss(TEACHER + 7.0, TEACHER, 2.0)) == pytest.approx(0.0, abs=1e-6)


def test_impossible_words_change_nothing() -> None:
    padding = torch.full((2, 50), -1e4)
    padded = distillation_loss(torch.cat([STUDENT, padding], 1), torch.cat([TEACHER, padding], 1), 2.0)
    torch.testing.assert_close(padded, distillation_loss(STUDENT, TEACHER, 2.0))


def test_it_is_a_mean_over_tokens() -> None:
    repeated = distillation_loss(STUDENT.repeat(5, 1), TEACHER.repeat(5, 1), 2.0)
    torch.testing.assert_close(repeated, distillation_loss(STUDENT, TEACHER, 2.0))


def test_temperature_squared_keeps_the_gradient_s_scale() -> None:
    # At high temperature T² KL tends to the mean squared logit difference / (2 V), whatever T is.
    centred = (TEACHER - TEACHER.mean(1, keepdim=True)) - (STUDENT - STUDENT.mean(1, keepdim=True))
    limit = float(centred.double().square().sum()) / (2 * 3 * 2)
    for temperature in (100.0, 200.0):
        loss = distillation_loss(STUDENT.double(), TEACHER.double(), temperature)
        assert float(loss) == pytest.approx(limit, rel=0.05)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    distillation_loss(student, teacher, 2.0).backward()
    assert teacher.grad is None
    # d/dz = T (softmax(z_s / T) - softmax(z_t / T)) / number of tokens
    expected = 2.0 * ((STUDENT / 2).softmax(1) - (TEACHER / 2).softmax(1)) / 2
    torch.testing.assert_close(student.grad, expected)
