"""Preparation of clips and metrics per frame."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from genkit.eval.reconstruction import psnr_per_image
from genkit.eval.video import PREPARATIONS, prepare_clips, psnr_per_frame, ssim_per_frame


def clip(h: int = 20, w: int = 30) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 3, h, w), dtype=torch.uint8)


@pytest.mark.parametrize("protocol", sorted(PREPARATIONS))
def test_bytes_and_floats_are_prepared_alike(protocol: str) -> None:
    u8 = clip()
    out = prepare_clips(u8, protocol)
    assert out.shape == (2, 3, 3, 224, 224) and float(out.min()) >= -1.0001 and float(out.max()) <= 1.0001
    assert_close(prepare_clips(u8.float() / 127.5 - 1, protocol), out, rtol=0, atol=1 / 127 if protocol == "videogpt" else 1e-5)


def test_frames_keep_their_order() -> None:
    steps = torch.arange(3, dtype=torch.uint8)[None, :, None, None, None] * 100
    out = prepare_clips(steps.expand(2, 3, 3, 16, 16), "cd-fvd")
    assert_close(out.mean((0, 1, 3, 4)), torch.tensor([-1.0, 200 / 255 - 1, 400 / 255 - 1]), rtol=0, atol=1e-5)


def test_metrics_per_frame_are_those_of_the_pictures() -> None:
    x, y = clip(), clip()
    assert_close(psnr_per_frame(x, y)[1, 2], psnr_per_image(x[1, 2:3], y[1, 2:3])[0], rtol=0, atol=0)
    assert_close(ssim_per_frame(x, x), torch.ones(2, 3, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="originals"):
        psnr_per_frame(x, y[:, :2])


def test_unknown_protocol_is_named() -> None:
    with pytest.raises(ValueError, match="unknown video protocol 'stylegan'.*Did you mean 'stylegan-v'"):
        prepare_clips(clip(), "stylegan")
