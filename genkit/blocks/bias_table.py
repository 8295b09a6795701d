"""Learned biases of attention by the distance of two tokens of a grid.

Sources: absolute distances as in Graham et al., LeViT, ICCV 2021, arXiv 2104.01136; signed ones as in Liu et al., Swin Transformer, ICCV
2021, arXiv 2103.14030.
Letters: h w rows and columns of a grid, n = h w tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("table_abs", "table_rel")


class BiasTable(nn.Module):
    """A number per head and distance: `table` [heads, rows, columns] for absolute distances, [heads, 2 rows - 1, 2 columns - 1] for signed.

    The biases of all pairs are gathered once per state of the table, not once per call, where no gradient is wanted.

    Args:
        kind: "table_abs" or "table_rel".
        heads: number of heads.
        sides: (rows, columns) of the largest grid.
    """

    def __init__(self, kind: str, heads: int, sides: tuple[int, int]) -> None:
        super().__init__()
        self.kind, self.sides = kind, sides
        shape = sides if kind == "table_abs" else (2 * sides[0] - 1, 2 * sides[1] - 1)
        self.table = nn.Parameter(torch.zeros(heads, *shape))
        self._kept: tuple[tuple[object, ...], Tensor] | None = None

    def forward(self, grid: tuple[int, int], prefix: int = 0) -> Tensor:
        """Return biases [1, heads, n, n] of a grid, 0 for the tokens of a prefix.

        Raises:
            ValueError: for a grid that is larger than the table.
        """
        if grid[0] > self.sides[0] or grid[1] > self.sides[1]:
            raise ValueError(f"the table of position biases is made for at most {self.sides} tokens, got a grid of {grid}.")
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._gathered(grid, prefix)
        key = (grid, prefix, self.table._version, self.table.data_ptr(), self.table.dtype, self.table.device)
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self._gathered(grid, prefix))
        return self._kept[1]

    def _gathered(self, grid: tuple[int, int], prefix: int) -> Tensor:
        """Take each pair's number: distances of rows, then of columns."""
        found = self.table
        for axis, (length, side) in enumerate(zip(grid, self.sides, strict=True)):
            place = torch.arange(length, device=found.device)
            distance = place[:, None] - place
            distance = distance.abs() if self.kind == "table_abs" else distance + side - 1
            found = found.index_select(1 + 2 * axis, distance.flatten()).unflatten(1 + 2 * axis, (length, length))
        biases = found.permute(0, 1, 3, 2, 4).flatten(3, 4).flatten(1, 2)[None]
        return F.pad(biases, (prefix, 0, prefix, 0)) if prefix else biases
