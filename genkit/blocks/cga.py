"""Cascaded group attention: each head has channels of its own, and hands its result on to the next.

Source: Liu et al., EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention, CVPR 2023, arXiv 2305.07027.
Letters: b batch, n tokens, d width, H heads, f h w frames, rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.attend import attend
from genkit.blocks.bias_table import BiasTable
from genkit.blocks.caps import Caps, MixerConfig, option, register
from genkit.blocks.conv import to_map, to_tokens
from genkit.blocks.grid_mixer import Grid, GridMixer
from genkit.blocks.heads import head_count
from genkit.blocks.layout import Layout
from genkit.blocks.norms import build_norm
from genkit.blocks.window import fold_windows, pad_to_windows, unfold_windows


@register("cga")
@dataclass(frozen=True)
class CGAConfig(MixerConfig):
    """Options of cascaded group attention.

    Args:
        window: side of the windows in which heads attend; a larger one than the grid is cut to it. What pads the last windows is zero and
            attended to, as published.
        heads: H; the model's default if None.
        key_dim: width of queries and keys of a head; values are d / H wide.
        kernels: sides of the depthwise filters on the queries, odd: one for all heads or one for each.
        norm: behind projections and filters: "none", or "bn" as published.
    """

    window: int = option(8, int)
    heads: int | None = option(None, int, None)
    key_dim: int = option(16, int)
    kernels: int | tuple[int, ...] = option(5, int, tuple)
    norm: str = option("none", "none", "bn")

    def __post_init__(self) -> None:
        super().__post_init__()
        sides = self.kernels if isinstance(self.kernels, tuple) else (self.kernels,)
        if self.window < 1 or self.key_dim < 1 or not sides or any(not isinstance(k, int) or k < 1 or k % 2 == 0 for k in sides):
            raise ValueError(
                f"cga: window and key_dim must be positive and kernels odd, got {self.window}, {self.key_dim} and {self.kernels}."
            )

    @property
    def caps(self) -> Caps:
        """Needs the whole grid."""
        return Caps(grid=True)

    def build(self, dim: int, *, heads: int | None = None, context_dim: int | None = None) -> CGA:
        """Build the module for width `dim`."""
        return CGA(dim, self, head_count("cga", self.heads, heads, dim))


class CGAHead(nn.Module):
    """One head: `qkv` of its channels (rows q, k, v), `filters` on the queries, a norm behind each.

    Args:
        dim: d / H.
        config: the options.
        kernel: side of its filters.
    """

    def __init__(self, dim: int, config: CGAConfig, kernel: int) -> None:
        super().__init__()
        has_bias, width = config.norm == "none", config.key_dim
        self.widths = [width, width, dim]
        self.qkv = nn.Linear(dim, sum(self.widths), bias=has_bias)
        self.qkv_norm = build_norm(config.norm, sum(self.widths))
        self.filters = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=has_bias)
        self.norm = build_norm(config.norm, width)

    def forward(self, x: Tensor, side: tuple[int, int], bias: Tensor) -> Tensor:
        """Attend within windows [b, r * s, d / H] of sides (r, s), with biases [1, 1, r * s, r * s]."""
        q, k, v = self.qkv_norm(self.qkv(x)).split(self.widths, dim=-1)
        q = self.norm(to_tokens(self.filters(to_map(q, (1, *side))), len(q)))
        return attend(q[:, None], k[:, None], v[:, None], bias=bias)[:, 0]


class CGA(GridMixer):
    """proj(ReLU([out_1 .. out_H])), out_i = head_i(x_i + out_{i-1}).

    Args:
        dim: d, a multiple of heads.
        config: the options.
        heads: H.
    """

    takes_prefix = False

    def __init__(self, dim: int, config: CGAConfig, heads: int) -> None:
        super().__init__(dim, config)
        self.config: CGAConfig = config
        kernels = config.kernels if isinstance(config.kernels, tuple) else (config.kernels,) * heads
        if len(kernels) != heads:
            raise ValueError(f"cga: kernels must be one for all heads or one for each of {heads}, got {config.kernels}.")
        self.heads = nn.ModuleList(CGAHead(dim // heads, config, kernel) for kernel in kernels)
        self.bias_table = BiasTable("table_abs", heads, (config.window, config.window))
        self.proj = nn.Linear(dim, dim, bias=config.norm == "none")
        self.proj_norm = build_norm(config.norm, dim)

    def mix(self, x: Tensor, grid: Grid, layout: Layout) -> Tensor:
        """Attend in the windows."""
        f, h, w = grid
        side = (min(self.config.window, h), min(self.config.window, w))
        pixels = pad_to_windows(x.reshape(len(x) * f, h, w, self.dim), side)
        out = self.attended(fold_windows(pixels, side), side)
        return unfold_windows(out, (pixels.shape[1], pixels.shape[2]), side)[:, :h, :w].reshape(x.shape)

    def attended(self, x: Tensor, side: tuple[int, int]) -> Tensor:
        """Return the result [b, r * s, d] for windows [b, r * s, d] of sides (r, s)."""
        biases = self.bias_table(side).split(1, dim=1)
        found: list[Tensor] = []
        for head, part, bias in zip(self.heads, x.chunk(len(self.heads), dim=-1), biases, strict=True):
            found.append(head(part + found[-1] if found else part, side, bias))
        return self.proj_norm(self.proj(F.relu(torch.cat(found, dim=-1))))
