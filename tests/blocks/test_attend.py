"""Laws of `attend`: it equals the written-out softmax under every mask, and stays finite where nothing is allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from genkit.blocks.attend import attend


def heads(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def written_out(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Softmax over the allowed keys with plain matrices, 0 where none is allowed."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias
    weights = logits.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)
    return weights @ v


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("value_width", [8, 12, 3])
@pytest.mark.parametrize("mask_kind", ["none", "keys", "pairs"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("nq", [1, 3, 7])
def test_attend_equals_the_written_out_softmax(kv_heads: int, value_width: int, mask_kind: str, causal: bool, nq: int) -> None:
    q, k, v = heads(3, 4, nq, 8), heads(3, kv_heads, 7, 8, seed=1), heads(3, kv_heads, 7, value_width, seed=2)
    triangle = torch.ones(nq, 7).tril(7 - nq).bool() if causal else torch.ones(nq, 7).bool()
    mask, allowed = None, triangle[None, None]
    if mask_kind == "keys":
        mask = heads(3, 7, seed=3) > 0
        allowed = mask[:, None, None] & triangle
    elif mask_kind == "pairs":
        mask = allowed = heads(3, 1, nq, 7, seed=4) > 0
    out = attend(q, k, v, mask=mask, causal=causal, scale=0.3)
    torch.testing.assert_close(out, written_out(q, k, v, allowed, scale=0.3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_bias_is_added_to_the_scaled_logits(causal: bool) -> None:
    q, k, v, bias = heads(2, 2, 5, 4), heads(2, 2, 5, 4, seed=1), heads(2, 2, 5, 4, seed=2), heads(1, 2, 5, 5, seed=3)
    mask = torch.tensor([[True, True, False, True, True], [False, False, True, True, True]])
    allowed = mask[:, None, None] & (torch.ones(5, 5).tril().bool() if causal else torch.ones(5, 5).bool())
    torch.testing.assert_close(
        attend(q, k, v, bias=bias, mask=mask, causal=causal), written_out(q, k, v, allowed, bias), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_query_without_allowed_keys_gives_zero_and_finite_gradients(dtype: torch.dtype, with_bias: bool) -> None:
    q, k, v = (heads(2, 2, 4, 8, seed=s).to(dtype).requires_grad_() for s in range(3))
    mask = torch.tensor([[False] * 4, [True] * 4])
    out = attend(q, k, v, mask=mask, bias=torch.zeros(1, 2, 4, 4) if with_bias else None)
    assert (out[0] == 0).all()
    assert (out[1] != 0).all()
    out.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() and (t.grad[0] == 0).all() for t in (q, k, v))


def test_no_keys_at_all_gives_zeros_that_belong_to_the_graph() -> None:
    q, k, v = (heads(2, h, n, 8).requires_grad_() for h, n in ((4, 3), (2, 0), (2, 0)))
    out = attend(q, k, v)
    assert out.shape == (2, 4, 3, 8)
    assert (out == 0).all()
    out.sum().backward()
    assert q.grad is not None
    assert v.grad is not None


def test_a_mask_of_the_wrong_kind_or_shape_is_refused() -> None:
    q = heads(2, 2, 3, 4)
    with pytest.raises(TypeError, match=r"must be bool .*got torch.float32"):
        attend(q, q, q, mask=torch.ones(2, 3))
    for shape in [(2, 4), (3, 3), (3,), (2, 1, 2, 3), (2, 3, 3, 3), (2, 3, 3)]:
        with pytest.raises(ValueError, match=r"\[2, 3\] or \[2, 1 or 2, 3, 3\]"):
            attend(q, q, q, mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="the written-out softmax is for CPUs with AVX512-BF16")
@pytest.mark.parametrize("case", ["plain", "mask", "causal", "bias"])
def test_written_out_softmax_equals_the_fused_kernel(case: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 9, 16, generator=generator) for _ in range(3))
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "mask": {"mask": torch.rand(3, 9, generator=generator) > 0.4},
        "causal": {"causal": True},
        "bias": {"bias": torch.randn(1, 2, 9, 9, generator=generator)},
    }
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.to(dtype, copy=True).detach().requires_grad_(True) for x in (q, k, v)]
        out = attend(*leaves, **options[case])
        out.float().square().sum().backward()
        results.append([out.float(), *(leaf.grad.float() for leaf in leaves if leaf.grad is not None)])
    assert_close(results[1], results[0], rtol=0.05, atol=0.08)
