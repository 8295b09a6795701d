"""Laws of the mixer table: one registration makes a mixer known to strings, errors and blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genkit.blocks import stack
from genkit.blocks.branch import Block
from genkit.blocks.caps import MIXERS, Caps, MixerConfig, TokenMixer, option, refusal, register


@pytest.fixture
def mean_mixer() -> Iterator[type[MixerConfig]]:
    """A mixer of someone else, registered for one test."""

    class Mean(TokenMixer):
        def __init__(self, config: MixerConfig) -> None:
            super().__init__()
            self.config = config

        def forward(self, x: Tensor, **_: object) -> Tensor:
            return x.mean(1, keepdim=True).expand_as(x)

    @register("mean")
    @dataclass(frozen=True)
    class MeanConfig(MixerConfig):
        power: int = option(1, int)

        @property
        def caps(self) -> Caps:
            return Caps(set_op=True)

        def build(self, dim: int, *, heads: int | None = None, context_dim: int | None = None) -> Mean:
            return Mean(self)

    yield MeanConfig
    del MIXERS["mean"]


def test_a_mixer_from_outside_needs_one_registration_only(mean_mixer: type[MixerConfig]) -> None:
    assert str(stack.parse("mean(1), mean(power=3)")) == "mean, mean(power=3)"
    block = stack.build("mean(2) + mlp", 16, needs=Caps(set_op=True))[0]
    assert isinstance(block, Block)
    _, second = block.branches
    x = torch.randn(2, 3, 16)
    h = x + F.layer_norm(x, (16,)).mean(1, keepdim=True)
    torch.testing.assert_close(block(x), second(h), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"mean\(power=2\) does not take mask. Mixers that do: attention"):
        block(x, mask=torch.ones(2, 3).bool())
    with pytest.raises(ValueError, match="lacks mask"):
        stack.build("mean", 16, needs=Caps(mask=True))


def test_a_name_can_be_registered_once(mean_mixer: type[MixerConfig]) -> None:
    with pytest.raises(ValueError, match="'mean' is registered already"):
        register("mean")(mean_mixer)


def test_missing_capabilities_are_those_asked_for_and_absent() -> None:
    have = Caps(set_op=True, mask=True)
    assert have.missing(Caps(set_op=True)) == []
    assert have.missing(Caps(set_op=True, causal=True, cache=True)) == ["causal", "cache"]
    assert Caps(grid=True).missing(Caps(grid=True)) == []
    assert have.missing(Caps(grid=True)) == []


def test_a_refusal_names_the_mixer_and_those_that_can() -> None:
    config = stack.parse("mlp(act='tanh')")[0][0]
    assert (
        str(refusal(config, "cache")) == "mlp(act='tanh') does not take cache. "
        "Mixers that do: attention(causal=True), linear(causal=True), lmu, retention, shsa(causal=True)."
    )
    assert "Mixers that do: none" in str(refusal(config, "wings"))
