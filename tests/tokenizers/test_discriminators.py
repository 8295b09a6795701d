"""Discriminators of tokenizers and the terms around them."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from genkit.convert import _discriminators
from genkit.tokenizers.discriminators import (
    LeCam,
    PatchDiscriminator,
    StyleDiscriminator,
    adaptive_weight,
    batch_spread,
    build_discriminator,
    gradient_penalty,
    logit_laplace,
)


def test_published_sizes_have_the_published_parameter_counts() -> None:
    with torch.device("meta"):
        style, patch = build_discriminator("style", 256), build_discriminator("patch", 256)
    assert sum(p.numel() for p in style.parameters()) == 28_864_129
    assert sum(p.numel() for p in patch.parameters()) == 2_765_633


@pytest.mark.parametrize("b", [1, 3, 4, 6, 9, 11])
def test_any_batch_is_judged(b: int) -> None:
    judge = StyleDiscriminator(8, width=8)
    assert judge(torch.randn(b, 3, 8, 8)).shape == (b,)
    assert build_discriminator("patch", 32, 4)(torch.randn(b, 3, 32, 32)).shape == (b, 1, 2, 2)


def test_the_spread_is_that_of_a_group() -> None:
    x = torch.randn(8, 2, 3, 3)
    groups = x.view(4, 2, 2, 3, 3)
    expected = (groups.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
    assert_close(batch_spread(x)[:, 0, 0, 0], expected.repeat(4))
    assert float(batch_spread(x[:1].expand(4, -1, -1, -1)).max()) < 1e-3


def test_blurring_keeps_constants_inside() -> None:
    judge = StyleDiscriminator(8, width=8)
    conv = cast(Any, judge.blocks[0]).skip
    out = conv(torch.ones(1, 8, 8, 8))
    assert_close(out[0, :, 1, 1], (conv.weight * conv.scale).sum((1, 2, 3)))


def test_penalty_weight_and_likelihood_are_their_formulae() -> None:
    linear: Any = nn.Sequential(nn.Flatten(), nn.Linear(12, 1, bias=False))
    found = gradient_penalty(linear, torch.randn(5, 3, 2, 2))
    assert_close(found, linear[1].weight.square().sum())
    found.backward()
    assert_close(linear[1].weight.grad, 2 * linear[1].weight)
    last = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = adaptive_weight((last * torch.tensor([6.0, 8.0])).sum(), last.sum(), last)
    assert float(weight) == pytest.approx(10 / (math.sqrt(2) + 1e-4)) and not weight.requires_grad
    pixels = torch.tensor([0.25])
    y = 0.8 * 0.25 + 0.1
    expected = abs(math.log(y / (1 - y)) - 0.5) / 2 + math.log(2 * 2 * y * (1 - y))
    assert float(logit_laplace(torch.tensor([0.5]), pixels, math.log(2))) == pytest.approx(expected, rel=1e-5)


def test_lecam_pulls_towards_the_other_sides_average() -> None:
    term = LeCam(decay=0.5)
    found = term(torch.tensor([2.0]), torch.tensor([-2.0]))  # averages 1 and -1
    assert float(found) == pytest.approx((2 + 1) ** 2 + (1 + 2) ** 2)
    assert term.state_dict()["means"].tolist() == [1, -1]


@pytest.mark.parametrize("judge", [StyleDiscriminator(16, width=8), PatchDiscriminator(width=4, num_layers=2)], ids=["style", "patch"])
def test_official_names_go_there_and_back(judge: nn.Module) -> None:
    state = _discriminators.to_official(judge)
    back = _discriminators.discriminator({**state, "blocks.1.conv2.0.kernel": torch.zeros(4, 4)} if "blocks.0.0.weight" in state else state)
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(back.eval()(x), judge.eval()(x))


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="power of two from 8, got 48"):
        StyleDiscriminator(48)
    with pytest.raises(ValueError, match="Did you mean 'patch'"):
        build_discriminator("patches", 32)
