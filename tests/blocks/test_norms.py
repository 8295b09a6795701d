"""Laws of the norms: the written-out formula, float32 statistics, the input's dtype outside."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genkit.blocks.norms import NORMS, build_norm


def formula(kind: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    if kind == "bn":
        return (x - x.mean((0, 1))) / (x.var((0, 1), correction=0) + eps).sqrt()
    if kind.startswith("ln"):
        x = x - x.mean(-1, keepdim=True)
    return x if kind == "none" else x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_norm_equals_its_formula(kind: str, eps: float) -> None:
    x, norm = torch.randn(3, 5, 16) * 2 + 1, build_norm(kind, 16, eps)
    expected = formula(kind, x, eps)
    parameters = dict(norm.named_parameters())
    assert set(parameters) == {"ln": {"weight", "bias"}, "bn": {"weight", "bias"}, "rms": {"weight"}}.get(kind, set())
    for name, parameter in parameters.items():
        nn.init.normal_(parameter)
        expected = expected * parameter if name == "weight" else expected + parameter
    torch.testing.assert_close(norm(x), expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["ln", "ln_noaffine", "rms", "rms_noaffine"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_input_keeps_its_dtype_and_has_float32_statistics(kind: str, weight_dtype: torch.dtype) -> None:
    x = (torch.randn(4, 512) * 0.1 + 8).bfloat16()  # bf16 sums over 512 values near 8 would be off by whole units
    norm = build_norm(kind, 512, 1e-5).to(weight_dtype)
    out = norm(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), formula(kind, x, 1e-5), rtol=1e-2, atol=1e-2)


def test_unknown_norm_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown norm 'lnn'.*Did you mean 'ln'"):
        build_norm("lnn", 4)
