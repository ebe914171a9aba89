from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lifelong_moe.model.attention import grouped_query_attention
from lifelong_moe.model.cache import KeyValueCache, LayerCache


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_positions_are_written_in_place() -> None:
    cache, keys, values = LayerCache(6), normal(2, 3, 5, 4), normal(2, 3, 5, 4, seed=1)
    first, _ = cache.extend(keys[:, :, :3], values[:, :, :3])
    for t in (3, 4):
        found = cache.extend(keys[:, :, t : t + 1], values[:, :, t : t + 1])
    assert torch.equal(found[0], keys) and torch.equal(found[1], values)
    assert cache.length == 5
    assert found[0].data_ptr() == first.data_ptr()  # room was made once


def test_positions_without_room() -> None:
    cache = KeyValueCache(2, 4)
    cache.layers[0].extend(normal(1, 1, 3, 2), normal(1, 1, 3, 2))
    assert cache.length == 3
    with pytest.raises(ValueError, match="room for 4 positions, not for 5"):
        cache.layers[0].extend(normal(1, 1, 2, 2), normal(1, 1, 2, 2))
    assert cache.length == 3


@pytest.mark.parametrize(("queries", "masked"), [(1, False), (1, True), (7, False), (7, True)])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_heads_that_share_keys(queries: int, masked: bool, kv_heads: int) -> None:
    query, key, value = normal(2, 6, queries, 8), normal(2, kv_heads, 7, 8, seed=1), normal(2, kv_heads, 7, 8, seed=2)
    mask = (normal(2, 1, queries, 7, seed=3) > 0).index_fill(-1, torch.tensor([0]), True) if masked else None
    found = grouped_query_attention(query, key, value, mask)
    keys, values = (x.repeat_interleave(6 // kv_heads, dim=1) for x in (key, value))
    logits = query @ keys.transpose(-1, -2) / 8**0.5
    allowed = torch.ones(queries, 7, dtype=torch.bool).tril(7 - queries) if mask is None else mask
    expected = F.softmax(logits.masked_fill(~allowed, -torch.inf), dim=-1) @ values
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
