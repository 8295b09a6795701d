"""Attention whose keys and values are those of a coarser grid.

Sources: Wang et al., Pyramid Vision Transformer, ICCV 2021, arXiv 2102.12122 (fewer keys); Wu et al., CvT, ICCV 2021, arXiv 2103.15808
(convolutions in front of the projections); Li et al., Next-ViT, 2022, arXiv 2207.05501 (runs of tokens).
Letters: b batch, n tokens, d width, f h w frames, rows and columns, r tokens of a side that become one, hd head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.attend import attend
from genkit.blocks.caps import Caps, MixerConfig, option, register
from genkit.blocks.conv import to_map, to_tokens
from genkit.blocks.grid_mixer import Grid, GridMixer
from genkit.blocks.heads import head_count, join_heads, split_heads
from genkit.blocks.layout import Layout
from genkit.blocks.norms import build_norm


class Projector(nn.Module):
    """A depthwise convolution without bias and a norm: what CvT puts in front of a projection.

    Args:
        dim: d.
        stride: r.
        norm: kind of norm behind it.
    """

    def __init__(self, dim: int, stride: int, norm: str) -> None:
        super().__init__()
        self.filters = nn.Conv2d(dim, dim, 3, stride=stride, padding=1, groups=dim, bias=False)
        self.norm = build_norm(norm, dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return tokens [b, n / r^2, d] of maps [b, d, h, w]."""
        return self.norm(to_tokens(self.filters(pixels), len(pixels)))


@register("reduced")
@dataclass(frozen=True)
class ReducedConfig(MixerConfig):
    """Options of attention to fewer keys.

    Args:
        kv: where keys and values come from: means of r x r tokens ("pool"); a depthwise 3 x 3 convolution each with stride r ("conv"); for
            published weights also means of 3 x 3 tokens with stride r, zeros at the border counted ("avg", CvT), and means of runs of
            r * r tokens in raster order, the rest left out ("run", Next-ViT).
        r: the factor.
        q_conv: a depthwise 3 x 3 convolution in front of the queries too.
        norm: of the tokens that became fewer: "none", "ln" or "bn".
        heads: query heads; the model's default if None.
        qkv_bias: biases of the query, key and value projections.
        out_bias: bias of the output projection.
        scale: logits times hd^-0.5 ("hd") or d^-0.5 ("dim", CvT).
    """

    kv: str = option("pool", "pool", "conv", "avg", "run")
    r: int = option(2, int)
    q_conv: bool = option(False, bool)
    norm: str = option("none", "none", "ln", "bn")
    heads: int | None = option(None, int, None)
    qkv_bias: bool = option(True, bool)
    out_bias: bool = option(True, bool)
    scale: str = option("hd", "hd", "dim")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise ValueError(f"reduced: r must be positive, got {self.r}.")

    @property
    def caps(self) -> Caps:
        """Needs the whole grid."""
        return Caps(grid=True)

    def build(self, dim: int, *, heads: int | None = None, context_dim: int | None = None) -> ReducedAttention:
        """Build the module for width `dim`."""
        return ReducedAttention(dim, self, head_count("reduced", self.heads, heads, dim))


class ReducedAttention(GridMixer):
    """softmax(q k^T scale) v, k and v of reduced tokens, with projections `q`, `k`, `v` and `proj`.

    Args:
        dim: d, a multiple of heads.
        config: the options.
        heads: number of heads.
    """

    def __init__(self, dim: int, config: ReducedConfig, heads: int) -> None:
        super().__init__(dim, config)
        self.config: ReducedConfig = config
        self.heads = heads
        self.scale = (dim // heads if config.scale == "hd" else dim) ** -0.5
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=config.qkv_bias) for _ in range(3))
        self.proj = nn.Linear(dim, dim, bias=config.out_bias)
        self.q_conv = Projector(dim, 1, config.norm) if config.q_conv else None
        by_conv = config.kv == "conv"
        self.k_conv = Projector(dim, config.r, config.norm) if by_conv else None
        self.v_conv = Projector(dim, config.r, config.norm) if by_conv else None
        self.norm = build_norm("none" if by_conv else config.norm, dim)

    def mix(self, x: Tensor, grid: Grid, layout: Layout) -> Tensor:
        """Attend; tokens of the prefix are queries and keys that no convolution or mean touches, and need a grid of one frame."""
        first = layout.prefix
        if first and grid[0] > 1:
            raise ValueError(f"{self.config}: a prefix of {first} tokens belongs to no frame of the grid {grid}.")
        front, rest = x[:, :first], x[:, first:].reshape(len(x) * grid[0], -1, self.dim)
        pixels = to_map(rest, (1, *grid[1:]))
        queries = rest if self.q_conv is None else self.q_conv(pixels)
        if self.k_conv is None or self.v_conv is None:
            keys = values = self.norm(self._pooled(rest, pixels))
        else:
            keys, values = self.k_conv(pixels), self.v_conv(pixels)
        if first:
            queries, keys, values = (torch.cat([front, part], dim=1) for part in (queries, keys, values))
        heads = [split_heads(layer(part), self.heads) for layer, part in ((self.q, queries), (self.k, keys), (self.v, values))]
        out = attend(heads[0], heads[1], heads[2], scale=self.scale)
        return self.proj(join_heads(out)).reshape(x.shape)

    def _pooled(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        """Return means [b, m, d] of tokens [b, n, d], which are also maps [b, d, h, w]."""
        r = self.config.r
        if self.config.kv == "avg":
            return to_tokens(F.avg_pool2d(pixels, 3, r, padding=1, ceil_mode=True), len(pixels))
        if r == 1:
            return tokens
        if self.config.kv == "run":
            if tokens.shape[1] < r * r:
                raise ValueError(f"{self.config}: runs of {r * r} tokens need as many at least, got {tokens.shape[1]}.")
            return F.avg_pool1d(tokens.transpose(1, 2), r * r).transpose(1, 2)
        return to_tokens(F.avg_pool2d(pixels, r, ceil_mode=True, count_include_pad=False), len(pixels))
