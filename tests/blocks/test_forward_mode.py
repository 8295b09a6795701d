"""Forward mode through attention and group norm, whose fused kernels do not have it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from genkit.blocks.attend import attend
from genkit.blocks.forward_mode import has_tangent
from genkit.generators.edm_layers import GroupNorm


def numeric(f: Any, x: Tensor, direction: Tensor) -> Tensor:
    step = 1e-5
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": torch.tensor([[True, True, False, True]])}, {"scale": 0.3}])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_attention(options: dict[str, Any], kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, direction = (torch.randn(1, 2, 4, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    k, v = (torch.randn(1, kv_heads, 4, 3, dtype=torch.float64, generator=generator) for _ in range(2))

    def f(q: Tensor) -> Tensor:
        return attend(q, k + 0.1 * q[:, :kv_heads], v, **options)

    value, tangent = torch.func.jvp(f, (q,), (direction,))[:2]
    assert_close(value, f(q), rtol=1e-9, atol=1e-9)
    assert_close(tangent, numeric(f, q, direction), rtol=1e-5, atol=1e-7)


def test_group_norm_with_a_tangent_that_lies_otherwise_in_memory() -> None:
    norm = GroupNorm(2, 4).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, -1.0, 0.5]))
    x, direction = torch.randn(2, 4, 3, 5, dtype=torch.float64), torch.randn(2, 4, 5, 3, dtype=torch.float64).transpose(2, 3)
    value, tangent = torch.func.jvp(norm, (x,), (direction,))[:2]
    assert_close(value, torch.nn.functional.group_norm(x, 2, norm.weight, norm.bias), rtol=1e-9, atol=1e-9)
    assert_close(tangent, numeric(norm, x, direction), rtol=1e-5, atol=1e-6)


def test_tangents_are_seen_only_where_there_are_some() -> None:
    seen = []

    def f(x: Tensor) -> Tensor:
        seen.append((has_tangent(x), has_tangent(torch.zeros(2))))
        return x * 2

    f(torch.ones(2))
    torch.func.jvp(f, (torch.ones(2),), (torch.ones(2),))
    assert seen == [(False, False), (True, False)]
