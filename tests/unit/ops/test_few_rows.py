from __future__ import annotations

from unittest.mock import mock_open

import pytest
import torch

from lifelong_moe.ops import few_rows


@pytest.mark.parametrize(
    ("maker", "is_slow"), [("vendor_id\t: AuthenticAMD", True), ("vendor_id\t: GenuineIntel", False), ("", False)]
)
def test_a_processor_s_maker_decides(maker: str, is_slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    few_rows.has_slow_kernel.cache_clear()
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(few_rows, "open", mock_open(read_data=maker), raising=False)
    assert few_rows.has_slow_kernel() == is_slow
    few_rows.has_slow_kernel.cache_clear()


@pytest.mark.parametrize("is_slow", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 256), (8, 256), (2, 3, 256), (9, 256), (0, 256)])
def test_few_rows_by_a_large_matrix(shape: tuple[int, ...], is_slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "has_slow_kernel", lambda: is_slow)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=generator), torch.randn(1024, 256, generator=generator)
    taken = []
    matrix_first = few_rows.matrix_first
    monkeypatch.setattr(few_rows, "matrix_first", lambda *args: taken.append(1) or matrix_first(*args))
    with torch.no_grad():
        found = few_rows.linear(x, weight)
        torch.testing.assert_close(found.double(), x.double() @ weight.double().t(), atol=2e-4, rtol=1e-5)
        assert bool(taken) == (is_slow and 0 < x.numel() // 256 <= few_rows.FEW)
        few_rows.linear(x, weight[:128])  # small
    with torch.enable_grad():
        few_rows.linear(x, weight.requires_grad_()).sum().backward()
    assert weight.grad is not None
    assert len(taken) <= 1
