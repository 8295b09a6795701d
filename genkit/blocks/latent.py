"""Attention through few latent tokens: they look at all tokens, think, and the tokens look back with the same weights.

Source: Koner et al., LookupViT, ECCV 2024, arXiv 2407.12753.
Letters: b batch, n tokens, d width, m latents, hd head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.attention import AttentionConfig
from genkit.blocks.branch import Branch
from genkit.blocks.caps import Cache, Caps, Context, MixerConfig, TokenMixer, option, refusal, refuse_arguments, register
from genkit.blocks.conv import to_map
from genkit.blocks.grid_mixer import grid_sides
from genkit.blocks.heads import head_count, join_heads, split_heads
from genkit.blocks.layout import Layout
from genkit.blocks.mlp import MLPConfig
from genkit.checks import check_shape


@register("latent")
@dataclass(frozen=True)
class LatentConfig(MixerConfig):
    """Options of attention through latents.

    Args:
        m: latents; for source="pool" of a frame, the square of their side.
        source: learned, or means over the cells of a coarse grid.
        self_layers: blocks of attention and MLP among the latents.
        ratio: hidden width of those MLPs as a multiple of d.
        heads: number of heads; the model's default if None.
    """

    m: int = option(64, int)
    source: str = option("learned", "learned", "pool")
    self_layers: int = option(1, int)
    ratio: float = option(4.0, float, int)
    heads: int | None = option(None, int, None)

    offers: ClassVar[Mapping[str, str]] = {"mask": "latent"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.m < 1 or self.self_layers < 0:
            raise ValueError(f"latent: m must be positive and self_layers not negative, got {self.m} and {self.self_layers}.")
        if self.source == "pool" and round(self.m**0.5) ** 2 != self.m:
            raise ValueError(f"latent: source='pool' needs a square number of latents such as 64, got m={self.m}.")

    @property
    def caps(self) -> Caps:
        """With learned latents a set operation."""
        learned = self.source == "learned"
        return Caps(set_op=learned, grid=not learned, mask=learned)

    def build(self, dim: int, *, heads: int | None = None, context_dim: int | None = None) -> LatentAttention:
        """Build the module for width `dim`."""
        return LatentAttention(dim, self, head_count("latent", self.heads, heads, dim))


class LatentAttention(TokenMixer):
    """z += out(A v(x)), blocks on z, and proj(A^T v'(z) n / m), A = softmax(q(z) k(x)^T hd^-0.5) over the tokens.

    The factor n / m makes the mean weight that a token gives to the latents 1, whatever their numbers.

    Args:
        dim: d, a multiple of heads.
        config: the options.
        heads: number of heads.
    """

    def __init__(self, dim: int, config: LatentConfig, heads: int) -> None:
        super().__init__()
        self.config: LatentConfig = config
        self.heads = heads
        self.latents = nn.Parameter(torch.randn(config.m, dim)) if config.source == "learned" else None
        self.norm = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        parts = (AttentionConfig(heads=heads), MLPConfig(ratio=config.ratio))
        self.layers = nn.ModuleList(Branch(part.build(dim), dim) for _ in range(config.self_layers) for part in parts)
        self.back_norm = nn.LayerNorm(dim)
        self.back = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        *,
        layout: Layout | None = None,
        context: Context | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: [b, n, d].
            layout: with a grid (h, w) or (f, h, w) for source="pool"; latents start from it and see the prefix too.
            context, cache: not taken.
            mask: bool [b, n], True = attend to this token, with learned latents; at least one per sample.

        Returns:
            [b, n, d].

        Raises:
            ValueError: without a grid where one is needed, or for arguments that are not taken.
        """
        refuse_arguments(self.config, context=context, cache=cache, mask=None if self.config.caps.mask else mask)
        sizes = check_shape(x, "LatentAttention: x", "b n d", d=self.q.in_features)
        z = self._start(x, layout)
        k, v = (split_heads(part, self.heads) for part in self.kv(x).chunk(2, dim=-1))
        weights = self.weights(k, z, mask)
        counts = sizes["n"] if mask is None else mask.sum(-1).view(-1, 1, 1)
        z = z + self.out(join_heads(weights @ v))
        for layer in self.layers:
            z = layer(z)
        back = join_heads(weights.transpose(-2, -1) @ split_heads(self.back(self.back_norm(z)), self.heads))
        return self.proj(back * (counts / z.shape[1]))

    def _start(self, x: Tensor, layout: Layout | None) -> Tensor:
        """Return the latents [b, m, d] before they have seen anything."""
        if self.latents is not None:
            return self.latents.to(x.dtype).expand(len(x), -1, -1)
        grid, side = grid_sides(self.config, layout, x.shape[1]), round(self.config.m**0.5)
        cells = F.adaptive_avg_pool2d(to_map(x[:, 0 if layout is None else layout.prefix :], grid), side)
        return cells.flatten(2).transpose(1, 2).reshape(len(x), -1, x.shape[-1])

    def weights(self, k: Tensor, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return A [b, heads, m, n] of keys [b, heads, n, hd] and latents [b, m, d]: what a latent takes from the tokens, summing to 1."""
        q = split_heads(self.q(self.norm(z)), self.heads)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None], float("-inf"))
        return logits.float().softmax(-1).to(k.dtype)

    def new_cache(self, batch: int, max_len: int, *, device: torch.device | str, dtype: torch.dtype) -> None:
        """Refuse: latents see all tokens."""
        raise refusal(self.config, "cache")
