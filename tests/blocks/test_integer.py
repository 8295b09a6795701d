"""Fake quantisation and integer functions against what they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from genkit.blocks import integer, stack


def values(*shape: int, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    scale = integer.scale_of(x.amin(), x.amax(), bits)
    return integer.quantised(x, scale, bits), scale


def test_rounded_values_are_whole_multiples_and_gradients_pass_where_nothing_is_cut() -> None:
    x, scale = torch.tensor([0.26, -0.9, 3.0], requires_grad=True), torch.tensor(0.1)
    out = integer.quantised(x, scale, 5)  # -16 .. 15
    assert_close(out, torch.tensor([0.3, -0.9, 1.5]))
    out.sum().backward()
    assert x.grad is not None and x.grad.tolist() == pytest.approx([1, 1, 0])


def test_integer_functions_are_near_what_they_stand_for() -> None:
    x, scale = values(4, 64)
    found, unit = integer.shiftmax(x, scale[None], 16)
    assert_close(found, x.softmax(-1), rtol=0.15, atol=0.003)
    assert (found / unit).frac().abs().max() == 0
    weight, bias = torch.rand(64) + 0.5, torch.randn(64)
    normed, _ = integer.integer_layer_norm(x, scale, weight, bias)
    assert_close(normed, nn.functional.layer_norm(x, (64,), weight, bias), rtol=0, atol=0.05)
    gelu, _ = integer.shift_gelu(x, scale)
    assert_close(gelu, nn.functional.gelu(x), rtol=0, atol=0.35)
    both, new = integer.requantised([(x, scale), (2 * x, 2 * scale)])
    assert_close(both, 3 * x, rtol=0, atol=1.6 * float(new))


@pytest.mark.parametrize("weights", ["int", "pow2"])
def test_fake_quant_rounds_trains_and_remembers_its_range(weights: str) -> None:
    torch.manual_seed(0)
    blocks: Any = stack.build("attention(heads=2) + mlp(ratio=2)", 8)
    names = integer.add_fake_quant(blocks, 8, weights, inside="")
    assert names == [f"0.branches.{part}" for part in ("0.f.q", "0.f.kv", "0.f.proj", "1.f.fc1", "1.f.fc2")]
    x = torch.randn(3, 5, 8)
    blocks[0].train()(x).square().sum().backward()
    layer = blocks[0].branches[1].f.fc1
    assert layer.base.weight.grad.any() and bool(layer.seen)
    first = float(layer.high)
    layer(30 * x)
    assert first < float(layer.high) < 5 * first, "the range moves slowly"
    kept = float(layer.high)
    blocks[0].eval()(9 * x)
    assert float(layer.high) == kept and "0.branches.1.f.fc1.high" in blocks.state_dict()
    rounded = layer.weight.detach()
    if weights == "pow2":
        assert_close(rounded.abs().log2(), rounded.abs().log2().round())
    else:
        assert len(rounded[0].unique()) <= 255 and float((rounded - layer.base.weight).detach().abs().max()) < 0.01


def test_sixteen_bits_change_next_to_nothing_and_bad_settings_are_refused() -> None:
    torch.manual_seed(0)
    plain, x = nn.Linear(8, 4), torch.randn(3, 8)
    layer = integer.FakeQuantLinear(plain, 16)
    assert_close(layer.eval()(x), plain(x), rtol=1e-3, atol=1e-3, msg="without a range inputs stay as they are")
    assert_close(layer.train()(x), plain(x), rtol=1e-3, atol=1e-3)
    for call, message in (
        (lambda: integer.FakeQuantLinear(plain, 1), "bits must lie in 2 .. 16"),
        (lambda: integer.FakeQuantLinear(plain, weights="binary"), "unknown kind of weights"),
        (lambda: integer.add_fake_quant(nn.Sequential(plain)), "no linear maps below 'blocks'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
