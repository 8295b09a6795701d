"""Reconstructed and generated shapes against true meshes that need not close.

The truth of inside and outside is the field that shape VAEs learn (`genkit.data.mesh_fields`), which gives open meshes an inside too.

- volume IoU: at points spread over the cube [-1, 1]^3; surface IoU: at points near the true surface
- Chamfer distance (L1, both directions added) and F-score: from points on one surface to the nearest of many more on the other, so that
  it is the shapes and not the spacing of points that decides the figures

Letters: p points on a surface, m many more, q points of space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genkit.data.containment import contains_mostly
from genkit.data.mesh_fields import MeshField
from genkit.eval.meshes import sample
from genkit.eval.shapes import PointDistances, nearest_points, occupancy_iou

METRICS = ("volume-iou", "surface-iou", "chamfer-l1-sum", "fscore@0.02")
NEAR = 0.02  # standard deviation of points near the surface
THRESHOLD = 0.02  # of the F-score
DENSE = 25


def queries(surface: Tensor, count: int, seed: int) -> list[Tensor]:
    """Return points [count, 3] over the cube [-1, 1]^3, and as many near points [p, 3] of a surface."""
    draw = torch.Generator().manual_seed(seed)
    near = surface[torch.randint(len(surface), (count,), generator=draw)]
    cube = 2 * torch.rand(count, 3, generator=draw, dtype=torch.float64) - 1
    return [cube, near + NEAR * torch.randn(count, 3, generator=draw, dtype=torch.float64)]


def _points(mesh: Any, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return `count` points on a mesh, and `DENSE` times as many."""
    points, _ = sample(mesh, (DENSE + 1) * count, seed)
    return points[:count], points[count:]


@dataclass
class Solid:
    """What a shape is compared by.

    Args:
        surface: points [p, 3] on it.
        dense: points [m, 3] on it.
        at: points [q, 3] over the volume, and near the surface.
        inside: which of each lie inside, [q] bool.
    """

    surface: Tensor
    dense: Tensor
    at: list[Tensor]
    inside: list[Tensor]

    @classmethod
    def of(cls, mesh: Any, count: int = 4000, seed: int = 0) -> Solid:
        """Sample an open or closed mesh that spans [-1, 1] (`genkit.data.surfaces.normalised`), `count` points of each kind."""
        surface, dense = _points(mesh, count, seed)
        at, field = queries(surface, count, seed), MeshField.of(mesh)
        return cls(surface, dense, at, [field(points) > 0 for points in at])

    def of_closed(self, mesh: Any, seed: int = 1) -> Solid:
        """Sample a closed mesh at the same points of space."""
        return self._at_the_same(mesh, seed, lambda points: torch.from_numpy(contains_mostly(mesh, points.numpy())))

    def of_open(self, mesh: Any, seed: int = 1) -> Solid:
        """Sample another true mesh, open or closed, at the same points of space."""
        field = MeshField.of(mesh)
        return self._at_the_same(mesh, seed, lambda points: field(points) > 0)

    def _at_the_same(self, mesh: Any, seed: int, lies_inside: Callable[[Tensor], Tensor]) -> Solid:
        """Sample a mesh, and tell of this one's points of space which lie in it."""
        surface, dense = _points(mesh, len(self.surface), seed)
        return Solid(surface, dense, self.at, [lies_inside(points) for points in self.at])

    def compare(self, other: Solid) -> dict[str, float]:
        """Measure another shape, sampled at the same points, against this one: metric -> value."""
        found = PointDistances(nearest_points(self.surface, other.dense)[0], nearest_points(other.surface, self.dense)[0])
        ious = [occupancy_iou(*pair) for pair in zip(self.inside, other.inside, strict=True)]
        return dict(zip(METRICS, (*ious, found.chamfer(), found.fscore(THRESHOLD)[0]), strict=True))
