"""Retention: a linear recurrence with decay as a token mixer, of constant memory when it goes token by token.

Sources: Sun et al., Retentive Network, 2023, arXiv 2307.08621; Hatamizadeh et al., ViR: Vision Retention Networks, 2023, arXiv 2310.19731;
decay from the data as in Yang et al., Gated Linear Attention, 2024, arXiv 2312.06635.
Letters: b batch, n tokens, d width, hd head width, h w grid rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.caches import StateCache
from genkit.blocks.caps import Cache, Caps, Context, MixerConfig, TokenMixer, option, refuse_arguments, register
from genkit.blocks.grid_mixer import grid_sides
from genkit.blocks.heads import head_count, join_heads, split_heads
from genkit.blocks.layout import Layout
from genkit.blocks.norms import build_norm
from genkit.blocks.scan import scan
from genkit.checks import check_shape

DECAY_OF_DATA = 1 / 16


def decays(heads: int, device: torch.device | str | None = None) -> Tensor:
    """Return the decay of each head [heads] float32: 1 - exp(.), evenly from log 1/32 to log 1/512."""
    return 1 - torch.linspace(math.log(1 / 32), math.log(1 / 512), heads, device=device).exp()


@register("retention")
@dataclass(frozen=True)
class RetentionConfig(MixerConfig):
    """Options of retention.

    Args:
        decay: one number per head ("fixed"), the same learned ("learned"), or made from each token ("data").
        heads: number of heads; the model's default if None.
        scan: "forward"; "bidir": weights fall with the distance in both directions; "cross": so along the rows of a grid and along its
            columns, summed.
        chunk: tokens of a chunk, for speed only.
        out_norm: norm of each head's result: "none", "ln" or "rms", without weights.
        gate: the result times silu of a linear map of the tokens.
        qkv_bias: biases of the query, key and value projections.
        out_bias: bias of the output projection.
        softmax: as ViR's upload trains: a softmax over all tokens of the decayed products, where later tokens keep the logit 0.
    """

    decay: str = option("fixed", "fixed", "learned", "data")
    heads: int | None = option(None, int, None)
    scan: str = option("forward", "forward", "bidir", "cross")
    chunk: int = option(64, int)
    out_norm: str = option("none", "none", "ln", "rms")
    gate: bool = option(False, bool)
    qkv_bias: bool = option(True, bool)
    out_bias: bool = option(True, bool)
    softmax: bool = option(False, bool)

    offers: ClassVar[Mapping[str, str]] = {"cache": "retention"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 1:
            raise ValueError(f"retention: chunk must be positive, got {self.chunk}.")
        if self.softmax and (self.scan, self.decay) != ("forward", "fixed"):
            raise ValueError("retention: softmax=True is ViR's form; it needs scan='forward' and decay='fixed'.")

    @property
    def caps(self) -> Caps:
        """A forward scan is causal and goes on from its state."""
        ordered = self.scan == "forward" and not self.softmax
        return Caps(causal=ordered, cache=ordered, grid=self.scan == "cross")

    def build(self, dim: int, *, heads: int | None = None, context_dim: int | None = None) -> Retention:
        """Build the module for width `dim`."""
        return Retention(dim, self, head_count("retention", self.heads, heads, dim))


class Retention(TokenMixer):
    """y_t = q_t S_t hd^-0.5, S_t = g S_{t-1} + k_t v_t^T, with projections `q`, `kv` (rows k then v, heads contiguous) and `proj`.

    Args:
        dim: d, a multiple of heads.
        config: the options.
        heads: number of heads.
    """

    def __init__(self, dim: int, config: RetentionConfig, heads: int) -> None:
        super().__init__()
        self.config: RetentionConfig = config
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=config.qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=config.out_bias)
        self.gate = nn.Linear(dim, dim) if config.gate else None
        self.decay = nn.Linear(dim, heads) if config.decay == "data" else None
        self.decay_logit = nn.Parameter(decays(heads).logit()) if config.decay == "learned" else None
        self.out_norm = build_norm("none" if config.out_norm == "none" else f"{config.out_norm}_noaffine", dim // heads, eps=1e-6)

    def forward(
        self,
        x: Tensor,
        *,
        layout: Layout | None = None,
        context: Context | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Mix.

        Args:
            x: [b, n, d].
            layout: with a grid (h, w) or (f, h, w) for scan="cross"; its prefix comes first in both orders.
            context, mask: not taken.
            cache: from `new_cache`; the tokens x follow those it has seen.

        Returns:
            [b, n, d].

        Raises:
            ValueError: for arguments that are not taken, or a grid that is missing.
        """
        refuse_arguments(self.config, context=context, mask=mask, cache=None if self.config.caps.cache else cache)
        check_shape(x, "Retention: x", "b n d", d=self.q.in_features)
        if cache is not None and not isinstance(cache, StateCache):
            raise TypeError(f"retention: cache must be a StateCache from new_cache(), got {type(cache).__name__}.")
        q = split_heads(self.q(x), self.heads) * (x.shape[-1] // self.heads) ** -0.5
        k, v = (split_heads(part, self.heads) for part in self.kv(x).chunk(2, dim=-1))
        if self.config.softmax:
            y = _softmax_form(q, k, v, decays(self.heads, x.device).log())
        elif self.config.scan == "forward":
            y, state = scan(q, k, v, self._log_decay(x), chunk=self.config.chunk, state=None if cache is None else cache["state"])
            if cache is not None:
                cache["state"] = state
        else:
            y = self._both_ways(q, k, v, self._log_decay(x))
            if self.config.scan == "cross":
                y = y + self._along_columns(q, k, v, self._log_decay(x), layout)
        y = join_heads(self.out_norm(y.to(x.dtype)))
        return self.proj(y if self.gate is None else y * F.silu(self.gate(x)))

    def _log_decay(self, x: Tensor) -> Tensor:
        """Return log g, [heads] or [b, heads, n] float32."""
        if self.decay is not None:
            return F.logsigmoid(self.decay(x).float()).transpose(1, 2) * DECAY_OF_DATA
        return decays(self.heads, x.device).log() if self.decay_logit is None else F.logsigmoid(self.decay_logit.float())

    def _both_ways(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        """Scan from either end; a token counts itself once."""
        there, _ = scan(q, k, v, log_decay, chunk=self.config.chunk)
        # from the end, the decay between two tokens must be that of the way there
        back_decay = log_decay if log_decay.ndim == 1 else F.pad(log_decay[..., 1:], (0, 1)).flip(-1)
        back, _ = scan(q.flip(2), k.flip(2), v.flip(2), back_decay, chunk=self.config.chunk)
        itself = (q.float() * k.float()).sum(-1, keepdim=True) * v.float()
        return there + back.flip(2) - itself

    def _along_columns(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, layout: Layout | None) -> Tensor:
        """Scan both ways with the tokens of each frame in the order of its columns."""
        f, h, w = grid_sides(self.config, layout, q.shape[2])
        places = torch.arange(q.shape[2], device=q.device)
        first = q.shape[2] - f * h * w
        order = torch.cat([places[:first], places[first:].view(f, h, w).transpose(1, 2).flatten()])
        back = order.argsort()
        decay = log_decay if log_decay.ndim == 1 else log_decay[..., order]
        return self._both_ways(q[:, :, order], k[:, :, order], v[:, :, order], decay)[:, :, back]

    def new_cache(self, batch: int, max_len: int, *, device: torch.device | str, dtype: torch.dtype) -> StateCache:
        """Return an empty state, float32 whatever the dtype of the tokens, for any number of tokens."""
        refuse_arguments(self.config, cache=None if self.config.caps.cache else max_len)
        width = self.q.in_features // self.heads
        return StateCache(state=torch.zeros(batch, self.heads, width, width, device=device))


def _softmax_form(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Softmax over all tokens of (q k^T) D, D_ij = g^(i-j) up to i and 0 behind."""
    place = torch.arange(q.shape[2], device=q.device)
    distance = place[:, None] - place
    decay = torch.where(distance >= 0, (distance * log_decay.view(-1, 1, 1)).exp(), 0.0)
    return ((q.float() @ k.float().transpose(-2, -1)) * decay).softmax(-1) @ v.float()
