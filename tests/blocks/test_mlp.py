"""Laws of the feed-forward mixer: formulas, and nested widths as dense cuts with no gradient outside."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genkit.blocks.mlp import ACTIVATIONS, MLPConfig


def activation(name: str, x: Tensor) -> Tensor:
    x = x.double()
    cubic = 0.7978845608028654 * (x + 0.044715 * x**3)
    return {
        "gelu": x * torch.special.ndtr(x),
        "gelu_tanh": 0.5 * x * (1 + cubic.tanh()),
        "quick_gelu": x / (1 + (-1.702 * x).exp()),
        "tanh": (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
        "relu": x.clamp(min=0),
        "relu2": x.clamp(min=0) ** 2,
        "silu": x / (1 + (-x).exp()),
    }[name].float()


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True, "product"])
@pytest.mark.parametrize("bias", [False, True])
def test_mlp_equals_its_formula(act: str, gated: bool | str, bias: bool) -> None:
    mlp, x = MLPConfig(ratio=2, act=act, gated=gated, bias=bias).build(6), torch.randn(2, 3, 6)
    hidden = mlp.fc1(x)
    if mlp.gate is None:
        hidden = activation(act, hidden)
    else:
        hidden = activation(act, mlp.gate(x) * hidden) if gated == "product" else activation(act, mlp.gate(x)) * hidden
    torch.testing.assert_close(mlp(x), mlp.fc2(hidden), rtol=1e-5, atol=1e-6)
    assert (mlp.gate is not None) == bool(gated)
    assert sum(name.endswith("bias") for name, _ in mlp.named_parameters()) == bias * (3 if gated else 2)


def test_hidden_wins_over_ratio() -> None:
    assert MLPConfig(ratio=2, hidden=5).build(6).hidden == 5
    assert MLPConfig(ratio=2.5).build(6).hidden == 15


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [0.25, 0.5, 1])
def test_a_nested_width_is_the_dense_cut_with_zero_gradient_outside(gated: bool, bias: bool, width: float) -> None:
    mlp, x = MLPConfig(hidden=16, gated=gated, bias=bias, nested=(0.25, 0.5, 1)).build(6), torch.randn(2, 3, 6)
    units = int(16 * width)
    dense = MLPConfig(hidden=units, gated=gated, bias=bias).build(6)
    cut = {n: p[:units] if not n.startswith("fc2") else p[:, :units] if p.ndim == 2 else p for n, p in mlp.state_dict().items()}
    dense.load_state_dict(cut)
    out = mlp(x, width=width)
    torch.testing.assert_close(out, dense(x), rtol=1e-6, atol=1e-6)
    out.square().sum().backward()
    for layer in filter(None, (mlp.fc1, mlp.gate)):
        gradient = layer.weight.grad
        assert gradient is not None
        assert not gradient[units:].any()
        assert gradient[:units].any()
    assert (mlp.fc2.weight.grad[:, units:] == 0).all()  # type: ignore[index]


def test_width_is_an_argument_and_leaves_no_state() -> None:
    mlp, x = MLPConfig(hidden=8, nested=(0.5, 1)).build(4), torch.randn(1, 2, 4)
    full = mlp(x)
    assert not torch.allclose(mlp(x, width=0.5), full)
    assert torch.equal(mlp(x), full)
    assert torch.equal(mlp(x, width=1), full)
    assert torch.equal(mlp.fc2(F.gelu(mlp.fc1(x))), full)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nested": (0.5, 0.25, 1)}, "ascending fractions that end with 1"),
        ({"nested": (0.5,)}, "ascending fractions that end with 1"),
        ({"nested": ()}, "ascending fractions that end with 1"),
        ({"nested": ("a", 1)}, "ascending fractions that end with 1"),
        ({"nested": 0.5}, "nested must be tuple, got 0.5"),
        ({"act": "gelu_tan"}, "Did you mean 'gelu_tanh'"),
        ({"ratio": 0}, "must be positive"),
        ({"hidden": 2.5}, "hidden must be int or None, got 2.5"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLPConfig(**options)


def test_widths_that_are_not_nested_or_not_whole_are_refused() -> None:
    with pytest.raises(ValueError, match=r"width must be one of \(1,\), got 0.5"):
        MLPConfig().build(4)(torch.zeros(1, 1, 4), width=0.5)
    with pytest.raises(ValueError, match=r"must cut hidden=10 at whole units, got \[0.25\]"):
        MLPConfig(hidden=10, nested=(0.25, 0.5, 1)).build(4)
    with pytest.raises(ValueError, match="at least one unit"):
        MLPConfig(ratio=0.1).build(4)
