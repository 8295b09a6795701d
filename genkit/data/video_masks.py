"""Masks of video: which part of a clip is given and which is to be made, for the seven published modes.

A mask is [f, h, w] with True = to be made, at the resolution of the latents.

| mode | given |
|---|---|
| predict | the first frames (8) |
| backward | the last frames (8) |
| interpolation | frames 0, 4, 8, ... |
| unconditional | nothing |
| one_frame | one frame |
| arbitrary_interpolation | each frame with probability 0.2 |
| spatial_temporal | all but a block-wise region of half the area in a run of frames |

Source: Lu et al. 2023 (VDT, arXiv 2305.13311), with the block-wise masks of BEiT (arXiv 2106.08254). Draws come from a `random.Random`, in
the published order. Published quirk: a run of frames that ends at 0 is empty, so that a quarter of the spatio-temporal masks ask for
nothing; by default such a run reaches the end of the clip (`official=True` keeps the quirk).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from genkit.checks import choose

MODES = ("predict", "backward", "interpolation", "unconditional", "one_frame", "arbitrary_interpolation", "spatial_temporal")


class Draws(Protocol):
    """What masks draw from; `random.Random` is one."""

    def random(self) -> float:
        """Draw from [0, 1)."""

    def uniform(self, a: float, b: float, /) -> float:
        """Draw uniformly between two numbers, in either order."""

    def randint(self, a: int, b: int, /) -> int:
        """Draw a whole number, both ends included."""


def block_mask(height: int, width: int, ratio: float, draw: Draws) -> Tensor:
    """Return a mask [h, w] of rectangles that cover a share of the area: at most so much, up to ten failed attempts in a row.

    Args:
        height, width: of the grid.
        ratio: share to cover.
        draw: source of the draws.
    """
    mask = torch.zeros(height, width, dtype=torch.bool)
    target, covered = ratio * height * width, 0
    while covered < target:
        remaining = target - covered
        for _ in range(10):
            area = draw.uniform(4, remaining)
            aspect = math.exp(draw.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (w < width and h < height):
                continue
            top, left = draw.randint(0, height - h), draw.randint(0, width - w)
            part = mask[top : top + h, left : left + w]
            new = part.numel() - int(part.sum())
            if 0 < new <= remaining:
                part.fill_(True)
                covered += new
                break
        else:
            break
    return mask


def make_mask(
    mode: str, frames: int, height: int, width: int, draw: Draws, *, given: int = 8, ratio: float = 0.5, official: bool = False
) -> Tensor:
    """Return a mask [f, h, w] bool, True = to be made.

    Args:
        mode: one of `MODES`, or "random": spatio-temporal with probability 0.2, else one of the other six.
        frames, height, width: of the clip, in latents.
        draw: source of the draws.
        given: frames that "predict" and "backward" give.
        ratio: share of the area that "spatial_temporal" hides.
        official: keep the published quirk.

    Raises:
        ValueError: for an unknown mode.
    """
    if mode == "random":
        mode = MODES[6] if draw.random() < 0.2 else MODES[draw.randint(0, 5)]
    choose(mode, MODES, "mask mode")
    rules: dict[str, Callable[[int], bool]] = {
        "predict": lambda i: i >= given,
        "backward": lambda i: i < frames - given,
        "interpolation": lambda i: i % 4 != 0,
        "unconditional": lambda i: True,
    }
    mask = torch.zeros(frames, height, width, dtype=torch.bool)
    if mode == "spatial_temporal":
        start, end = draw.randint(0, 3), draw.randint(0, 3)
        mask[start : (-end if official or end else frames)] = block_mask(height, width, ratio, draw)
        return mask
    if mode == "one_frame":
        kept = draw.randint(0, frames - 1)
        rules[mode] = lambda i: i != kept
    if mode == "arbitrary_interpolation":
        rules[mode] = lambda i: draw.random() < 0.8
    mask[[rules[mode](i) for i in range(frames)]] = True
    return mask
