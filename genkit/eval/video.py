"""Video metrics: how the ports of the Frechet video distance prepare clips, and PSNR and SSIM per frame.

Clips are [b, f, c, h, w], uint8 or in [-1, 1].

Source: Unterthiner et al. 2018 (arXiv 1812.01717).
Letters: b clips, f frames, h w rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from genkit.checks import check_shape, choose
from genkit.eval import resize as resizing
from genkit.eval.reconstruction import psnr_per_image, ssim_per_image

SIDE = 224


def _unit(clips: Tensor) -> Tensor:
    """Return pixels in [0, 1], float32."""
    return clips.float() / 255 if clips.dtype == torch.uint8 else (clips.float().clamp(-1, 1) + 1) / 2


def _frames(clips: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change every frame and return [b, c, f, h', w']."""
    b = len(clips)
    return rearrange(change(rearrange(clips, "b f c h w -> (b f) c h w")), "(b f) c h w -> b c f h w", b=b)


def _cropped(clips: Tensor) -> Tensor:
    return (_frames(clips, lambda frames: resizing.fit_short_side(frames, SIDE)) - 0.5) * 2


def _truncated(clips: Tensor) -> Tensor:
    return _cropped((clips * 255).to(torch.uint8).float() / 255)


def _squashed(clips: Tensor) -> Tensor:
    return _frames(clips * 255, lambda frames: resizing.bilinear(frames, (SIDE, SIDE))) * 2 / 255 - 1


def _tf1(clips: Tensor) -> Tensor:
    return _frames(clips * 255, lambda frames: resizing.tf1(frames, (SIDE, SIDE))) * 2 / 255 - 1


# Shorter side to 224 and centre crop ("stylegan-v", "videogpt": truncated to 8 bits first); squashed to 224x224 ("cd-fvd", "original").
PREPARATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "stylegan-v": _cropped,
    "videogpt": _truncated,
    "cd-fvd": _squashed,
    "original": _tf1,
}


def prepare_clips(clips: Tensor, protocol: str) -> Tensor:
    """Bring clips to I3D's input as a tool does.

    Args:
        clips: [b, f, 3, h, w], uint8 or in [-1, 1].
        protocol: key of `PREPARATIONS`.

    Returns:
        [b, 3, f, 224, 224] in [-1, 1], float32.
    """
    choose(protocol, PREPARATIONS, "video protocol")
    check_shape(clips, "prepare_clips: clips", "b f 3 h w")
    return PREPARATIONS[protocol](_unit(clips))


def psnr_per_frame(clips: Tensor, originals: Tensor) -> Tensor:
    """Return the PSNR of every frame [b, f] in dB, float64."""
    return _per_frame(psnr_per_image, clips, originals)


def ssim_per_frame(clips: Tensor, originals: Tensor, window: str = "skimage") -> Tensor:
    """Return the SSIM of every frame [b, f], float64; see `ssim_per_image` for the window."""
    return _per_frame(lambda x, y: ssim_per_image(x, y, window), clips, originals)


def _per_frame(metric: Callable[[Tensor, Tensor], Tensor], clips: Tensor, originals: Tensor) -> Tensor:
    sizes = check_shape(clips, "clips", "b f 3 h w")
    check_shape(originals, "originals", "b f 3 h w", **sizes)
    return metric(clips.flatten(0, 1), originals.flatten(0, 1)).view(sizes["b"], sizes["f"])
