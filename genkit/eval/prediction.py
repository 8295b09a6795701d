"""How close predicted frames come to what really followed, in the conventions of the papers, and predictions that need no model.

Frames are floats, not rounded to 8 bits: MSE and MAE sum over the pixels of a frame, values in [0, 1] and not clipped; PSNR and SSIM clip.
SSIM comes twice: with its range as it should be, and as the tables of OpenSTL and its successors have it (range 2, higher).

Source: Tan et al. 2023 (OpenSTL, arXiv 2306.11249).
Letters: b clips, f frames, c channels, h w rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.checks import check_shape
from genkit.eval.reconstruction import WINDOWS, ssim_maps

METRICS = ("mse", "mae", "psnr", "ssim", "ssim-openstl")
ROUNDING = 1 / (12 * 255**2)  # mean squared error of rounding values in [0, 1] to 8 bits


def prediction_metrics(predicted: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Return every metric of `METRICS` for every frame, [b, f] float64.

    Args:
        predicted, truth: [b, f, c, h, w], about [-1, 1].

    Raises:
        ValueError: if shapes differ, or frames are smaller than SSIM's window of 7.
    """
    sizes = check_shape(truth, "prediction_metrics: truth", "b f c h w")
    check_shape(predicted, "prediction_metrics: predicted", "b f c h w", **sizes)
    if min(sizes["h"], sizes["w"]) < 7:
        raise ValueError(f"prediction_metrics: frames must be at least 7x7 pixels (SSIM's window), got {sizes['h']}x{sizes['w']}.")
    x, y = ((clips.detach().double().flatten(0, 1) + 1) / 2 for clips in (predicted, truth))
    found = {"mse": (x - y).square().sum((1, 2, 3)), "mae": (x - y).abs().sum((1, 2, 3))}
    x, y = x.clamp(0, 1), y.clamp(0, 1)
    found["psnr"] = -10 * (x - y).square().mean((1, 2, 3)).log10()
    for name, window in (("ssim", "skimage"), ("ssim-openstl", "openstl")):
        found[name] = ssim_maps(x, y, WINDOWS[window])[0].mean((1, 2, 3))
    return {name: values.view(sizes["b"], sizes["f"]) for name, values in found.items()}


def restoration_metrics(made: Tensor, truth: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return every metric of `METRICS` for one clip in which something was made, 0-d float64: PSNR over what was made, at most that of
    rounding to 8 bits (58.9 dB); the others over the frames that hold some of it.

    Args:
        made, truth: [f, c, h, w], about [-1, 1].
        mask: [f, h, w] bool, True = was made.

    Raises:
        ValueError: if nothing was made, shapes differ, or frames are smaller than SSIM's window of 7.
    """
    sizes = check_shape(truth, "restoration_metrics: truth", "f c h w")
    check_shape(mask, "restoration_metrics: mask", "f h w", f=sizes["f"], h=sizes["h"], w=sizes["w"])
    rows = mask.flatten(1).any(1)
    if not bool(rows.any()):
        raise ValueError("restoration_metrics: the mask is False everywhere, so nothing was made.")
    found = {name: values.mean() for name, values in prediction_metrics(made[None, rows], truth[None, rows]).items()}
    error = ((made.double().clamp(-1, 1) - truth.double().clamp(-1, 1)) / 2).square().mean(1)[mask].mean()
    return {**found, "psnr": -10 * error.clamp_min(ROUNDING).log10()}


def nearest_given(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return for every place the frames, before and after it, where its pixel is given; [b, f, h, w] int64, -1 and f where there is none.

    Args:
        mask: [b, f, h, w] bool, True = not given.
    """
    f = mask.shape[1]
    places = torch.arange(f, device=mask.device).view(1, f, 1, 1).expand(mask.shape)
    before = torch.where(mask, -1, places).cummax(dim=1).values
    after = torch.where(mask, f, places).flip(1).cummin(dim=1).values.flip(1)
    return before, after


def blend(clips: Tensor, mask: Tensor, *, hold: bool = False) -> Tensor:
    """Fill what is not given, pixel by pixel, from the nearest frames before and after where it is: linearly, or by copying.

    Args:
        clips: [b, f, c, h, w].
        mask: [b, f, h, w] bool, True = not given.
        hold: copy the frame before (the one after where there is none) instead of blending.

    Raises:
        ValueError: if a pixel is given nowhere.
    """
    f = clips.shape[1]
    before, after = nearest_given(mask)
    if bool(((before < 0) & (after >= f)).any()):
        raise ValueError("blend: a pixel is given in no frame, so there is nothing to fill it from.")
    low, high = torch.where(before < 0, after, before), torch.where(after >= f, before, after)
    places = torch.arange(f, device=mask.device).view(1, f, 1, 1)
    share = torch.zeros_like(clips[:, :, 0]) if hold else (places - low).to(clips) / (high - low).clamp_min(1)

    def take(index: Tensor) -> Tensor:
        return clips.gather(1, index[:, :, None].expand_as(clips))

    return take(low) + share[:, :, None] * (take(high) - take(low))
