"""Attention inside the windows of a grid.

Source: Liu et al., Swin Transformer, ICCV 2021, arXiv 2103.14030; windows with padded tokens as keys as in Wu et al., TinyViT, ECCV 2022,
arXiv 2207.10666.
Letters: b batch, n tokens, d width, f h w frames, rows and columns, r side of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from genkit.blocks.attention import Attention, AttentionConfig
from genkit.blocks.bias_table import KINDS
from genkit.blocks.caps import Caps, MixerConfig, option, register
from genkit.blocks.grid_mixer import Grid, GridMixer
from genkit.blocks.layout import Layout
from genkit.blocks.norms import build_norm


def fold_windows(pixels: Tensor, side: tuple[int, int]) -> Tensor:
    """Return the tokens [b * windows, r * s, d] of the windows of maps [b, h, w, d], whose sides (r, s) divide h and w."""
    return rearrange(pixels, "b (i r) (j s) d -> (b i j) (r s) d", r=side[0], s=side[1])


def unfold_windows(tokens: Tensor, size: tuple[int, int], side: tuple[int, int]) -> Tensor:
    """Undo `fold_windows` for maps of `size` (h, w)."""
    return rearrange(tokens, "(b i j) (r s) d -> b (i r) (j s) d", i=size[0] // side[0], j=size[1] // side[1], r=side[0])


def pad_to_windows(pixels: Tensor, side: tuple[int, int]) -> Tensor:
    """Return maps [b, h, w, d] with zeros at the end of both axes, so that (r, s) divides them."""
    missing = (-pixels.shape[1] % side[0], -pixels.shape[2] % side[1])
    return F.pad(pixels, (0, 0, 0, missing[1], 0, missing[0])) if any(missing) else pixels


@register("window")
@dataclass(frozen=True)
class WindowConfig(MixerConfig):
    """Options of attention in windows.

    Args:
        size: r. A window that is larger than the grid is cut to it.
        shift: the windows begin this many tokens further right and down, and tokens at opposite borders do not meet. Blocks that alternate
            between 0 and size // 2 let neighbours of different windows see each other.
        pad: what fills the last windows of a grid whose sides r does not divide: nothing that is attended to ("mask"), or zeros in front
            of the projections, that are ("zero").
        heads: query heads; the model's default if None.
        kv_heads, qkv_bias, out_bias, qk_norm: as in `attention`.
        rope: rotary position by row and column in the window ("2d").
        pos_bias: learned biases by the distance in the window, see `attention`.
        norm: a norm behind the padding, "ln", as TinyViT has it in place of the branch's: then padded tokens are its bias.
    """

    size: int = option(8, int)
    shift: int = option(0, int)
    pad: str = option("mask", "mask", "zero")
    heads: int | None = option(None, int, None)
    kv_heads: int | None = option(None, int, None)
    qkv_bias: bool = option(True, bool)
    out_bias: bool = option(True, bool)
    qk_norm: str = option("none", "none", "ln", "rms")
    rope: str = option("none", "none", "2d")
    pos_bias: str = option("none", "none", *KINDS)
    norm: str = option("none", "none", "ln")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1 or not 0 <= self.shift < self.size:
            raise ValueError(f"window: size must be positive and shift lie in 0 .. size - 1, got size={self.size}, shift={self.shift}.")

    @property
    def caps(self) -> Caps:
        """Needs the whole grid."""
        return Caps(grid=True)

    def build(self, dim: int, *, heads: int | None = None, context_dim: int | None = None) -> WindowAttention:
        """Build the module for width `dim`."""
        shared = {name: getattr(self, name) for name in ("heads", "kv_heads", "qkv_bias", "out_bias", "qk_norm", "rope", "pos_bias")}
        table = None if self.pos_bias == "none" else (self.size, self.size)
        return WindowAttention(self, AttentionConfig(**shared, table=table).build(dim, heads=heads))


class WindowAttention(GridMixer):
    """`attention` of the tokens of each window.

    Args:
        config: the options.
        attention: what acts in a window.
    """

    def __init__(self, config: WindowConfig, attention: Attention) -> None:
        super().__init__(attention.q.in_features, config)
        self.config: WindowConfig = config
        self.attention = attention
        self.norm = build_norm(config.norm, attention.q.in_features)

    def mix(self, x: Tensor, grid: Grid, layout: Layout) -> Tensor:
        """Attend in the windows; tokens of the prefix enter every window, and what they find there is averaged."""
        f, h, w = grid
        first = layout.prefix
        zeros = self.config.pad == "zero"
        side = (self.config.size,) * 2 if zeros else (min(self.config.size, h), min(self.config.size, w))
        shift = tuple(self.config.shift if r < length else 0 for r, length in zip(side, (h, w), strict=True))
        pixels = pad_to_windows(x[:, first:].reshape(len(x) * f, h, w, self.dim), side)
        padded = (pixels.shape[1], pixels.shape[2])
        pixels = pixels.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else pixels
        folded = fold_windows(pixels, side)
        allowed = None
        if any(shift) or (padded != (h, w) and not zeros):
            key = ("window", side, shift, zeros, x.device)
            allowed = layout.memo(key, lambda: self._allowed((h, w), side, shift, x.device))
            allowed = F.pad(allowed.repeat(len(pixels), 1, 1)[:, None], (first, 0, first, 0), value=True)
        if first:
            folded = torch.cat([x[:, :first].repeat_interleave(len(folded) // len(x), dim=0), folded], dim=1)
        out = self.attention(self.norm(folded), layout=Layout(grid=side, prefix=first), mask=allowed)
        front, out = out[:, :first], out[:, first:]
        out = unfold_windows(out, padded, side)
        out = out.roll(shift, (1, 2)) if any(shift) else out
        out = out[:, :h, :w].reshape(len(x), -1, self.dim)
        return torch.cat([front.unflatten(0, (len(x), -1)).mean(1), out], dim=1) if first else out

    def _allowed(self, grid: tuple[int, int], side: tuple[int, int], shift: tuple[int, ...], device: torch.device) -> Tensor:
        """Return which tokens of each window see each other, bool [windows, r * r, r * r]."""
        parts = []
        for length, r, moved in zip(grid, side, shift, strict=True):
            padded = length + -length % r
            place = torch.arange(padded, device=device).roll(-moved)
            region = (place < moved).long()  # those that came round from the other border
            parts.append((region, place < length))
        region = parts[0][0][:, None] * 2 + parts[1][0]
        real = parts[0][1][:, None] & parts[1][1]
        fold = "(i r) (j s) -> (i j) (r s)"
        region, real = (rearrange(part, fold, r=side[0], s=side[1]) for part in (region, real))
        same = region[:, :, None] == region[:, None, :]
        return same if self.config.pad == "zero" else same & real[:, None, :]
