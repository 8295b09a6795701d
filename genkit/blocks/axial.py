"""Attention along some axes of a grid: rows, columns, frames or several of them, all other axes apart.

The projections act on the tokens where they lie. What attends together is folded into the sequence by views where the axes are the last of
the grid (pixels of a frame) or the first (frames of a pixel): there the other axes become more heads, so no tensor is copied.

Letters: b batch, n tokens, d width, f h w frames, rows and columns, hd head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.attend import attend
from genkit.blocks.caps import Caps, MixerConfig, option, register
from genkit.blocks.grid_mixer import Grid, GridMixer
from genkit.blocks.heads import head_count
from genkit.blocks.layout import Layout

AXES = "fhw"


@register("axial")
@dataclass(frozen=True)
class AxialConfig(MixerConfig):
    """Options of axial attention.

    Args:
        axes: letters of the axes that attend together, in the order of the grid: "f", "hw", "h", "w", "fh", "fw", "fhw".
        heads: query heads; the model's default if None.
        qkv_bias: biases of the query, key and value projections.
        out_bias: bias of the output projection.
        out_layers: 1, or 2 linear maps behind the heads, as VDT's temporal attention is published; `merge_out` makes them one.
    """

    axes: str = option("hw", "f", "hw", "h", "w", "fh", "fw", "fhw")
    heads: int | None = option(None, int, None)
    qkv_bias: bool = option(True, bool)
    out_bias: bool = option(True, bool)
    out_layers: int = option(1, int)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads is not None and self.heads < 1:
            raise ValueError(f"axial: heads must be positive, got {self.heads}.")
        if self.out_layers not in (1, 2):
            raise ValueError(f"axial: out_layers must be 1 or 2, got {self.out_layers}.")

    @property
    def caps(self) -> Caps:
        """Needs the whole grid; permuting a grid's axes is no permutation of tokens that it commutes with."""
        return Caps(grid=True)

    def build(self, dim: int, *, heads: int | None = None, context_dim: int | None = None) -> AxialAttention:
        """Build the module for width `dim`."""
        return AxialAttention(dim, self, head_count("axial", self.heads, heads, dim))


class AxialAttention(GridMixer):
    """softmax(q k^T hd^-0.5) v along axes, with projections `q`, `kv` (rows k then v, heads contiguous), `proj` and maybe `proj2`.

    Args:
        dim: d, a multiple of heads.
        config: the options.
        heads: number of heads.
    """

    takes_prefix = False

    def __init__(self, dim: int, config: AxialConfig, heads: int) -> None:
        super().__init__(dim, config)
        self.config: AxialConfig = config
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=config.qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=config.out_bias)
        self.proj2: nn.Module = nn.Linear(dim, dim) if config.out_layers == 2 else nn.Identity()

    def mix(self, x: Tensor, grid: Grid, layout: Layout) -> Tensor:
        """Attend along the axes; all three of a grid of frames, two of one without."""
        axes = self._axes(layout)
        bias = self.kv.bias
        # two products: then each folds without a copy
        k = F.linear(x, self.kv.weight[: self.dim], None if bias is None else bias[: self.dim])
        v = F.linear(x, self.kv.weight[self.dim :], None if bias is None else bias[self.dim :])
        out = attend(self._fold(self.q(x), axes), self._fold(k, axes), self._fold(v, axes))
        return self.proj2(self.proj(self._unfold(out, axes, len(x))))

    def _axes(self, layout: Layout) -> tuple[int, ...]:
        """Return the sides of the grid as they were given, which tell whether there is an axis of frames."""
        grid = layout.grid or ()
        missing = [letter for letter in self.config.axes if letter not in AXES[-len(grid) :]]
        if missing:
            raise ValueError(f"{self.config}: grid {grid} has no axis {', '.join(missing)}.")
        return grid

    def _places(self, grid: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """Return which axes of the grid attend together and which stay apart."""
        letters = AXES[-len(grid) :]
        inside = [i for i, letter in enumerate(letters) if letter in self.config.axes]
        return inside, [i for i in range(len(grid)) if i not in inside]

    def _fold(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """[b, n, d] -> [b', heads', m, hd], m the tokens that attend together."""
        inside, outside = self._places(grid)
        m = math.prod([grid[i] for i in inside])
        if outside and inside[0] > outside[-1]:  # the last axes: the others are batch
            return x.reshape(-1, m, self.heads, x.shape[-1] // self.heads).transpose(1, 2)
        if inside[-1] < (outside[0] if outside else len(grid)):  # the first axes, or all: the others are heads
            return x.reshape(len(x), m, -1, x.shape[-1] // self.heads).transpose(1, 2)
        split = x.reshape(len(x), *grid, self.heads, -1)
        order = [0, *[i + 1 for i in outside], len(grid) + 1, *[i + 1 for i in inside], len(grid) + 2]
        return split.permute(order).flatten(0, len(outside)).flatten(2, 1 + len(inside))

    def _unfold(self, x: Tensor, grid: tuple[int, ...], b: int) -> Tensor:
        """Undo `_fold`, heads side by side."""
        inside, outside = self._places(grid)
        n = math.prod(grid)
        if not (outside and inside[0] < outside[-1] and inside[-1] > outside[0]):
            return x.transpose(1, 2).reshape(b, n, -1)
        split = x.reshape(b, *[grid[i] for i in outside], self.heads, *[grid[i] for i in inside], -1)
        back = [0] * len(grid)
        for place, i in enumerate(outside):
            back[i] = place + 1
        for place, i in enumerate(inside):
            back[i] = len(outside) + 2 + place
        return split.permute(0, *back, len(outside) + 1, len(grid) + 2).reshape(b, n, -1)

    @torch.no_grad()
    def merge_out(self) -> None:
        """Make the two linear maps behind the heads one: exact, in float64 on the way."""
        if not isinstance(self.proj2, nn.Linear):
            return
        first, second = self.proj, self.proj2
        weight = second.weight.double() @ first.weight.double()
        offset = second.bias.double() if first.bias is None else second.weight.double() @ first.bias.double() + second.bias.double()
        merged = nn.Linear(first.in_features, first.out_features, device=first.weight.device, dtype=first.weight.dtype)
        merged.weight.copy_(weight)
        merged.bias.copy_(offset)
        merged.requires_grad_(first.weight.requires_grad)
        self.proj, self.proj2 = merged, nn.Identity()
