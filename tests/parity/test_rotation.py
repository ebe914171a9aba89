"""The rotation of heads by position, which has a backward pass of its own, against its definition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lifelong_moe.ops.rotary import inverse_frequencies, rotary_tables, rotate


def test_rotation() -> None:
    cos, sin = (table.double() for table in rotary_tables(7, inverse_frequencies(6, 10_000.0)))
    drawn = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 2, 3, 7, 6, dtype=torch.float64, generator=drawn)

    def readable(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def value_and_gradient(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        out.backward(grad)
        return out.detach(), leaf.grad

    found, expected = value_and_gradient(lambda x: rotate(x, cos, sin)), value_and_gradient(readable)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
