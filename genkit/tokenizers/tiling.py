"""Large grids through a network in tiles that overlap: a bounded peak, and no edge where two tiles meet.

Tiles of one size lie evenly over the grid. Where they overlap, results are averaged with weights that fall linearly to the border of a tile
that is not the grid's own, so what a network makes near its border (padding, missing context) counts least.

Legend: b batch, c channels, h w rows and columns, o rows or columns of overlap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

Sides = tuple[int, int]


def starts_of(length: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles begin along an axis: evenly, the first at 0, the last at the end, each over `overlap` or more of its neighbour.

    Args:
        length: of the axis.
        tile: length of a tile; an axis that is not longer has one tile, at 0.
        overlap: in 0 .. tile - 1.

    Example:
        >>> starts_of(40, 16, 4)
        [0, 12, 24]
    """
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def ramp(tile: int, overlap: int, first: bool, last: bool) -> Tensor:
    """Return weights [tile] along an axis, above 0: rising over the overlap unless the tile is the first, falling unless the last."""
    rising = (torch.arange(tile) + 0.5) / max(overlap, 1)
    weight = torch.ones(tile) if first else rising.clamp(max=1)
    return weight if last else torch.minimum(weight, rising.flip(0).clamp(max=1))


class Blend:
    """Sum of weighted tiles on a grid.

    Args:
        grid: (h, w).
        tile: sides of a tile; those larger than the grid's are cut to them.
        overlap: rows and columns that neighbours share at least.

    Raises:
        ValueError: unless the overlap lies in 0 .. tile - 1 along both axes.
    """

    def __init__(self, grid: Sides, tile: Sides, overlap: Sides) -> None:
        if not all(0 <= o < side for o, side in zip(overlap, tile, strict=True)):
            raise ValueError(f"Blend: overlap must lie in 0 .. tile - 1, got {overlap} with tiles of {tile}.")
        self.grid, self.overlap = grid, overlap
        self.tile = (min(tile[0], grid[0]), min(tile[1], grid[1]))
        self.rows, self.columns = (starts_of(n, t, o) for n, t, o in zip(grid, self.tile, overlap, strict=True))

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Yield rows and columns of each tile."""
        for top in self.rows:
            for left in self.columns:
                yield slice(top, top + self.tile[0]), slice(left, left + self.tile[1])

    def weight(self, where: tuple[slice, slice], scale: Sides = (1, 1)) -> Tensor:
        """Return the weights [h, w] of a tile whose results have `scale` rows and columns for one of the grid's."""
        sides = []
        for axis, starts in enumerate((self.rows, self.columns)):
            is_first, is_last = where[axis].start == starts[0], where[axis].start == starts[-1]
            sides.append(ramp(self.tile[axis] * scale[axis], self.overlap[axis] * scale[axis], is_first, is_last))
        return sides[0][:, None] * sides[1]

    def collect(self, results: Iterator[tuple[tuple[slice, slice], Tensor]], scale: Sides = (1, 1)) -> Tensor:
        """Average the results of all tiles.

        Args:
            results: rows and columns of a tile, and what was made of it [b, c, h, w], `scale` rows and columns for one of the grid's.
            scale: see there.

        Returns:
            [b, c, h, w] on the whole grid, of the results' type, averaged in fp32.
        """
        total, weights = None, torch.zeros(self.grid[0] * scale[0], self.grid[1] * scale[1])
        kind = torch.float32
        for where, made in results:
            if total is None:
                kind, weights = made.dtype, weights.to(made.device)
                total = torch.zeros(*made.shape[:2], *weights.shape, device=made.device)
            weight = self.weight(where, scale).to(made.device)
            at = tuple(slice(part.start * s, part.stop * s) for part, s in zip(where, scale, strict=True))
            total[:, :, at[0], at[1]] += made.float() * weight
            weights[at] += weight
        assert total is not None, "a grid has at least one tile"
        return (total / weights).to(kind)
