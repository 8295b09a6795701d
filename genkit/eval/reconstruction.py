"""How close reconstructions come to the originals, pixel by pixel: PSNR in two conventions, and SSIM.

Pictures are in [-1, 1]; both are clamped and, as the published tokenizer evaluations do, truncated to 8 bits before comparing. PSNR is
10 log10(1 / MSE) with values in [0, 1].

Letters: b batch, h w rows and columns.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from genkit.checks import check_shape


def to_unit(images: Tensor) -> Tensor:
    """Map pictures from [-1, 1] to 8-bit steps in [0, 1]: clamp, (x + 1) / 2 * 255, truncate, / 255; float32."""
    return ((images.detach().float().clamp(-1, 1) + 1) / 2 * 255).floor() / 255


def _pair(images: Tensor, originals: Tensor, name: str) -> tuple[Tensor, Tensor]:
    sizes = check_shape(originals, f"{name}: originals", "b 3 h w")
    check_shape(images, f"{name}: images", "b 3 h w", **{axis: sizes[axis] for axis in "bhw"})
    return to_unit(images), to_unit(originals)


def squared_errors(images: Tensor, originals: Tensor) -> Tensor:
    """Return the mean squared error of each picture, values in [0, 1], float64 [b]."""
    x, y = _pair(images, originals, "squared_errors")
    return (x.double() - y.double()).square().mean(dim=(1, 2, 3))


def psnr_per_image(images: Tensor, originals: Tensor) -> Tensor:
    """Return the PSNR of each picture in dB [b], float64; inf where nothing differs. The usual figure is its mean."""
    return -10 * squared_errors(images, originals).log10()


def psnr_pooled(images: Tensor, originals: Tensor) -> Tensor:
    """Return the PSNR of the error averaged over all pictures first, in dB, float64 []; never above the mean of `psnr_per_image`.

    This is the published convention of the SimVQ family (over batches of 64).
    """
    return -10 * squared_errors(images, originals).mean().log10()


def ssim_per_image(images: Tensor, originals: Tensor) -> Tensor:
    """Return the structural similarity of each picture [b], float64: 7x7 uniform window, mean over channels, data range 1.

    Raises:
        ValueError: if a side is below 7 pixels.
        ImportError: if scikit-image is missing.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ImportError("SSIM needs scikit-image: pip install scikit-image.") from error
    x, y = _pair(images, originals, "ssim_per_image")
    if min(x.shape[-2:]) < 7:
        raise ValueError(f"ssim_per_image: pictures must be at least 7x7 pixels (the window), got {x.shape[-2]}x{x.shape[-1]}.")
    pairs = zip(x.cpu().numpy(), y.cpu().numpy(), strict=True)
    values = [structural_similarity(q, p, channel_axis=0, data_range=1.0) for p, q in pairs]
    return torch.from_numpy(np.asarray(values, dtype=np.float64))
