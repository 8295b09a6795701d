"""Losses that several tasks share; pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def perceptual_distance(maps: Sequence[Tensor], target_maps: Sequence[Tensor], eps: float = 1e-6) -> Tensor:
    """Compare feature maps of two batches: squared difference of unit feature vectors, mean over positions, mean over stages.

    LPIPS without its learned channel weights; in fp32, with the epsilon under the root so that an all-zero vector has a finite gradient.

    Args:
        maps: per stage [b, c, h, w].
        target_maps: the same of the targets.

    Returns:
        scalar in [0, 4].

    Source: Zhang et al. 2018, equation 1 (arXiv 1801.03924).
    """
    total = maps[0].new_zeros((), dtype=torch.float32)
    for a, b in zip(maps, target_maps, strict=True):
        unit_a, unit_b = (m.float() * (m.float().square().sum(1, keepdim=True) + eps).rsqrt() for m in (a, b))
        total = total + (unit_a - unit_b).square().sum(1).mean()
    return total / len(maps)
