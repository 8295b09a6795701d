"""Wrappers around mixers: they keep the protocol of what they wrap.

Source: the token shift of RWKV (Peng et al. 2023, arXiv 2305.13048), as the public re-implementation of VIM has it.
Letters: b batch, n tokens, d width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genkit.blocks.caches import KVCache, ShiftCache
from genkit.blocks.caps import Cache, Caps, Context, MixerConfig, TokenMixer, option, refusal
from genkit.blocks.layout import Layout


@dataclass(frozen=True)
class TokenShiftConfig(MixerConfig):
    """Options of a token shift.

    Args:
        inner: of the mixer behind it, causal.
        forgetful: as the released sampler has it: with a cache, a token that comes alone sees zeros in place of the one before it.
    """

    inner: MixerConfig = option(None, MixerConfig)  # noqa: RUF009
    forgetful: bool = option(False, bool)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inner.caps.causal:
            raise ValueError(f"token_shift: the token before comes first, so the mixer must be causal, got {self.inner}.")

    @property
    def caps(self) -> Caps:
        """Those of the mixer, but for the order of tokens."""
        return dataclasses.replace(self.inner.caps, set_op=False)

    def build(self, dim: int, *, heads: int | None = None, context_dim: int | None = None) -> TokenShift:
        """Build the module for width `dim`."""
        inner = self.inner.build(dim, heads=heads, context_dim=context_dim)
        if not isinstance(inner, TokenMixer):
            raise ValueError(f"token_shift goes around a token mixer, got {self.inner}.")
        return TokenShift(dim, self, inner)

    def __str__(self) -> str:
        return f"token_shift({self.inner})"


class TokenShift(TokenMixer):
    """inner(m x_i + (1 - m) x_{i-1}), x_{-1} = 0, with a learned m per channel.

    Args:
        dim: d.
        config: the options.
        inner: the mixer.
    """

    def __init__(self, dim: int, config: TokenShiftConfig, inner: TokenMixer) -> None:
        super().__init__()
        self.config: TokenShiftConfig = config
        self.inner = inner
        self.time_mix = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Let m rise from 0 to 1 over the channels."""
        self.time_mix.copy_(torch.linspace(0, 1, len(self.time_mix)))

    def forward(
        self,
        x: Tensor,
        *,
        layout: Layout | None = None,
        context: Context | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Mix tokens x [b, n, d]; the other arguments go to the mixer.

        Raises:
            TypeError: for a cache of another mixer.
        """
        if cache is not None and not isinstance(cache, ShiftCache):
            raise TypeError(f"token_shift: cache must be a ShiftCache from new_cache(), got {type(cache).__name__}.")
        before = torch.zeros_like(x[:, :1]) if cache is None or self.config.forgetful else cache.previous
        mixed = torch.lerp(torch.cat([before, x[:, :-1]], dim=1), x, self.time_mix.to(x.dtype))
        if cache is not None:
            cache.previous = x[:, -1:]
        return self.inner(mixed, layout=layout, context=context, mask=mask, cache=None if cache is None else cache.inner)

    def new_cache(self, batch: int, max_len: int, *, device: torch.device | str, dtype: torch.dtype) -> ShiftCache:
        """Return an empty cache: that of the mixer, and the last token."""
        inner = self.inner.new_cache(batch, max_len, device=device, dtype=dtype)
        if not isinstance(inner, KVCache):
            raise refusal(self.config, "cache")
        return ShiftCache(inner, torch.zeros(batch, 1, len(self.time_mix), device=device, dtype=dtype))
