"""Laws of the caches: what goes in comes out in order, overflow and gradients are refused."""

from __future__ import annotations

import pytest
import torch

from genkit.blocks.caches import KVCache, StateCache


def test_kv_cache_returns_all_tokens_in_order_and_raises_when_full() -> None:
    cache = KVCache(2, 3, 5, 4, 6, device="cpu", dtype=torch.float32)
    k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 6)
    cache.append(k[:, :, :2], v[:, :, :2])
    keys, values = cache.append(k[:, :, 2:], v[:, :, 2:])
    assert cache.length == 5
    assert torch.equal(keys, k)
    assert torch.equal(values, v)
    with pytest.raises(RuntimeError, match="5 of 5 tokens stored and 1 more given"):
        cache.append(k[:, :, :1], v[:, :, :1])
    cache.reset()
    assert torch.equal(cache.append(k[:, :, 3:4], v[:, :, 3:4])[0], k[:, :, 3:4])


def test_kv_cache_reorder_picks_rows_and_may_change_their_number() -> None:
    cache = KVCache(2, 1, 3, 2, 2, device="cpu", dtype=torch.float32)
    k = torch.arange(4.0).reshape(2, 1, 1, 2)
    cache.append(k, k)
    cache.reorder(torch.tensor([1, 1, 0]))
    assert torch.equal(cache.k[:, :, :1], k[[1, 1, 0]])
    assert cache.append(k[[0, 1, 1]], k[[0, 1, 1]])[0].shape == (3, 1, 2, 2)


def test_kv_cache_refuses_gradients_other_dtypes_and_other_shapes() -> None:
    cache = KVCache(1, 1, 3, 2, 2, device="cpu", dtype=torch.float32)
    k = torch.zeros(1, 1, 1, 2)
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        cache.append(k.clone().requires_grad_(), k)
    with pytest.raises(TypeError, match=r"dtype=torch\.bfloat16"):
        cache.append(k.bfloat16(), k.bfloat16())
    with pytest.raises(ValueError, match=r"must be \[1, 1, 1, 2\].*got \[2, 1, 1, 2\]"):
        cache.append(k.repeat(2, 1, 1, 1), k.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="max_len"):
        KVCache(1, 1, 0, 2, 2, device="cpu", dtype=torch.float32)
    assert cache.length == 0


def test_state_cache_stores_resets_and_reorders_by_name() -> None:
    cache = StateCache(state=torch.zeros(2, 3), sums=torch.zeros(2))
    cache["state"] = torch.arange(6.0).reshape(2, 3)
    cache.reorder(torch.tensor([1, 0]))
    assert torch.equal(cache["state"], torch.tensor([[3.0, 4, 5], [0, 1, 2]]))
    with pytest.raises(ValueError, match="cannot store 'stat'"):
        cache["stat"] = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"cannot store 'sums' of shape \[3\]"):
        cache["sums"] = torch.zeros(3)
    cache.reset()
    assert (cache["state"] == 0).all()
