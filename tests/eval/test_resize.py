"""Resize modes: identities, the libraries they imitate, batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close

from genkit.eval.resize import RESIZES, fit_short_side, resize


def picture(h: int, w: int) -> torch.Tensor:
    return torch.randint(0, 256, (1, 3, h, w), dtype=torch.uint8)


@pytest.mark.parametrize("mode", sorted(RESIZES))
def test_same_size_is_the_identity(mode: str) -> None:
    x = picture(19, 23)
    assert_close(resize(x, (19, 23), mode), x.float(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("mode", sorted(RESIZES))
@pytest.mark.parametrize("size", [(7, 40), (31, 5)])
def test_batches_and_constants(mode: str, size: tuple[int, int]) -> None:
    x = torch.cat([picture(17, 12), picture(17, 12)])
    out = resize(x, size, mode)
    assert out.shape == (2, 3, *size) and out.dtype == torch.float32
    assert_close(out[1:], resize(x[1:], size, mode), rtol=1e-5, atol=1e-3)
    assert_close(resize(torch.full((1, 3, 9, 9), 77, dtype=torch.uint8), size, mode), torch.full((1, 3, *size), 77.0), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("h", "w", "size"), [(64, 48, (21, 30)), (16, 20, (50, 33))])
def test_clean_is_pillows_bicubic_on_float_channels(h: int, w: int, size: tuple[int, int]) -> None:
    x = picture(h, w)
    planes = [
        Image.fromarray(plane.numpy().astype(np.float32), mode="F").resize((size[1], size[0]), Image.Resampling.BICUBIC) for plane in x[0]
    ]
    expected = torch.from_numpy(np.stack([np.asarray(plane) for plane in planes])).clamp(0, 255)
    assert_close(resize(x, size, "clean")[0], expected, rtol=0, atol=2e-3)


def test_tf1_takes_the_upper_left_neighbour() -> None:
    x = torch.tensor([[[[0.0, 10.0], [20.0, 30.0]]]]).repeat(1, 3, 1, 1)
    out = resize(x, 4, "tf1")[0, 0]
    assert out.tolist() == [[0, 5, 10, 10], [10, 15, 20, 20], [20, 25, 30, 30], [20, 25, 30, 30]]
    assert_close(resize(x, 4, "nvidia")[0, 0], out, rtol=0, atol=1e-3)


def test_short_side_fits_and_the_centre_is_kept() -> None:
    x = picture(20, 50).float()
    whole = F.interpolate(x, (10, 25), mode="bilinear", align_corners=False)
    assert_close(fit_short_side(x, 10), whole[..., 7:17], rtol=0, atol=0)
    assert fit_short_side(picture(33, 21).float(), 8).shape[-2:] == (8, 8)


def test_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match="unknown resize mode 'bicubic'"):
        resize(picture(4, 4), 8, "bicubic")
