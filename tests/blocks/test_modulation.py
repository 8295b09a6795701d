"""Laws of modulation: its formula, and the start at zero."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genkit.blocks.modulation import Modulation, modulate


def test_modulate_scales_around_one_and_shifts_every_token() -> None:
    x, shift, scale = torch.randn(3, 5, 4), torch.randn(3, 4), torch.randn(3, 4)
    for i in range(3):
        torch.testing.assert_close(modulate(x, shift, scale)[i], x[i] * (1 + scale[i]) + shift[i], rtol=0, atol=0)


def test_modulation_is_a_linear_of_silu_in_row_chunks_and_starts_at_zero() -> None:
    modulation, cond = Modulation(4, 3, cond_dim=6), torch.randn(2, 6)
    assert (modulation(cond) == 0).all()
    nn.init.normal_(modulation.linear.weight)
    nn.init.normal_(modulation.linear.bias)
    chunks = modulation.linear(F.silu(cond)).chunk(3, dim=-1)
    vectors = modulation(cond)
    assert all(torch.equal(vectors[:, i], chunks[i]) for i in range(3))
    modulation.reset_parameters()
    assert (modulation(cond) == 0).all()


def test_modulation_refuses_a_condition_of_another_width() -> None:
    with pytest.raises(ValueError, match=r"must be \[b, c\], c=4, got \[2, 5\]"):
        Modulation(4, 3)(torch.zeros(2, 5))
