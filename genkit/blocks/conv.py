"""Convolution and pooling of a token grid, for the neighbourhood of each token.

Sources: depthwise convolution as in Xiao et al. 2021, arXiv 2106.14881; multi-head convolution (MHCA) of Li et al., Next-ViT, 2022, arXiv
2207.05501; pooling of Yu et al., MetaFormer, 2022, arXiv 2111.11418.
Letters: b batch, n tokens, d width, f h w frames, rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.caps import Caps, MixerConfig, option, register
from genkit.blocks.grid_mixer import Grid, GridMixer
from genkit.blocks.heads import head_count
from genkit.blocks.layout import Layout
from genkit.blocks.norms import build_norm


def to_map(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Return a map [b * f, d, h, w] of tokens [b, f * h * w, d], as a view: channels last in memory."""
    f, h, w = grid
    return x.reshape(len(x) * f, h, w, x.shape[-1]).permute(0, 3, 1, 2)


def to_tokens(x: Tensor, b: int) -> Tensor:
    """Undo `to_map` for b samples."""
    return x.permute(0, 2, 3, 1).reshape(b, -1, x.shape[1])


@register("conv")
@dataclass(frozen=True)
class ConvConfig(MixerConfig):
    """Options of a convolution.

    Args:
        kind: "dw": one filter per channel; "mhca": a filter bank per head, norm, ReLU, a linear map; "pool": mean of the neighbours minus
            the token.
        k: side of the filter, odd.
        heads: groups of "mhca"; the model's default if None.
        norm: behind the filters: "none", "ln" or "bn".
        bias: of the filters of "dw".
    """

    kind: str = option("dw", "dw", "mhca", "pool")
    k: int = option(3, int)
    heads: int | None = option(None, int, None)
    norm: str = option("none", "none", "ln", "bn")
    bias: bool = option(True, bool)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1 or self.k % 2 == 0:
            raise ValueError(f"conv: k must be odd and positive, got {self.k}.")

    @property
    def caps(self) -> Caps:
        """Needs the whole grid."""
        return Caps(grid=True)

    def build(self, dim: int, *, heads: int | None = None, context_dim: int | None = None) -> Conv:
        """Build the module for width `dim`."""
        return Conv(dim, self, head_count("conv", self.heads, heads, dim) if self.kind == "mhca" else 1)


class Conv(GridMixer):
    """Filters `weight` [d, d / groups, k, k], a norm, and for "mhca" ReLU and `proj`.

    Args:
        dim: d.
        config: the options.
        heads: groups of "mhca".
    """

    def __init__(self, dim: int, config: ConvConfig, heads: int) -> None:
        super().__init__(dim, config)
        self.config: ConvConfig = config
        groups = {"dw": dim, "mhca": heads}.get(config.kind)
        bias = config.bias and config.kind == "dw"
        self.filters = None if groups is None else nn.Conv2d(dim, dim, config.k, padding=config.k // 2, groups=groups, bias=bias)
        self.norm = build_norm(config.norm, dim)
        self.proj = nn.Linear(dim, dim, bias=False) if config.kind == "mhca" else None

    def mix(self, x: Tensor, grid: Grid, layout: Layout) -> Tensor:
        """Filter the grid; tokens of the prefix have no neighbours and get 0."""
        k = self.config.k
        first = layout.prefix
        tokens = x[:, first:]
        pixels = to_map(tokens, grid)
        if self.filters is None:
            pooled = F.avg_pool2d(pixels, k, stride=1, padding=k // 2, count_include_pad=False)
            out = self.norm(to_tokens(pooled, len(x)) - tokens)
        else:
            out = self.norm(to_tokens(self.filters(pixels), len(x)))
            out = out if self.proj is None else self.proj(F.relu(out))
        return F.pad(out, (0, 0, first, 0)) if first else out
