"""Our own forms of what PyTorch has, against PyTorch's: values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong_moe.ops.causal_attention import LONGEST, SHORTEST, causal_attention, is_faster_here
from lifelong_moe.ops.rotary import inverse_frequencies, rotary_tables, rotate


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def values_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(draw(*out.shape, seed=9))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def check(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor) -> None:
    found, expected = values_and_gradients(ours, *inputs), values_and_gradients(theirs, *inputs)
    assert len(found) == len(expected) == len(inputs) + 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_causal_attention(length: int, heads: int, kv_heads: int) -> None:
    query, key, value = (
        draw(2, heads, length, 8),
        draw(2, kv_heads, length, 8, seed=1),
        draw(2, kv_heads, length, 8, seed=2),
    )

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    check(causal_attention, theirs, query, key, value)
    strided = query.transpose(1, 2).contiguous().transpose(1, 2)  # as a model makes it
    check(causal_attention, theirs, strided, key, value)


def test_it_is_chosen_for_training_short_sequences() -> None:
    def query(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(1, 1, length, 4, dtype=dtype)

    assert is_faster_here(query(SHORTEST)) and is_faster_here(query(LONGEST))
    assert not (
        is_faster_here(query(SHORTEST - 1))
        or is_faster_here(query(LONGEST + 1))
        or is_faster_here(query(256, torch.bfloat16))
    )
    with torch.no_grad():
        assert not is_faster_here(query(256))


def test_rotation() -> None:
    cos, sin = (table.double() for table in rotary_tables(7, inverse_frequencies(6, 10_000.0)))

    def readable(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    check(lambda x: rotate(x, cos, sin), readable, draw(2, 3, 7, 6))
