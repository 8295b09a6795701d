"""The faster library gives the same products, and only where it may."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks import fast_linear
from genkit.blocks.fast_linear import OneDNNLinear, with_fast_linear

has_onednn = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch has no oneDNN product")


@has_onednn
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 1, 24), (0, 24), (2, 0, 24)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_products_are_the_same(shape: tuple[int, ...], bias: bool) -> None:
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(shape)
    expected = layer(x)
    with OneDNNLinear():
        got = layer(x)
        torch.testing.assert_close(layer(x.transpose(0, -1).contiguous().transpose(0, -1)), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@has_onednn
@torch.no_grad()
def test_other_types_are_left_alone() -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    with OneDNNLinear():
        assert torch.equal(F.linear(x.double(), weight.double()), x.double() @ weight.double().T)
        assert F.linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(F.linear(x, weight.T.contiguous().T), x @ weight.T, rtol=1e-5, atol=1e-6)


def test_gradients_and_autocast_keep_the_usual_library(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[bool] = []
    monkeypatch.setattr(fast_linear, "is_worthwhile", lambda: True)
    monkeypatch.setattr(OneDNNLinear, "__enter__", lambda self: entered.append(True))
    monkeypatch.setattr(OneDNNLinear, "__exit__", lambda self, *args: None)

    @with_fast_linear
    def forward(x: Tensor) -> Tensor:
        return x + 1

    forward(torch.ones(1))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        forward(torch.ones(1))
    assert entered == []
    with torch.no_grad():
        assert forward(torch.ones(1)).tolist() == [2]
    assert entered == [True]
