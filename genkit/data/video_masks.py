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

and one of ours, "keys": some frames spread evenly, first and last included, as `VDTPipeline` interpolates.

Source: Lu et al. 2023 (VDT, arXiv 2305.13311), with the block-wise masks of BEiT (arXiv 2106.08254). Draws come from a `random.Random`, in
the published order. Published quirk: a run of frames that ends at 0 is empty, so that a quarter of the spatio-temporal masks ask for
nothing; by default such a run reaches the end of the clip (`official=True` keeps the quirk).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from genkit.checks import choose

MODES = ("predict", "backward", "interpolation", "unconditional", "one_frame", "arbitrary_interpolation", "spatial_temporal")
ALL_MODES = (*MODES, "keys", "random")


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
        mode: one of `MODES`; "keys"; or "random": spatio-temporal with probability 0.2, else one of the other six published ones.
        frames, height, width: of the clip, in latents.
        draw: source of the draws.
        given: frames that "predict", "backward" and "keys" give.
        ratio: share of the area that "spatial_temporal" hides.
        official: keep the published quirk.

    Raises:
        ValueError: for an unknown mode, or fewer than two keys.
    """
    if mode == "keys" and given < 2:
        raise ValueError(f"mask mode 'keys' needs at least 2 given frames, got {given}.")
    if mode == "random":
        mode = MODES[6] if draw.random() < 0.2 else MODES[draw.randint(0, 5)]
    choose(mode, ALL_MODES, "mask mode")
    keys = {round(i * (frames - 1) / (given - 1)) for i in range(given)} if mode == "keys" else set()
    rules: dict[str, Callable[[int], bool]] = {
        "predict": lambda i: i >= given,
        "backward": lambda i: i < frames - given,
        "interpolation": lambda i: i % 4 != 0,
        "unconditional": lambda i: True,
        "keys": lambda i: i not in keys,
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


class MaskMixture:
    """Masks of several modes, each with a weight.

    Args:
        weights: mode -> weight; "predict:1" is the mode "predict" with one given frame.
        official: keep the published quirk.

    Raises:
        ValueError: for unknown modes, numbers that are none, or weights that are negative or all zero.

    Example:
        >>> MaskMixture({"predict:1": 1.0}).draw(3, 1, 1, 0.5).flatten().tolist()
        [False, True, True]
    """

    def __init__(self, weights: Mapping[str, float], official: bool = False) -> None:
        self.entries, self.weights, self.official = [], list(weights.values()), official
        for entry in weights:
            mode, _, number = entry.partition(":")
            choose(mode, ALL_MODES, "mask mode")
            if number and not (number.isdigit() and int(number) > 0):
                raise ValueError(f"masks: {entry!r} must be a mode, or mode:N with N given frames.")
            self.entries.append((mode, int(number) if number else 8))
        if not weights or min(self.weights) < 0 or not sum(self.weights) > 0:
            raise ValueError(f"masks: weights must be at least 0 and one of them above, got {dict(weights)}.")

    def draw(self, frames: int, height: int, width: int, uniform: float) -> Tensor:
        """Return the mask [f, h, w] that a number in [0, 1) decides."""
        source = random.Random(int(uniform * 2**53))
        mode, given = source.choices(self.entries, self.weights)[0]
        return make_mask(mode, frames, height, width, source, given=given, official=self.official)
