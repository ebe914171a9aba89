"""Causal attention within documents that were packed into one block, without paying for what is masked.

Legend: B batch, S sequence, T = B·S tokens, H query heads, J key and value heads, W head width, N documents.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong_moe.ops.dispatch import inverse_permutation, permute

SOFTMAX_PRODUCTS = 16
"""What a pair of a query and a key costs on a CPU beside its products of entries, in such products of about 0.16 ns."""
CALL_PRODUCTS = 400_000
"""What one more attention call costs, in products."""
REORDERING_CALLS = 3
"""What it costs to reorder at all, in calls."""
TOKEN_PAIRS, REORDERED_TOKEN_PAIRS = 20, 85
"""What a token costs beside its own pairs, in pairs; the second where it has to be moved and brought back."""


class Kernel(StrEnum):
    """How documents attend; all give the same but for rounding."""

    causal = "causal"
    """Each row is one document."""
    by_length = "by_length"
    """Documents of one length in one causal call."""
    packed = "packed"
    """All documents in one call that is told where each begins; FlashAttention on CUDA."""
    mask = "mask"
    """All pairs of a row, most of them masked."""


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch lie; made once a forward pass, for all layers."""

    document_ids_BS: Tensor
    """Document of each token, int64; where it changes along a row, a document begins."""
    starts: tuple[int, ...]
    """First token of each document in the flattened batch; a row begins one."""

    @classmethod
    def of(cls, document_ids_BS: Tensor, starts: tuple[int, ...] | None = None) -> Documents:
        """Find where documents begin, unless that is known. On CUDA this waits for the device.

        A fixed number of documents would not have to wait, but FlashAttention's backward takes memory for 128 tokens
        more with each document, also an empty one.
        """
        return cls(document_ids_BS, starts_of(document_ids_BS) if starts is None else starts)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document, in order."""
        ends = [*self.starts[1:], self.document_ids_BS.numel()]
        return [end - start for start, end in zip(self.starts, ends, strict=True)]

    @cached_property
    def offsets(self) -> Tensor:
        """First token of each document, and T: int32 ``(N + 1,)`` on the batch's device."""
        offsets = torch.tensor([*self.starts, self.document_ids_BS.numel()], dtype=torch.int32)
        return offsets.to(self.document_ids_BS.device, non_blocking=True)

    @cached_property
    def length_counts(self) -> list[tuple[int, int]]:
        """Each length that occurs, the shortest first, and how many documents have it."""
        return sorted(Counter(self.lengths).items())

    @cached_property
    def orders(self) -> tuple[Tensor, Tensor]:
        """Tokens sorted by the length of their document, stably, int64 ``(T,)``; and the permutation that undoes it."""
        lengths_N = torch.tensor(self.lengths, dtype=torch.int64)
        # Stable: the tokens of one document stay side by side and in order.
        order_T = lengths_N.repeat_interleave(lengths_N).argsort(stable=True).to(self.document_ids_BS.device)
        return order_T, inverse_permutation(order_T)

    @cached_property
    def mask(self) -> Tensor:
        """True where a query may look, bool ``(B, 1, S, S)``."""
        return document_attention_mask(self.document_ids_BS)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key of the same document, both ways."""
        return sum(length * length * count for length, count in self.length_counts)


def starts_of(document_ids_BS: Tensor) -> tuple[int, ...]:
    """First token of each document in the flattened batch."""
    return tuple(document_starts(document_ids_BS).flatten().nonzero().flatten().tolist())


def document_starts(document_ids_BS: Tensor) -> Tensor:
    """True for the first token of each document, bool ``(B, S)``; a document does not go on in the next row."""
    starts_BS = torch.ones_like(document_ids_BS, dtype=torch.bool)
    torch.ne(document_ids_BS[:, 1:], document_ids_BS[:, :-1], out=starts_BS[:, 1:])
    return starts_BS


def document_attention_mask(document_ids_BS: Tensor) -> Tensor:
    """Causal attention within a document only: bool ``(B, 1, S, S)``, True where a query may look."""
    # Runs and not ids: an id that returns later in a row is another document.
    runs_BS = document_starts(document_ids_BS).cumsum(dim=1)
    same_BSS = runs_BS.unsqueeze(2) == runs_BS.unsqueeze(1)
    return same_BSS.tril().unsqueeze(1)


def document_attention(
    query_BHSW: Tensor, key_BJSW: Tensor, value_BJSW: Tensor, documents: Documents, kernel: Kernel | None = None
) -> Tensor:
    """Each token attends to the tokens of its document up to itself.

    Args:
        query_BHSW: Queries.
        key_BJSW: Keys; J divides H.
        value_BJSW: Values.
        documents: Of this batch.
        kernel: How; the fastest that runs here by default.

    Returns:
        ``(B, H, S, W)``.
    """
    kernel = kernel or choose_kernel(query_BHSW, documents)
    if kernel == Kernel.by_length:
        return _by_length(query_BHSW, key_BJSW, value_BJSW, documents)
    if kernel == Kernel.packed:
        return _packed(query_BHSW, key_BJSW, value_BJSW, documents)
    mask = documents.mask if kernel == Kernel.mask else None
    shares = query_BHSW.device.type == "cpu"
    if not shares:
        # CUDA's memory-efficient kernel knows no shared keys; torch would compute all logits in memory.
        repeat = query_BHSW.shape[1] // key_BJSW.shape[1]
        key_BJSW, value_BJSW = (x.repeat_interleave(repeat, dim=1) for x in (key_BJSW, value_BJSW))
    return F.scaled_dot_product_attention(
        query_BHSW, key_BJSW, value_BJSW, attn_mask=mask, is_causal=mask is None, enable_gqa=shares
    )


def choose_kernel(query_BHSW: Tensor, documents: Documents) -> Kernel:
    """The fastest kernel that runs for these queries, by device, dtype and lengths."""
    batch, heads, length, width = query_BHSW.shape
    if documents.length_counts == [(length, batch)]:
        return Kernel.causal
    if query_BHSW.device.type == "cuda":
        return Kernel.packed if packed_runs(query_BHSW.device, _autocast_dtype(query_BHSW), width) else Kernel.mask
    if query_BHSW.device.type != "cpu":
        return Kernel.mask
    return Kernel.by_length if grouping_is_faster(heads, width, batch * length**2, documents) else Kernel.mask


def grouping_is_faster(heads: int, width: int, masked_pairs: int, documents: Documents) -> bool:
    """Whether products that are not computed outweigh the calls that are made, on a CPU; by measurement."""
    calls, token = len(documents.length_counts), TOKEN_PAIRS
    if calls > 1:
        calls, token = calls + REORDERING_CALLS, REORDERED_TOKEN_PAIRS
    # Under a mask every pair of a row is computed, visible or not.
    saved_pairs = masked_pairs - documents.pairs - token * sum(documents.lengths)
    return saved_pairs * heads * (width + SOFTMAX_PRODUCTS) > calls * CALL_PRODUCTS


def packed_runs(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether FlashAttention takes these: CUDA from Ampere on, half precision, heads of a multiple of 8 up to 256."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or width % 8 or width > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """Of what attention computes with."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _by_length(query_BHSW: Tensor, key_BJSW: Tensor, value_BJSW: Tensor, documents: Documents) -> Tensor:
    """Sort tokens by the length of their document; then those of one length are a batch, without a copy."""
    batch, _, length, width = query_BHSW.shape
    packed = [_tokens(x) for x in (query_BHSW, key_BJSW, value_BJSW)]
    if len(documents.length_counts) > 1:
        order_T, inverse_T = documents.orders
        packed = [permute(x_TC, order_T, inverse_T) for x_TC in packed]
    sizes = [size * count for size, count in documents.length_counts]
    mixed = []
    for (size, count), parts in zip(
        documents.length_counts, zip(*(x.split(sizes) for x in packed), strict=True), strict=True
    ):
        # Sorted documents of one length lie side by side: a view makes them a batch. shape: (N, H or J, length, W)
        query, key, value = (part.view(count, size, -1, width).transpose(1, 2) for part in parts)
        out_NHSW = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        mixed.append(_tokens(out_NHSW))
    mixed_TC = mixed[0]
    if len(mixed) > 1:
        # Permutation and inverse change places: this undoes the first reordering.
        mixed_TC = permute(torch.cat(mixed), inverse_T, order_T)
    return mixed_TC.view(batch, length, -1, width).transpose(1, 2)


def _packed(query_BHSW: Tensor, key_BJSW: Tensor, value_BJSW: Tensor, documents: Documents) -> Tensor:
    """One call of FlashAttention, which is told where each document begins."""
    from torch.nn.attention.varlen import varlen_attn  # imports the compiler, which takes seconds

    batch, heads, length, width = query_BHSW.shape
    # Autocast does not know this kernel.
    dtype = _autocast_dtype(query_BHSW)
    inputs = (query_BHSW, key_BJSW, value_BJSW)
    query, key, value = (_tokens(x).view(batch * length, -1, width).to(dtype) for x in inputs)
    options = packed_options(inspect.signature(varlen_attn).parameters)
    if "enable_gqa" not in options:
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    offsets, longest = documents.offsets, documents.length_counts[-1][0]
    mixed_THW: Tensor = varlen_attn(query, key, value, offsets, offsets, longest, longest, **options)  # type: ignore[assignment]
    return mixed_THW.view(batch, length, heads, width).transpose(1, 2)


def packed_options(known: Collection[str]) -> Mapping[str, Any]:
    """How ``varlen_attn`` is told to be causal and to share keys among heads; both have changed.

    Args:
        known: Names of its parameters in this version of torch.
    """
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return options | ({"enable_gqa": True} if "enable_gqa" in known else {})


def _tokens(x_BHSW: Tensor) -> Tensor:
    """Flattened tokens, their heads side by side ``(T, H·W)``."""
    return x_BHSW.transpose(1, 2).reshape(x_BHSW.shape[0] * x_BHSW.shape[2], -1)
