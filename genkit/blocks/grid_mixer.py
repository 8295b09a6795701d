"""What the mixers of whole grids share: the check of the grid, and the refusal of all that needs single tokens.

Letters: b batch, n tokens, d width, f h w frames, rows and columns.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from genkit.blocks.caps import Cache, Context, MixerConfig, TokenMixer, refusal, refuse_arguments
from genkit.blocks.layout import Layout
from genkit.checks import check_shape

Grid = tuple[int, int, int]
"""Sides (f, h, w), f = 1 for a grid of two sides."""


def grid_sides(config: MixerConfig, layout: Layout | None, tokens: int) -> Grid:
    """Return the sides of the grid behind the prefix.

    Args:
        config: of the mixer, for errors.
        layout: as handed to it.
        tokens: n, with the prefix.

    Raises:
        ValueError: without a grid of that many tokens.
    """
    grid, front = (None, 0) if layout is None else (layout.grid, layout.prefix)
    if grid is None or len(grid) not in (2, 3) or math.prod(grid) + front != tokens:
        raise ValueError(f"{config}: needs layout.grid (h, w) or (f, h, w) of all {tokens} tokens, got {grid} with a prefix of {front}.")
    return (1, grid[0], grid[1]) if len(grid) == 2 else (grid[0], grid[1], grid[2])


class GridMixer(TokenMixer):
    """Base of the mixers of whole grids; a subclass writes `mix`.

    Args:
        dim: d.
        config: the options.
    """

    takes_prefix: ClassVar[bool] = True

    def __init__(self, dim: int, config: MixerConfig) -> None:
        super().__init__()
        self.config, self.dim = config, dim

    def mix(self, x: Tensor, grid: Grid, layout: Layout) -> Tensor:
        """Return [b, n, d] of tokens x [b, n, d], those of the grid in raster order behind `layout.prefix` others."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        *,
        layout: Layout | None = None,
        context: Context | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Mix the tokens of each frame of a grid.

        Args:
            x: [b, n, d], the tokens of the grid in raster order behind the prefix.
            layout: with a grid (h, w) or (f, h, w).
            context, mask, cache: not taken.

        Returns:
            [b, n, d].

        Raises:
            ValueError: without a grid of all tokens, with a prefix where the mixer takes none, or for arguments that are not taken.
        """
        refuse_arguments(self.config, context=context, mask=mask, cache=cache)
        sizes = check_shape(x, f"{type(self).__name__}: x", "b n d", d=self.dim)
        grid = grid_sides(self.config, layout, sizes["n"])
        assert layout is not None, "grid_sides has checked it"
        if layout.prefix and not self.takes_prefix:
            raise ValueError(f"{self.config}: takes no prefix in front of the grid, got {layout.prefix} tokens.")
        return self.mix(x, grid, layout)

    def new_cache(self, batch: int, max_len: int, *, device: torch.device | str, dtype: torch.dtype) -> None:
        """Refuse: it needs the whole grid."""
        raise refusal(self.config, "cache")
