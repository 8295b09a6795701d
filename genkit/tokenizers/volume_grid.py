"""Sparse values on the points of a cubic grid, and the sets of points and cells that decoders refine.

A grid of resolution r has r + 1 points a side, at index * 2 bound / r - bound; its cells have r a side and carry the index of their lower
corner. Points and cells are int64 keys, x first: (x s + y) s + z with s points (cells) a side; lists are sorted and without repetition.

Letters: k points, c cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CORNERS = torch.tensor([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)])


@dataclass
class SparseField:
    """A field at some points of a grid.

    Args:
        resolution: r.
        bound: the grid spans [-bound, bound] in each axis.
        keys: [k] int64, sorted; None for all points.
        values: [k] fp32, positive inside.
        evaluations: points at which the head was asked, over all levels.
    """

    resolution: int
    bound: float
    keys: Tensor | None
    values: Tensor
    evaluations: int

    @property
    def side(self) -> int:
        """Points a side."""
        return self.resolution + 1

    def dense(self, low: int = 0, high: int | None = None) -> Tensor:
        """Return the planes x = low .. high - 1, all if left out, [high - low, side, side]; nan where nothing was evaluated."""
        side, high = self.side, self.side if high is None else high
        if self.keys is None:
            return self.values.view(side, side, side)[low:high]
        first, last = torch.searchsorted(self.keys, torch.tensor([low, high], device=self.keys.device) * side * side).tolist()
        planes = self.values.new_full(((high - low) * side * side,), float("nan"))
        planes[self.keys[first:last] - low * side * side] = self.values[first:last]
        return planes.view(high - low, side, side)


def coordinates(keys: Tensor, resolution: int, bound: float) -> Tensor:
    """Return the positions [k, 3] of points, fp32."""
    return unpack(keys, resolution + 1).float() * (2 * bound / resolution) - bound


def unpack(keys: Tensor, side: int) -> Tensor:
    """Return x, y, z [k, 3] of keys."""
    return torch.stack([keys // (side * side), keys // side % side, keys % side], dim=-1)


def pack(indices: Tensor, side: int) -> Tensor:
    """Return the keys of indices [..., 3]."""
    return (indices[..., 0] * side + indices[..., 1]) * side + indices[..., 2]


def dilate(keys: Tensor, side: int) -> Tensor:
    """Return the points within one step of some points in every axis, those themselves included."""
    for stride in (1, side, side * side):
        place = keys // stride % side
        keys = torch.cat([keys, keys[place > 0] - stride, keys[place < side - 1] + stride]).unique()
    return keys


def take(keys: Tensor | None, values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values at wanted points, of any shape, and whether they are known."""
    if keys is None:
        return values[wanted], torch.ones_like(wanted, dtype=torch.bool)
    place = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
    return values[place], keys[place] == wanted


def corner_keys(cells: Tensor, resolution: int) -> Tensor:
    """Return the points [c, 8] at the corners of cells [c]."""
    lower = unpack(cells, resolution)
    return pack(lower[:, None] + CORNERS.to(cells.device), resolution + 1)


def children(cells: Tensor, resolution: int) -> Tensor:
    """Return the eighths [8 c] of cells, on the grid of twice the resolution, sorted."""
    lower = 2 * unpack(cells, resolution)
    return pack(lower[:, None] + CORNERS.to(cells.device), 2 * resolution).flatten().sort().values


def sign_changes(keys: Tensor | None, values: Tensor, side: int) -> Tensor:
    """Tell which points [k] have another sign than one of their six neighbours; unknown neighbours and the border count as equal."""
    own = torch.arange(side**3, device=values.device) if keys is None else keys
    sign, found = values.sign(), torch.zeros_like(values, dtype=torch.bool)
    for stride in (1, side, side * side):
        place = own // stride % side
        for step, inside in ((-stride, place > 0), (stride, place < side - 1)):
            other, known = take(keys, sign, torch.where(inside, own + step, own))
            found |= known & inside & (other != sign)
    return found
