"""Laws of the positional embeddings: closed forms, and rotary products that depend on differences only."""

from __future__ import annotations

import math

import pytest
import torch

from genkit.blocks.embeddings import ConvPositions, interleaved_sincos_2d, rotary, rotate, sincos_2d


def test_sincos_table_is_the_closed_form_with_the_column_first() -> None:
    table = sincos_2d(3, 5, 8)
    assert table.shape == (15, 8)
    assert table.dtype == torch.float32
    r, c, omega = 2, 4, [1.0, 10000.0**-0.5]
    expected = [f(p * o) for p in (c, r) for f in (math.sin, math.cos) for o in omega]
    torch.testing.assert_close(table[r * 5 + c], torch.tensor(expected), rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_2d(2, 2, 6)


def test_coordinates_run_to_two_pi_on_any_grid() -> None:
    table = interleaved_sincos_2d(3, 5, 8)
    r, c, omega = 2, 3, [1.0, 10000.0**-0.5]
    expected = [f(2 * math.pi * p * o) for p in ((r + 1) / 3, (c + 1) / 5) for o in omega for f in (math.sin, math.cos)]
    torch.testing.assert_close(table[r * 5 + c], torch.tensor(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(interleaved_sincos_2d(6, 10, 8)[(2 * r + 1) * 10 + 2 * c + 1], table[r * 5 + c], rtol=0, atol=1e-5)
    assert ConvPositions(8)((4, 7)).shape == (1, 28, 8)
    with pytest.raises(ValueError, match="multiple of 4"):
        interleaved_sincos_2d(2, 2, 6)


@pytest.mark.parametrize("axes", [1, 2])
def test_rotary_products_depend_on_position_differences_only(axes: int) -> None:
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16)
    products = []
    for offset in (0.0, 3.0, 11.0):
        pos_q, pos_k = torch.full((1, 1, axes), 5.0 + offset), torch.full((1, 1, axes), 2.0 + offset)
        products.append((rotate(q, *rotary(pos_q, 16), axes) * rotate(k, *rotary(pos_k, 16), axes)).sum(-1))
    torch.testing.assert_close(products[0], products[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(products[0], products[2], rtol=1e-5, atol=1e-5)
    unrotated = (q * k).sum(-1)
    assert (products[0] - unrotated).abs().max() > 1e-2


def test_rotary_keeps_lengths_and_each_axis_turns_its_own_slice() -> None:
    x = torch.randn(2, 3, 4, 16)
    pos = torch.rand(2, 4, 2) * 9
    turned = rotate(x, *rotary(pos, 16), 2)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)
    pos[..., 1] = 0
    assert torch.equal(rotate(x, *rotary(pos, 16), 2)[..., 8:], x[..., 8:])
    assert rotate(x.bfloat16(), *rotary(pos, 16), 2).dtype == torch.bfloat16
