"""Next-ViT's transformer block: attention to fewer keys on most channels, a multi-head convolution on the rest, an MLP on both.

Source: Li et al., Next-ViT, 2022, arXiv 2207.05501. New models combine `reduced` and `conv` in a stack string; this block loads published
weights, whose halves are of different widths.
Letters: b batch, n tokens of a grid, m of one with half the sides, d width.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.branch import Branch
from genkit.blocks.conv import ConvConfig, to_map, to_tokens
from genkit.blocks.folding import factor_and_offset, fold_into
from genkit.blocks.layout import Layout
from genkit.blocks.mlp import MLPConfig
from genkit.blocks.norms import BatchNorm, build_norm
from genkit.blocks.reduced import ReducedAttention, ReducedConfig
from genkit.checks import check_shape


class WidthChange(nn.Module):
    """Means of 2 x 2 tokens if the stride is 2, a linear map `proj`, a batch norm; nothing at all if neither size nor width changes.

    Args:
        dim: width of the tokens.
        out_dim: width of the result.
        stride: 1 or 2.
    """

    def __init__(self, dim: int, out_dim: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        changes = stride > 1 or dim != out_dim
        self.proj = nn.Linear(dim, out_dim, bias=False) if changes else nn.Identity()
        self.norm = build_norm("bn" if changes else "none", out_dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Return tokens [b, m, d'] of tokens [b, n, d] of a grid (h, w), and their grid."""
        if self.stride == 2:
            pixels = F.avg_pool2d(to_map(x, (1, *grid)), 2, ceil_mode=True, count_include_pad=False)
            x, grid = to_tokens(pixels, len(x)), (pixels.shape[2], pixels.shape[3])
        return self.norm(self.proj(x)), grid


class NextViTBlock(nn.Module):
    """y = attention of `embed`(x), z = convolution of `narrow`(y), then an MLP on [y, z], all with residuals.

    Args:
        in_dim: width of the tokens.
        dim: d of the result.
        attention_dim: channels that attend; the others are convolved.
        head_dim: width of a head of both.
        r: keys are means of runs of r * r tokens.
        stride: 2 halves the sides of the grid.
        hidden: of the MLP.
    """

    def __init__(self, in_dim: int, dim: int, *, attention_dim: int, head_dim: int, r: int, stride: int, hidden: int) -> None:
        super().__init__()
        self.in_dim, rest = in_dim, dim - attention_dim
        attention = ReducedConfig("run", r=r, norm="bn" if r > 1 else "none", heads=attention_dim // head_dim)
        self.embed = WidthChange(in_dim, attention_dim, stride)
        self.attention = Branch(attention.build(attention_dim), attention_dim, "bn")
        self.narrow = WidthChange(attention_dim, rest)
        self.conv = Branch(ConvConfig("mhca", heads=rest // head_dim, norm="bn").build(rest), rest, "none")
        self.mlp = Branch(MLPConfig(hidden=hidden, act="relu").build(dim), dim, "bn")

    def forward(self, x: Tensor, *, layout: Layout) -> Tensor:
        """Return tokens [b, m, d] of tokens x [b, n, d_in] of layout.grid (h, w).

        Raises:
            ValueError: for other widths, or a grid of other sides.
        """
        grid = layout.grid or ()
        if len(grid) != 2 or layout.prefix:
            raise ValueError(
                f"NextViTBlock: needs layout.grid (h, w) and no prefix, got {layout.grid} and {layout.prefix} tokens in front."
            )
        check_shape(x, "NextViTBlock: x", "b n d", n=grid[0] * grid[1], d=self.in_dim)
        y, (h, w) = self.embed(x, (grid[0], grid[1]))
        smaller = Layout(grid=(h, w))
        y = self.attention(y, layout=smaller)
        z = self.conv(self.narrow(y, (h, w))[0], layout=smaller)
        return self.mlp(torch.cat([y, z], dim=2))

    def fold_norms(self) -> None:
        """Put the batch norms around the attention into its projections: exact, as means of tokens and what norms do change places."""
        mixer, norm = cast(ReducedAttention, self.attention.f), self.attention.norm
        if not isinstance(norm, BatchNorm):
            return
        factor, offset = factor_and_offset(norm)
        fold_into(mixer.q, factor, offset)
        if isinstance(mixer.norm, BatchNorm):
            second, shift = factor_and_offset(mixer.norm)
            factor, offset = second * factor, second * offset + shift
            mixer.norm = nn.Identity()
        for layer in (mixer.k, mixer.v):
            fold_into(layer, factor, offset)
        self.attention.norm = nn.Identity()
