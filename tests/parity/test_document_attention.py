"""Attention that leaves out what is masked against attention with the mask: outputs and all gradients.

On a machine without CUDA the packed kernel itself does not run; its call is checked with a loop in its place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import varlen

from lifelong_moe.config.model import ModelConfig
from lifelong_moe.model.attention import Attention, AttentionContext
from lifelong_moe.ops.document_attention import (
    Documents,
    Kernel,
    choose_kernel,
    document_attention,
    packed_options,
    packed_runs,
)
from lifelong_moe.ops.rotary import inverse_frequencies, rotary_tables

WIDTH = 8
ATOL = {torch.float64: 1e-12, torch.float32: 2e-6}


@st.composite
def batches(draw: st.DrawFn) -> Tensor:
    """Document ids with boundaries anywhere: at both ends, in neighbours, nowhere."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    rows = st.lists(st.booleans(), min_size=length, max_size=length)
    return torch.tensor([draw(rows) for _ in range(batch)], dtype=torch.int64).cumsum(dim=1)


def make_inputs(
    ids_BS: Tensor, heads: int, kv_heads: int, dtype: torch.dtype, width: int = WIDTH, device: str = "cpu"
) -> list[Tensor]:
    """Queries, keys and values as the model makes them: ``(B, H, S, W)``, but ``(B, S, H, W)`` in memory."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(*ids_BS.shape, num, width) for num in (heads, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]
    return [x.transpose(1, 2).requires_grad_() for x in inputs]


def with_gradients(inputs: list[Tensor], documents: Documents, kernel: Kernel | None) -> list[Tensor]:
    out = document_attention(inputs[0], inputs[1], inputs[2], documents, kernel)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, inputs, weights.to(out))]


def readable(query_BHSW: Tensor, key: Tensor, value: Tensor, ids_BS: Tensor) -> Tensor:
    """One query at a time."""
    out, repeat = torch.zeros_like(query_BHSW), query_BHSW.shape[1] // key.shape[1]
    for b, h, s in ((b, h, s) for b in range(len(ids_BS)) for h in range(out.shape[1]) for s in range(out.shape[2])):
        seen = [t for t in range(s + 1) if ids_BS[b, t] == ids_BS[b, s]]
        logits = key[b, h // repeat, seen] @ query_BHSW[b, h, s] / out.shape[-1] ** 0.5
        out[b, h, s] = logits.softmax(dim=0) @ value[b, h // repeat, seen]
    return out


def test_the_mask_is_the_definition() -> None:
    ids = torch.tensor([[0, 0, 1, 2, 2, 2], [0, 0, 0, 0, 0, 1]])
    inputs = make_inputs(ids, 4, 2, torch.float64)
    with torch.no_grad():
        found = document_attention(*inputs, Documents.of(ids), Kernel.mask)  # type: ignore[arg-type, misc]
        torch.testing.assert_close(found, readable(*inputs, ids), atol=1e-12, rtol=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@given(ids=batches())
def test_by_length_equals_the_mask(ids: Tensor, kv_heads: int, dtype: torch.dtype) -> None:
    inputs, documents = make_inputs(ids, 4, kv_heads, dtype), Documents.of(ids)
    found, expected = (with_gradients(inputs, documents, kernel) for kernel in (Kernel.by_length, Kernel.mask))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=ATOL[dtype], rtol=0)


@pytest.mark.parametrize("lengths", [[1] * 6, [6], [3, 3], [1, 5], [5, 1], [1, 2, 2, 1]])
def test_documents_by_hand(lengths: list[int]) -> None:
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    documents = Documents.of(ids)
    assert documents.lengths == lengths * 2
    assert documents.offsets.tolist() == [0, *torch.tensor(lengths * 2).cumsum(0).tolist()]
    assert documents.offsets.dtype == torch.int32
    assert documents.length_counts == sorted((n, 2 * lengths.count(n)) for n in set(lengths))
    assert documents.pairs == 2 * sum(n * n for n in lengths)


def test_a_row_ends_a_document_though_the_next_begins_with_its_number() -> None:
    assert Documents.of(torch.tensor([[7, 7, 8], [8, 8, 8]])).lengths == [2, 1, 3]


def test_by_length_twice_is_the_same_to_the_bit() -> None:
    ids = (torch.rand(4, 96, generator=torch.Generator().manual_seed(0)) < 0.1).cumsum(dim=1)
    inputs = make_inputs(ids, 4, 2, torch.float32)
    once, again = (with_gradients(inputs, Documents.of(ids), Kernel.by_length) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize(
    ("length", "documents", "expected"),
    [
        (256, 1, Kernel.causal),
        (256, 4, Kernel.by_length),
        (1024, 8, Kernel.by_length),
        (1024, 1024, Kernel.by_length),
        (16, 4, Kernel.mask),
    ],
)
def test_the_kernel_follows_from_the_lengths(length: int, documents: int, expected: Kernel) -> None:
    ids = (torch.arange(length) * documents // length).expand(2, -1)
    query = torch.zeros(2, 4, length, 64)
    assert choose_kernel(query, Documents.of(ids)) == expected
    meta = torch.zeros(2, 4, length, 64, device="meta")
    assert choose_kernel(meta, Documents.of(ids)) == (Kernel.causal if documents == 1 else Kernel.mask)


def test_many_lengths_in_little_text_keep_the_mask() -> None:
    ids = torch.arange(8).repeat_interleave(torch.arange(8)).expand(1, -1)
    assert choose_kernel(torch.zeros(1, 2, 28, 32), Documents.of(ids)) == Kernel.mask


def test_flash_attention_is_for_half_precision_on_cuda() -> None:
    assert not packed_runs(torch.device("cpu"), torch.bfloat16, 64)
    assert not packed_runs(torch.device("cuda"), torch.float32, 64)
    assert not packed_runs(torch.device("cuda"), torch.bfloat16, 20)
    assert not packed_runs(torch.device("cuda"), torch.bfloat16, 264)


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((8, 6), True), ((9, 0), True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attention_is_from_ampere_on(
    capability: tuple[int, int], runs: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert [packed_runs(torch.device("cuda"), dtype, width) for width in (8, 64, 256, 257)] == [runs] * 3 + [False]


def one_by_one(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, max_q: int) -> Tensor:
    """What the packed kernel is documented to give, ``(T, H, W)``."""
    assert max_q == int(cu_seq_q.diff().max())
    parts = zip(*(x.tensor_split(cu_seq_q[1:-1].long()) for x in (query, key, value)), strict=True)
    out = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part), is_causal=True, enable_gqa=True)  # type: ignore[misc]
        for part in parts
    ]
    return torch.cat([x.transpose(0, 1) for x in out])


def of_210(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False, return_aux: Any = None,
) -> Tensor:  # fmt: skip
    """As in torch 2.10, which knows no shared keys."""
    assert is_causal and query.shape == key.shape
    return one_by_one(query, key, value, cu_seq_q, max_q)


def of_213(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """As in torch 2.13."""
    assert window_size == (-1, 0) and enable_gqa
    return one_by_one(query, key, value, cu_seq_q, max_q)


@pytest.mark.parametrize("version", [of_210, of_213])
def test_the_packed_call_says_where_documents_begin(
    version: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", version)
    ids = (torch.rand(3, 24, generator=torch.Generator().manual_seed(0)) < 0.2).cumsum(dim=1)
    inputs, documents = make_inputs(ids, 4, 2, torch.float64), Documents.of(ids)
    found, expected = (with_gradients(inputs, documents, kernel) for kernel in (Kernel.packed, Kernel.mask))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_the_installed_kernel_can_be_told_to_be_causal() -> None:
    known = inspect.signature(varlen.varlen_attn).parameters
    assert set(packed_options(known)) <= set(known)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the packed kernel did not run")
def test_packed_equals_the_mask() -> None:
    ids = (torch.rand(3, 128, generator=torch.Generator().manual_seed(0)) < 0.1).cumsum(dim=1).cuda()
    inputs, documents = make_inputs(ids, 4, 2, torch.bfloat16, width=64, device="cuda"), Documents.of(ids)
    assert choose_kernel(inputs[0], documents) == Kernel.packed
    found, expected = (with_gradients(inputs, documents, kernel) for kernel in (None, Kernel.mask))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_layer_with_documents_equals_one_with_their_mask(softcap: float | None) -> None:
    layer = Attention(ModelConfig(width=64, heads=4, kv_heads=2, attention_softcap=softcap, context=256)).double()
    for i, parameter in enumerate(layer.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    x = torch.randn(2, 256, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    cos, sin = (table.double() for table in rotary_tables(256, inverse_frequencies(16, 10_000.0)))
    rotary = cos, sin
    documents = Documents.of((torch.arange(256) // 32).expand(2, -1))
    assert choose_kernel(torch.zeros(2, 4, 256, 16), documents) == Kernel.by_length
    found, expected = (layer(x, AttentionContext(rotary, mask))[0] for mask in (documents, documents.mask))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert float((layer(x, AttentionContext(rotary))[0] - found).detach().abs().max()) > 0.1
    ours, theirs = (torch.autograd.grad(out.square().sum(), list(layer.parameters())) for out in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-12)
