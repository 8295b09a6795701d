"""Averages follow their formula, stay in float32 and are of no interest to autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genkit.training.ema import EMA


def test_average_follows_the_formula_and_copies_buffers() -> None:
    net = nn.BatchNorm1d(2)
    ema = EMA({"net": net}, decay=0.75, use_warmup=False)
    expected = net.weight.detach().clone()
    for step in range(3):
        net.weight.data += torch.tensor([1.0, -2.0])
        net.running_mean = torch.full((2,), float(step))
        ema.update({"net": net}, step)
        expected = expected + 0.25 * (net.weight.detach() - expected)
    average = ema.modules["net"]
    torch.testing.assert_close(average.get_parameter("weight"), nn.Parameter(expected, requires_grad=False), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(average.get_buffer("running_mean"), torch.full((2,), 2.0), rtol=0, atol=0)
    assert not average.training
    assert not any(p.requires_grad for p in average.parameters())


def test_warmup_caps_the_decay_early() -> None:
    ema = EMA({}, decay=0.99)
    assert ema.decay_at(0) == pytest.approx(0.1)
    assert ema.decay_at(90) == pytest.approx(0.91)
    assert ema.decay_at(10**6) == 0.99


def test_average_kept_elsewhere_is_brought_and_put_back() -> None:
    net, cpu = nn.Linear(2, 2), torch.device("cpu")
    ema = EMA({"net": net}, decay=0.5, use_warmup=False, device=cpu)
    with ema.on(cpu):
        assert ema.modules["net"].get_parameter("weight").device == cpu
    net.weight.data += 1
    before = ema.modules["net"].get_parameter("weight").clone()
    ema.update({"net": net}, 0)
    torch.testing.assert_close(ema.modules["net"].get_parameter("weight"), before + 0.5, rtol=1e-6, atol=1e-6)


def test_average_of_half_precision_weights_is_kept_in_float32() -> None:
    net = nn.Linear(2, 2).to(torch.bfloat16)
    ema = EMA({"net": net}, decay=0.999, use_warmup=False)
    before = ema.modules["net"].get_parameter("weight").clone()
    net.weight.data += 1
    ema.update({"net": net}, 0)
    weight = ema.modules["net"].get_parameter("weight")
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight - before, torch.full((2, 2), 0.001), rtol=0.05, atol=0)
