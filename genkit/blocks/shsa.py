"""Attention of one head on a part of the channels; the others pass.

Source: Yun and Ro, SHViT: Single-Head Vision Transformer, CVPR 2024, arXiv 2401.16456.
Letters: b batch, n tokens, d width, p channels that attend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.attend import attend
from genkit.blocks.caches import KVCache
from genkit.blocks.caps import Cache, Caps, Context, MixerConfig, TokenMixer, option, refuse_arguments, register
from genkit.blocks.layout import Layout
from genkit.blocks.norms import build_norm
from genkit.checks import check_shape


@register("shsa")
@dataclass(frozen=True)
class SHSAConfig(MixerConfig):
    """Options of single-head attention.

    Args:
        ratio: p / d; 48 of 224 as published.
        p: channels that attend; wins over `ratio`.
        qk_dim: width of queries and keys.
        norm: of the attending channels: "rms" and "ln" per token; "gn1" over all tokens and channels, as published.
        causal: token i sees tokens up to i.
        bn: batch norms behind both projections, as published, in place of their biases.
    """

    ratio: float = option(0.214, float)
    p: int | None = option(None, int, None)
    qk_dim: int = option(16, int)
    norm: str = option("rms", "rms", "ln", "gn1")
    causal: bool = option(False, bool)
    bn: bool = option(False, bool)

    offers: ClassVar[Mapping[str, str]] = {"cache": "shsa(causal=True)", "mask": "shsa(norm='rms' or 'ln')"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio <= 1 or self.qk_dim < 1 or (self.p is not None and self.p < 1):
            raise ValueError(f"shsa: ratio must lie in (0, 1], p and qk_dim be positive, got {self.ratio}, {self.p}, {self.qk_dim}.")
        if self.norm == "gn1" and self.causal:
            raise ValueError("shsa: norm='gn1' looks at all tokens, so causal=True needs norm='rms' or 'ln'.")

    @property
    def caps(self) -> Caps:
        """What looks at all tokens but the attention, its norm, decides."""
        alone = self.norm != "gn1"
        return Caps(set_op=not self.causal, causal=self.causal, cache=self.causal, mask=alone)

    def build(self, dim: int, *, heads: int | None = None, context_dim: int | None = None) -> SHSA:
        """Build the module for width `dim`; it has one head whatever the model's default."""
        return SHSA(dim, self)


class SHSA(TokenMixer):
    """proj(ReLU([softmax(q k^T qk_dim^-0.5) v, rest])) with q, k, v = `qkv` of the first p channels, normed.

    Args:
        dim: d.
        config: the options.
    """

    def __init__(self, dim: int, config: SHSAConfig) -> None:
        super().__init__()
        self.config: SHSAConfig = config
        self.p = max(round(dim * config.ratio), 1) if config.p is None else config.p
        if self.p > dim:
            raise ValueError(f"shsa: p channels of dim attend, got p={self.p}, dim={dim}.")
        self.norm: nn.Module = nn.GroupNorm(1, self.p) if config.norm == "gn1" else build_norm(config.norm, self.p)
        rows = 2 * config.qk_dim + self.p
        self.qkv = nn.Linear(self.p, rows, bias=not config.bn)
        self.qkv_norm = build_norm("bn" if config.bn else "none", rows)
        self.proj = nn.Linear(dim, dim, bias=not config.bn)
        self.proj_norm = build_norm("bn" if config.bn else "none", dim)

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
            layout: unused; part of the protocol.
            context: not taken.
            mask: bool, True = attend, [b, nk] or [b, 1, n, nk], with norms per token; nk = cached + own tokens.
            cache: from `new_cache`, with causal=True; the tokens x follow those it holds.

        Returns:
            [b, n, d].

        Raises:
            ValueError: for arguments that these options cannot honour.
        """
        config = self.config
        refuse_arguments(
            config, context=context, mask=None if config.caps.mask else mask, cache=None if config.causal else cache
        )  # fmt: skip
        check_shape(x, "SHSA: x", "b n d", d=self.proj.in_features)
        if cache is not None and not isinstance(cache, KVCache):
            raise TypeError(f"shsa: cache must be a KVCache from new_cache(), got {type(cache).__name__}.")
        part, rest = x.split([self.p, x.shape[-1] - self.p], dim=-1)
        normed = self.norm(part.transpose(1, 2)).transpose(1, 2) if config.norm == "gn1" else self.norm(part)
        q, k, v = self.qkv_norm(self.qkv(normed))[:, None].split([config.qk_dim, config.qk_dim, self.p], dim=-1)
        if cache is not None:
            k, v = cache.append(k, v)
        out = attend(q, k, v, mask=mask, causal=config.causal)[:, 0]
        return self.proj_norm(self.proj(F.relu(torch.cat([out, rest], dim=-1))))

    def new_cache(self, batch: int, max_len: int, *, device: torch.device | str, dtype: torch.dtype) -> KVCache:
        """Return an empty KVCache of p + qk_dim numbers per token."""
        refuse_arguments(self.config, cache=None if self.config.causal else max_len)
        return KVCache(batch, 1, max_len, self.config.qk_dim, self.p, device=device, dtype=dtype)
