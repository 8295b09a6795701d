"""How evaluation tools bring pictures to a network's size: where most disagreements between published numbers come from.

| name | tool | filter |
|---|---|---|
| "tf1" | TTUR, ADM, torch-fidelity | bilinear, src = dst * in/out, no half pixel, no antialias |
| "nvidia" | StyleGAN, EDM, clean-fid legacy_tensorflow | the same geometry through affine_grid and grid_sample |
| "bilinear" | pytorch-fid, clean-fid legacy_pytorch | half-pixel bilinear, no antialias |
| "antialias" | torchmetrics | half-pixel bilinear, antialiased |
| "clean" | clean-fid | Pillow's bicubic on float channels: antialiased, not rounded, clipped to 0..255 |
| "pil-bilinear", "pil-bicubic" | Pillow on 8-bit pictures | antialiased, rounded to 8 bits |

All take and return pixels [b, c, h, w] in 0..255, float32.

Source: Parmar et al. 2022 (arXiv 2104.11222) for what the choice does. Pillow's filters are two band matrices, which batches can share.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.checks import check_shape, choose

Size = tuple[int, int]


@functools.lru_cache(maxsize=64)
def _tf1_taps(size_in: int, size_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return lower rows, upper rows and weights of the upper ones [out], coordinates in float32 as the tools compute them."""
    with torch.inference_mode(False):
        place = torch.arange(size_out, dtype=torch.float32) * torch.tensor(size_in / size_out, dtype=torch.float32)
        low = place.floor().long()
        return low, (low + 1).clamp_max(size_in - 1), place - low


def tf1(pixels: Tensor, size: Size) -> Tensor:
    """Resize as TensorFlow 1: src = dst * in/out."""
    for axis in (3, 2):  # along a row first
        low, high, weight = (t.to(pixels.device) for t in _tf1_taps(pixels.shape[axis], size[axis - 2]))
        first, second = pixels.index_select(axis, low), pixels.index_select(axis, high)
        weight = weight if axis == 3 else weight[:, None]
        pixels = torch.addcmul(first, second - first, weight.to(pixels.dtype))
    return pixels


def nvidia(pixels: Tensor, size: Size) -> Tensor:
    """Resize with TensorFlow 1's geometry by grid_sample, border padding."""
    (h, w), b = pixels.shape[-2:], len(pixels)
    theta = torch.eye(2, 3, device=pixels.device)
    theta[0, 2] += theta[0, 0] / w - theta[0, 0] / size[1]
    theta[1, 2] += theta[1, 1] / h - theta[1, 1] / size[0]
    grid = F.affine_grid(theta.expand(b, 2, 3), [b, pixels.shape[1], *size], align_corners=False)
    return F.grid_sample(pixels, grid.to(pixels.dtype), mode="bilinear", padding_mode="border", align_corners=False)


def bilinear(pixels: Tensor, size: Size) -> Tensor:
    """Resize half-pixel bilinear."""
    return F.interpolate(pixels, size, mode="bilinear", align_corners=False)


def antialias(pixels: Tensor, size: Size) -> Tensor:
    """Resize half-pixel bilinear with antialiasing."""
    return F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)


def _cubic(x: np.ndarray[Any, Any], a: float = -0.5) -> np.ndarray[Any, Any]:
    x = np.abs(x)
    inner, outer = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


@functools.lru_cache(maxsize=64)
def _bicubic_matrix(size_in: int, size_out: int) -> Tensor:
    """Return Pillow's antialiased bicubic filter as a band matrix [out, in], float32."""
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    matrix = np.zeros((size_out, size_in))
    for i in range(size_out):
        center = (i + 0.5) * scale
        low, high = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), size_in)
        weights = _cubic((np.arange(low, high) - center + 0.5) / stretch)
        matrix[i, low:high] = weights / weights.sum()
    with torch.inference_mode(False):
        return torch.from_numpy(matrix).float()


def clean(pixels: Tensor, size: Size) -> Tensor:
    """Resize with Pillow's bicubic filter on float channels, clipped to 0..255."""
    if tuple(pixels.shape[-2:]) != size:
        rows, columns = (_bicubic_matrix(n, m).to(pixels.device, pixels.dtype) for n, m in zip(pixels.shape[-2:], size, strict=True))
        pixels = rows @ (pixels @ columns.T)
    return pixels.clamp(0, 255)


def _pillow(pixels: Tensor, size: Size, name: str) -> Tensor:
    """Resize 8-bit pictures with Pillow itself, one by one on the CPU."""
    from PIL import Image

    pictures = pixels.round().clamp(0, 255).to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    resample = Image.Resampling[name]
    done = [np.asarray(Image.fromarray(picture).resize((size[1], size[0]), resample)) for picture in pictures]
    return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2).to(pixels.device, pixels.dtype)


RESIZES: dict[str, Callable[[Tensor, Size], Tensor]] = {
    "tf1": tf1,
    "nvidia": nvidia,
    "bilinear": bilinear,
    "antialias": antialias,
    "clean": clean,
    "pil-bilinear": lambda pixels, size: _pillow(pixels, size, "BILINEAR"),
    "pil-bicubic": lambda pixels, size: _pillow(pixels, size, "BICUBIC"),
}


def resize(pixels: Tensor, size: int | Size, mode: str) -> Tensor:
    """Resize pictures as a tool does.

    Args:
        pixels: [b, c, h, w] in 0..255, uint8 or float.
        size: rows and columns, or the side of a square.
        mode: key of `RESIZES`.

    Returns:
        [b, c, *size] float32 (float64 stays).

    Raises:
        ValueError: for an unknown mode or another number of axes.
    """
    choose(mode, RESIZES, "resize mode")
    check_shape(pixels, "resize: pixels", "b c h w")
    if not pixels.is_floating_point():
        pixels = pixels.float()
    return RESIZES[mode](pixels, (size, size) if isinstance(size, int) else size)


def fit_short_side(pixels: Tensor, side: int) -> Tensor:
    """Resize the shorter side (half-pixel bilinear, the longer side rounded up) and crop the centre: the FVD ports' preparation."""
    h, w = pixels.shape[-2:]
    scale = side / min(h, w)
    target = (side, math.ceil(w * scale)) if h < w else (math.ceil(h * scale), side)
    resized = bilinear(pixels, target)
    top, left = (target[0] - side) // 2, (target[1] - side) // 2
    return resized[..., top : top + side, left : left + side]
