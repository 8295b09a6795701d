"""What all mixers of one model call share about the tokens: grid, prefix, coordinates, and things derived from them.

Letters: b batch, n tokens, f frames, h w grid rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(eq=False)
class Layout:
    """Describe the token sequence; made once per model call and handed to every block of it.

    Args:
        grid: side lengths of the token grid, (h, w) or (f, h, w), in raster order. None: a plain sequence or set.
        prefix: number of tokens in front of the grid (class token, registers).
        pos: coordinates [b|1, n, axes] float32, one row per token including the prefix; what decides positions if given.

    Example:
        >>> Layout(grid=(2, 3)).positions(2, 6, torch.device("cpu"))[0, 4].tolist()
        [1.0, 1.0]
    """

    grid: tuple[int, ...] | None = None
    prefix: int = 0
    pos: Tensor | None = None
    _memo: dict[Hashable, object] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.grid is not None:
            self.grid = tuple(self.grid)
            if not self.grid or min(self.grid) < 1:
                raise ValueError(f"Layout: grid must be positive side lengths such as (16, 16), got {self.grid}.")
        if self.prefix < 0:
            raise ValueError(f"Layout: prefix counts tokens in front of the grid and must be >= 0, got {self.prefix}.")
        if self.pos is not None and self.pos.ndim != 3:
            raise ValueError(f"Layout: pos must be [b or 1, n, axes], got {list(self.pos.shape)}.")

    def memo(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value stored under `key`, made by `make()` on first use in this model call."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]  # type: ignore[return-value]

    def positions(self, axes: int, num_tokens: int, device: torch.device, start: int = 0) -> Tensor:
        """Return token coordinates [b|1, n, axes]: `pos` if given, else from the grid, else (one axis) 0, 1, 2, ...

        Args:
            axes: number of coordinates; the last `axes` ones of `pos` or the grid (h w of f h w).
            num_tokens: tokens of this call.
            device: where the result lives.
            start: tokens already in a cache; shifts the running index only (`pos` describes the tokens of this call).

        Raises:
            ValueError: if the tokens have no such coordinates, or their number differs.
        """
        if self.pos is not None:
            if self.pos.shape[1] != num_tokens or self.pos.shape[2] < axes:
                raise ValueError(f"Layout: pos must be [b or 1, {num_tokens}, {axes} or more], got {list(self.pos.shape)}.")
            return self.pos[..., -axes:].to(device=device, dtype=torch.float32)
        if axes == 1:
            return torch.arange(start, start + num_tokens, device=device, dtype=torch.float32)[None, :, None]
        if self.grid is None or len(self.grid) < axes:
            raise ValueError(f"Layout: {axes}-axis positions need pos or a grid of {axes} sides, got grid={self.grid}, pos=None.")
        if start:
            raise ValueError("Layout: with a cache, grid positions of the new tokens are unknown; give them as pos.")
        if self.prefix + math.prod(self.grid) != num_tokens:
            raise ValueError(f"Layout: grid {self.grid} with prefix {self.prefix} does not describe {num_tokens} tokens.")
        sides = [torch.arange(side, device=device, dtype=torch.float32) for side in self.grid]
        coordinates = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1)[..., -axes:].reshape(1, -1, axes)
        return torch.cat([coordinates.new_zeros(1, self.prefix, axes), coordinates], dim=1)
