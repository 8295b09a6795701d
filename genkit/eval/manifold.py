"""Precision, recall, density, coverage, realism and authenticity: what nearest neighbours say about two sets of features.

With r_k(x) the distance of x to its k-th neighbour in its own set, and the ball of x all points nearer than that:

- precision: share of generated samples inside any real ball; recall: share of real samples inside any generated ball;
- density: mean number of real balls around a generated sample, over k; coverage: share of real samples whose nearest generated sample is
  inside their ball;
- realism of a generated x: largest r_k(y) / |x - y| over real y whose radius is below the median;
- authenticity: share of generated samples that are further from their nearest real sample than that one is from its own nearest.

Tools differ in whether the border belongs to a ball: prdc and dgm-eval say no (<), ADM and torch-fidelity yes (<=). It matters where
samples repeat, since their radius is 0.

Source: Kynkaanniemi et al. 2019 (arXiv 1904.06991); Naeem et al. 2020 (arXiv 2002.09797); Alaa et al. 2022 (arXiv 2102.08921).
Letters: n real, m generated samples, d features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genkit.eval.distances import distance_blocks, neighbour_radii


@dataclass(frozen=True)
class ManifoldScores:
    """Precision, recall, density, coverage; `density` may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_scores(real: Tensor, fake: Tensor, k: int = 5, *, border: bool = False) -> ManifoldScores:
    """Compute precision, recall, density and coverage.

    Args:
        real: features [n, d].
        fake: features [m, d].
        k: neighbour that sets the radius; precision and recall are usually quoted with 3, density and coverage with 5.
        border: whether a point at exactly the radius is inside (ADM, torch-fidelity) or not (prdc, dgm-eval).

    Raises:
        ValueError: if a set has not more than k samples, or the features differ in number.
    """
    flags = manifold_flags(real, fake, k, border=border)
    return ManifoldScores(*(float(flags[name].double().mean()) for name in ("precision", "recall", "density", "coverage")))


def manifold_flags(real: Tensor, fake: Tensor, k: int, *, border: bool = False) -> dict[str, Tensor]:
    """Return what each sample contributes: precision [m], recall [n], density [m] (a count over k) and coverage [n]."""
    real_radii, fake_radii = neighbour_radii(real, k), neighbour_radii(fake, k)
    inside = torch.le if border else torch.lt
    precision, count = [], []
    recall = torch.zeros(len(real), dtype=torch.bool)
    nearest = torch.full((len(real),), torch.inf, dtype=torch.float64)
    for rows, block in distance_blocks(fake, real):
        in_real = inside(block, real_radii)
        precision.append(in_real.any(1))
        count.append(in_real.sum(1) / k)
        recall |= inside(block, fake_radii[rows, None]).any(0)
        nearest = torch.minimum(nearest, block.amin(0))
    coverage = inside(nearest, real_radii)
    return {"precision": torch.cat(precision), "recall": recall, "density": torch.cat(count), "coverage": coverage}


def realism(real: Tensor, fake: Tensor, k: int = 5) -> Tensor:
    """Return the realism of generated samples [m]; infinite for an exact copy of a real sample whose radius counts."""
    radii = neighbour_radii(real, k)
    kept = radii < radii.quantile(0.5)
    parts = [(radii[kept] / block).amax(1) for _, block in distance_blocks(fake, real[kept])]
    return torch.cat(parts)


def authenticity(real: Tensor, fake: Tensor) -> float:
    """Return the share of generated samples that are no near copies of a real one, in [0, 1]."""
    own = neighbour_radii(real, 1)
    is_new = []
    for _, block in distance_blocks(fake, real):
        distance, found = block.min(1)
        is_new.append(distance > own[found])
    return float(torch.cat(is_new).double().mean())


def nearest_neighbours(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Return each generated sample's distance to its nearest real one and which that is, [m] and [m] int64."""
    found = [block.min(1) for _, block in distance_blocks(fake, real)]
    return torch.cat([pair.values for pair in found]), torch.cat([pair.indices for pair in found])
