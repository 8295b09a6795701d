"""How close reconstructions come to the originals, pixel by pixel: PSNR in two conventions, SSIM in those of the tools, MS-SSIM.

Pictures are [b, 3, h, w], uint8 or in [-1, 1]; the latter are clamped and, as the published tokenizer evaluations do, truncated to 8 bits
before comparing. PSNR is 10 log10(1 / MSE) with values in [0, 1].

SSIM = mean of (2 mx my + c1)(2 sxy + c2) / ((mx^2 + my^2 + c1)(sx + sy + c2)), c1 = (0.01 r)^2, c2 = (0.03 r)^2, range r = 1

Source: Wang et al. 2004 (SSIM), 2003 (MS-SSIM).
Letters: b batch, h w rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.checks import check_shape, choose

LUMA = (0.299, 0.587, 0.114)


def to_unit(images: Tensor) -> Tensor:
    """Map pictures to 8-bit steps in [0, 1], float64: uint8 / 255; from [-1, 1] clamp, (x + 1) / 2 * 255, truncate, / 255."""
    if images.dtype == torch.uint8:
        return images.double() / 255
    return (((images.detach().float().clamp(-1, 1) + 1) / 2 * 255).floor() / 255).double()


def _pair(images: Tensor, originals: Tensor, name: str) -> tuple[Tensor, Tensor]:
    sizes = check_shape(originals, f"{name}: originals", "b 3 h w")
    check_shape(images, f"{name}: images", "b 3 h w", **{axis: sizes[axis] for axis in "bhw"})
    return to_unit(images), to_unit(originals)


def squared_errors(images: Tensor, originals: Tensor) -> Tensor:
    """Return the mean squared error of each picture, values in [0, 1], float64 [b]."""
    x, y = _pair(images, originals, "squared_errors")
    return (x - y).square().mean(dim=(1, 2, 3))


def psnr_per_image(images: Tensor, originals: Tensor) -> Tensor:
    """Return the PSNR of each picture in dB [b], float64; inf where nothing differs. The usual figure is its mean."""
    return -10 * squared_errors(images, originals).log10()


def psnr_pooled(images: Tensor, originals: Tensor) -> Tensor:
    """Return the PSNR of the error averaged over all pictures first, in dB, float64 []; never above the mean of `psnr_per_image`.

    This is the published convention of the SimVQ family (over batches of 64) and torchmetrics' default.
    """
    return -10 * squared_errors(images, originals).mean().log10()


@dataclass(frozen=True)
class Window:
    """What an SSIM compares locally.

    Attributes:
        weights: one-dimensional weights of a separable window, of odd length, summing to 1.
        sample: use sample covariances, n / (n - 1) times the population's, n the window's pixels.
        reflect: pad the pictures by reflection and average over the full image; else only where the window fits.
        luma: compare 0.299 R + 0.587 G + 0.114 B instead of averaging over channels.
        value_range: r; pictures lie in [0, 1] whatever it is.
    """

    weights: tuple[float, ...]
    sample: bool = False
    reflect: bool = False
    luma: bool = False
    value_range: float = 1.0

    def filter(self, x: Tensor) -> Tensor:
        """Average pictures [b, c, h, w] over the window wherever it fits."""
        kernel = torch.tensor(self.weights, dtype=x.dtype, device=x.device)
        channels, size = x.shape[1], len(self.weights)
        x = F.conv2d(x, kernel.view(1, 1, size, 1).expand(channels, 1, size, 1), groups=channels)
        return F.conv2d(x, kernel.view(1, 1, 1, size).expand(channels, 1, 1, size), groups=channels)


def _gaussian(size: int, sigma: float) -> tuple[float, ...]:
    weights = (-(torch.arange(size, dtype=torch.float64) - size // 2).square() / (2 * sigma**2)).exp()
    return tuple((weights / weights.sum()).tolist())


GAUSS, UNIFORM = _gaussian(11, 1.5), (1 / 7,) * 7
# "skimage" is scikit-image's default, "wang" the paper's (scikit-image with gaussian weights and population covariance). "openstl" takes
# floats in [0, 1] for a range of 2, as scikit-image once did by itself: the figures of video prediction papers, higher than they should be.
WINDOWS = {
    "skimage": Window(UNIFORM, sample=True),
    "wang": Window(GAUSS),
    "wang-luma": Window(GAUSS, luma=True),
    "torchmetrics": Window(GAUSS, reflect=True),
    "openstl": Window(UNIFORM, sample=True, value_range=2.0),
}


def ssim_maps(x: Tensor, y: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Return SSIM and its contrast-structure part at every place, [b, c, h', w'], of pictures [b, c, h, w] in [0, 1]."""
    c1, c2 = (0.01 * window.value_range) ** 2, (0.03 * window.value_range) ** 2
    if window.luma:
        weights = x.new_tensor(LUMA)[:, None, None]
        x, y = ((picture * weights).sum(1, keepdim=True) for picture in (x, y))
    size = len(window.weights)
    if window.reflect:
        x, y = (F.pad(picture, [size // 2] * 4, mode="reflect") for picture in (x, y))
    mean_x, mean_y = window.filter(x), window.filter(y)
    scale = size**2 / (size**2 - 1) if window.sample else 1.0
    var_x, var_y = (scale * (window.filter(p * p) - m * m) for p, m in ((x, mean_x), (y, mean_y)))
    covariance = scale * (window.filter(x * y) - mean_x * mean_y)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1) * structure, structure


def ssim_per_image(images: Tensor, originals: Tensor, window: str = "skimage") -> Tensor:
    """Return the structural similarity of each picture [b], float64.

    Args:
        images, originals: pictures [b, 3, h, w].
        window: key of `WINDOWS`; figures are comparable with those of the same window only.

    Raises:
        ValueError: if a side is below the window's, or the window is unknown.
    """
    choose(window, WINDOWS, "SSIM window")
    x, y = _pair(images, originals, "ssim_per_image")
    size = len(WINDOWS[window].weights)
    if min(x.shape[-2:]) < size:
        raise ValueError(f"ssim_per_image: pictures must be at least {size}x{size} pixels (the window), got {x.shape[-2]}x{x.shape[-1]}.")
    return ssim_maps(x, y, WINDOWS[window])[0].mean((1, 2, 3))


MS_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ms_ssim_per_image(images: Tensor, originals: Tensor, betas: Sequence[float] = MS_WEIGHTS) -> Tensor:
    """Return the multi-scale structural similarity of each picture [b], float64, as torchmetrics computes it.

    At every scale but the last the mean contrast-structure term where the window fits, at the last the mean SSIM over the full padded
    image; 2x2 average pooling in between; negative means count as 0; product of value ** beta.

    Args:
        images, originals: pictures [b, 3, h, w].
        betas: exponent of each scale.

    Raises:
        ValueError: if the picture is too small for that many scales.
    """
    x, y = _pair(images, originals, "ms_ssim_per_image")
    window, least = WINDOWS["torchmetrics"], len(GAUSS) * 2 ** (len(betas) - 1)
    if min(x.shape[-2:]) < least:
        shape = f"{x.shape[-2]}x{x.shape[-1]}"
        raise ValueError(
            f"ms_ssim_per_image: {len(betas)} scales need pictures of at least {least}x{least} pixels, got {shape}; give fewer betas."
        )
    crop, result = len(GAUSS) // 2, torch.ones(len(x), dtype=x.dtype, device=x.device)
    for i, beta in enumerate(betas):
        similarity, structure = ssim_maps(x, y, window)
        value = similarity if i + 1 == len(betas) else structure[..., crop:-crop, crop:-crop]
        result = result * value.mean((1, 2, 3)).clamp_min(0) ** beta
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return result
