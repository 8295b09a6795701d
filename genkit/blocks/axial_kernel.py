"""Small kernels along each axis of a grid: the means of its rows, columns or frames say how much of each goes into each.

An axis of m places has a kernel [m, m] per head, q k^T of m pooled tokens without softmax, turned by their coordinates; a field on a finer
grid of the same space has the same coordinates, so the mixer does not know the resolution.

Source: IFactFormer-m, 2024; Li et al., Scalable Transformer for PDE Surrogate Modeling (FactFormer), NeurIPS 2023, arXiv 2305.17560.
Letters: b batch, n tokens, d width, f h w frames, rows and columns, m places of an axis, hd head width of values, kd of queries and keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.axial import AXES
from genkit.blocks.caps import Caps, MixerConfig, option, register
from genkit.blocks.embeddings import rotary, rotate
from genkit.blocks.grid_mixer import Grid, GridMixer
from genkit.blocks.heads import head_count, split_heads
from genkit.blocks.layout import Layout

TURNS = 64.0  # coordinates are multiplied by it


@register("axial_kernel")
@dataclass(frozen=True)
class AxialKernelConfig(MixerConfig):
    """Options of axial kernels.

    Args:
        axes: of the grid: rows and columns ("hw"), or frames too ("fhw").
        mode: the axes' results side by side ("parallel"), or one axis after the other ("chained").
        key_mult: kd / hd.
        heads: number of heads; the model's default if None.
        head_dim: hd; d / heads if None.
        latent: width of pooled tokens; d if None.
        scale: factor of the kernels; behind the norm of "parallel" it has no effect.
    """

    axes: str = option("hw", "hw", "fhw")
    mode: str = option("parallel", "parallel", "chained")
    key_mult: int = option(2, int)
    heads: int | None = option(None, int, None)
    head_dim: int | None = option(None, int, None)
    latent: int | None = option(None, int, None)
    scale: float = option(1.0, float, int)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.key_mult, *(1 if size is None else size for size in (self.head_dim, self.latent))) < 1 or self.scale <= 0:
            raise ValueError(
                f"axial_kernel: sizes and scale must be positive, got key_mult={self.key_mult}, head_dim={self.head_dim}, "
                f"latent={self.latent}, scale={self.scale}."
            )

    @property
    def caps(self) -> Caps:
        """Needs the whole grid."""
        return Caps(grid=True)

    def build(self, dim: int, *, heads: int | None = None, context_dim: int | None = None) -> AxialKernel:
        """Build the module for width `dim`."""
        divided = dim if self.head_dim is None else 0  # heads of their own width need not divide d
        return AxialKernel(dim, self, head_count("axial_kernel", self.heads, heads, divided))


class AxisKernel(nn.Module):
    """The kernel of one axis: a linear map, norm, gated MLP, queries and keys.

    Args:
        dim: d.
        latent: width of pooled tokens.
        heads: number of heads.
        key_dim: kd, even.
    """

    def __init__(self, dim: int, latent: int, heads: int, key_dim: int) -> None:
        super().__init__()
        self.heads, self.key_dim = heads, key_dim
        self.fc_in = nn.Linear(dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(dim, latent)
        self.q, self.k = (nn.Linear(latent, heads * key_dim, bias=False) for _ in range(2))

    def forward(self, means: Tensor, pos: Tensor) -> Tensor:
        """Return the kernel [b, heads, m, m] of means [b, m, d] with coordinates [b|1, m, 1]."""
        gate, hidden = self.fc1(self.norm(self.fc_in(means))).chunk(2, dim=-1)
        tokens = self.fc2(F.gelu(gate) * hidden)
        cos, sin = rotary(TURNS * pos, self.key_dim)
        q, k = (rotate(split_heads(layer(tokens), self.heads), cos, sin, 1) for layer in (self.q, self.k))
        return q @ k.transpose(-2, -1)


class AxialKernel(GridMixer):
    """Values times the kernels of all axes, and behind them a norm over the grid, two linear maps `fc1`, `fc2` with GELU between.

    Args:
        dim: d.
        config: the options.
        heads: number of heads.

    Raises:
        ValueError: if kd is odd.
    """

    takes_prefix = False

    def __init__(self, dim: int, config: AxialKernelConfig, heads: int) -> None:
        super().__init__(dim, config)
        self.config: AxialKernelConfig = config
        self.heads = heads
        width = dim // heads if config.head_dim is None else config.head_dim
        if width * config.key_mult % 2:
            raise ValueError(f"axial_kernel: key_mult * head width must be even, got {config.key_mult} * {width}.")
        latent, parts = dim if config.latent is None else config.latent, len(config.axes) if config.mode == "parallel" else 1
        self.fc_in, self.v = nn.Linear(dim, dim, bias=False), nn.Linear(dim, heads * width, bias=False)
        self.kernels = nn.ModuleList(AxisKernel(dim, latent, heads, width * config.key_mult) for _ in config.axes)
        self.fc1, self.fc2 = nn.Linear(parts * heads * width, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def mix(self, x: Tensor, grid: Grid, layout: Layout) -> Tensor:
        """Apply the kernels of all axes; coordinates are the grid's own (`layout.pos`), or shares of its sides."""
        sides = grid if len(self.config.axes) == 3 else grid[1:]
        if len(layout.grid or ()) != len(sides):
            raise ValueError(f"{self.config}: needs a grid of the axes {', '.join(AXES[-len(sides) :])}, got {layout.grid}.")
        v = self.v(x).unflatten(1, sides).unflatten(-1, (self.heads, -1)).movedim(-2, 1)  # [b, heads, (f) h w, hd]
        means = self.fc_in(x).unflatten(1, sides)
        found: list[Tensor] = []
        for axis, kernel in enumerate(self.kernels):
            others = [1 + i for i in range(len(sides)) if i != axis]
            weights = self.config.scale * kernel(means.mean(others), self._coordinates(layout, sides, axis, x.device))
            start = v if not found or self.config.mode == "parallel" else found.pop()
            moved = start.movedim(2 + axis, 2)
            found.append((weights.to(v.dtype) @ moved.flatten(3)).view(moved.shape).movedim(2, 2 + axis))
        out = torch.cat(found, dim=-1).flatten(2, -2).transpose(1, 2).flatten(2)  # [b, n, heads * parts * hd]
        normed = F.layer_norm(out.transpose(1, 2), (out.shape[1],)).transpose(1, 2)  # each channel over the grid
        return self.fc2(F.gelu(self.fc1(normed)))

    @staticmethod
    def _coordinates(layout: Layout, sides: Sequence[int], axis: int, device: torch.device) -> Tensor:
        """Return the coordinates [b|1, m, 1] of the places of an axis."""
        if layout.pos is None:
            return (torch.arange(sides[axis], device=device, dtype=torch.float32) / sides[axis])[None, :, None]
        count = torch.Size(sides).numel()
        pos = layout.positions(len(sides), count, device).unflatten(1, list(sides))[..., axis : axis + 1]
        for other in range(len(sides) - 1, -1, -1):
            pos = pos if other == axis else pos.select(1 + other, 0)
        return pos
