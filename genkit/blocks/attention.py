"""Softmax attention as a token mixer: self-attention, cross-attention, or both in one softmax.

Letters: b batch, n tokens, m context tokens, d width, d_c context width, hd head width of queries and keys, vd of values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.attend import attend
from genkit.blocks.bias_table import KINDS, BiasTable
from genkit.blocks.caches import KVCache
from genkit.blocks.caps import Cache, Caps, Context, MixerConfig, TokenMixer, option, refusal, register
from genkit.blocks.embeddings import rotary, rotate
from genkit.blocks.grid_mixer import grid_sides
from genkit.blocks.heads import join_heads, split_heads
from genkit.blocks.layout import Layout
from genkit.blocks.norms import build_norm
from genkit.checks import check_shape

ROPE_AXES = {"none": 0, "1d": 1, "2d": 2}


@register("attention")
@dataclass(frozen=True)
class AttentionConfig(MixerConfig):
    """Options of attention.

    Args:
        heads: query heads; the model's default if None.
        kv_heads: key/value heads, a divisor of `heads`; as many as `heads` if None.
        key_dim: hd; d / heads if None. It need not divide d.
        value_ratio: vd / hd.
        qkv_bias: biases of the query, key and value projections.
        out_bias: bias of the output projection.
        out_proj: whether there is an output projection; without one heads * vd must be d.
        qk_norm: norm of each query and key head before the rotation.
        rope: rotary position of queries and keys, by running index (1d) or grid coordinates (2d), or `layout.pos`.
        pos_bias: a learned number added to the logits by head and distance on the grid, without sign ("table_abs") or with ("table_rel").
        table: (rows, columns) of the largest grid of `pos_bias`.
        local_v_conv: side of a depthwise filter on the values, the same for all heads, whose result is added to the heads' (0 = none); it
            tells where a token lies on grids of any size.
        scale: logits times hd^-0.5 ("hd") or d^-0.5 ("dim").
        keys: the tokens themselves, the context, or both in one softmax (context first).
        context_kv: the context has its own key/value projection, or shares the tokens' one.
        causal: token i sees tokens up to i (and the whole context).
    """

    heads: int | None = option(None, int, None)
    kv_heads: int | None = option(None, int, None)
    key_dim: int | None = option(None, int, None)
    value_ratio: float = option(1.0, float, int)
    qkv_bias: bool = option(True, bool)
    out_bias: bool = option(True, bool)
    out_proj: bool = option(True, bool)
    qk_norm: str = option("none", "none", "ln", "rms")
    rope: str = option("none", *ROPE_AXES)
    pos_bias: str = option("none", "none", *KINDS)
    table: tuple[int, int] | None = option(None, tuple, None)
    local_v_conv: int = option(0, int)
    scale: str = option("hd", "hd", "dim")
    keys: str = option("self", "self", "context", "both")
    context_kv: str = option("own", "own", "shared")
    causal: bool = option(False, bool)

    offers: ClassVar[Mapping[str, str]] = {
        "context": "attention(keys='context' or 'both')",
        "cache": "attention(causal=True)",
        "mask": "attention",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heads", "kv_heads", "key_dim", "value_ratio"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"attention: {name} must be positive, got {value}.")
        if self.keys == "context" and self.causal:
            raise ValueError("attention: causal=True orders a token's own sequence; it needs keys='self' or 'both', got keys='context'.")
        if self.context_kv == "shared" and self.keys != "both":
            raise ValueError(f"attention: context_kv='shared' needs keys='both', got keys={self.keys!r}.")
        if (self.pos_bias == "none") != (self.table is None) or (self.table is not None and (len(self.table) != 2 or min(self.table) < 1)):
            raise ValueError(f"attention: pos_bias and table=(rows, columns) go together, got {self.pos_bias!r} and {self.table}.")
        if self.pos_bias != "none" and (self.keys != "self" or self.causal):
            raise ValueError("attention: pos_bias needs keys='self' and causal=False, whose pairs all lie on the grid.")
        if self.local_v_conv and (self.local_v_conv < 0 or self.local_v_conv % 2 == 0):
            raise ValueError(f"attention: local_v_conv must be 0 or odd, got {self.local_v_conv}.")
        if self.local_v_conv and (self.keys != "self" or self.causal or self.kv_heads is not None):
            raise ValueError("attention: local_v_conv needs keys='self', causal=False and as many kv_heads as heads.")
        if self.rope != "none" and self.keys != "self":
            raise ValueError(f"attention: rope needs keys='self' (context tokens have no positions), got keys={self.keys!r}.")

    @property
    def caps(self) -> Caps:
        """Cross-attention treats each token alone, so it is causal and needs no cache."""
        alone = self.keys == "context"
        ordered = self.causal or alone
        placed = self.pos_bias != "none" or self.local_v_conv > 0
        return Caps(
            set_op=not self.causal and not placed, causal=ordered, cache=ordered, grid=placed, context=self.keys != "self", mask=True
        )

    def build(self, dim: int, *, heads: int | None = None, context_dim: int | None = None) -> Attention:
        """Build the module for width `dim`; the context is `context_dim` wide, or `dim` if None."""
        chosen = heads if self.heads is None else self.heads
        if chosen is None:
            raise ValueError("attention: the number of heads is open; give heads in the stack string or to build().")
        return Attention(dim, self, chosen, dim if context_dim is None else context_dim)


class Attention(TokenMixer):
    """softmax(q k^T scale) v with projections `q`, `kv` (rows k then v, heads contiguous), `context_kv` and `proj`.

    Args:
        dim: d.
        config: the options.
        heads: query heads.
        context_dim: d_c.
    """

    def __init__(self, dim: int, config: AttentionConfig, heads: int, context_dim: int) -> None:
        super().__init__()
        self.config: AttentionConfig = config
        self.heads = heads
        self.kv_heads = heads if config.kv_heads is None else config.kv_heads
        self.key_dim = dim // heads if config.key_dim is None else config.key_dim
        self.value_dim = round(self.key_dim * config.value_ratio)
        self._check_sizes(dim, context_dim)
        self.context_dim = context_dim
        self.scale = (self.key_dim if config.scale == "hd" else dim) ** -0.5
        rows = self.kv_heads * (self.key_dim + self.value_dim)
        self.q = nn.Linear(dim, heads * self.key_dim, bias=config.qkv_bias)
        self.kv = nn.Linear(dim, rows, bias=config.qkv_bias) if config.keys != "context" else None
        own_context = config.keys != "self" and config.context_kv == "own"
        self.context_kv = nn.Linear(context_dim, rows, bias=config.qkv_bias) if own_context else None
        self.q_norm = build_norm(config.qk_norm, self.key_dim, eps=1e-6)
        self.k_norm = build_norm(config.qk_norm, self.key_dim, eps=1e-6)
        self.bias_table = BiasTable(config.pos_bias, heads, config.table) if config.table is not None else None
        k = config.local_v_conv
        self.local_v = nn.Conv2d(self.value_dim, self.value_dim, k, padding=k // 2, groups=self.value_dim) if k else None
        self.proj = nn.Linear(heads * self.value_dim, dim, bias=config.out_bias) if config.out_proj else nn.Identity()

    def _check_sizes(self, dim: int, context_dim: int) -> None:
        """Check the relations between widths and heads."""
        config, axes = self.config, ROPE_AXES[self.config.rope]
        if config.key_dim is None and dim % self.heads:
            raise ValueError(f"attention: dim must be divisible by heads unless key_dim is given, got dim={dim}, heads={self.heads}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"attention: kv_heads must divide heads, got heads={self.heads}, kv_heads={self.kv_heads}.")
        if abs(self.key_dim * config.value_ratio - self.value_dim) > 1e-6 or self.value_dim < 1:
            raise ValueError(f"attention: key_dim * value_ratio must be whole, got {self.key_dim} * {config.value_ratio}.")
        if not config.out_proj and self.heads * self.value_dim != dim:
            raise ValueError(f"attention: out_proj=False needs heads * value width = dim, got {self.heads} * {self.value_dim}, dim={dim}.")
        if axes and self.key_dim % (2 * axes):
            raise ValueError(f"attention: rope={config.rope!r} needs key_dim divisible by {2 * axes}, got {self.key_dim}.")
        if config.context_kv == "shared" and context_dim != dim:
            raise ValueError(f"attention: context_kv='shared' needs context_dim = dim, got {context_dim} and {dim}.")

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
            layout: positions for `rope`; the grid for `pos_bias` (h, w) and `local_v_conv`.
            context: [b, m, d_c], m may be 0, or (keys, values) from `project_context`. With keys="both" it may be left out.
            mask: bool, True = attend, [b, nk] or [b, heads|1, n, nk]; nk = context + cached + own tokens.
            cache: from `new_cache`; the tokens x follow those it holds.

        Returns:
            [b, n, d].

        Raises:
            ValueError: for an argument that these options cannot honour.
        """
        check_shape(x, "Attention: x", "b n d", d=self.q.in_features)
        if context is not None and self.config.keys == "self":
            raise refusal(self.config, "context")
        if cache is not None and not isinstance(cache, KVCache):
            raise TypeError(f"attention: cache must be a KVCache from new_cache(), got {type(cache).__name__}.")
        if cache is not None and not self.config.causal:
            raise refusal(self.config, "cache")
        start = 0 if cache is None else cache.length
        q = self.q_norm(split_heads(self.q(x), self.heads))
        if self.config.rope != "none":
            q = self._rotate(q, layout, start)
        k, v = self._keys(x, start=start, layout=layout, context=context, cache=cache)
        bias = self._bias(layout, x.shape[1])
        out = attend(q, k, v, bias=bias, mask=mask, causal=self.config.causal, scale=self.scale)
        return self.proj(join_heads(out if self.local_v is None else out + self._local(v, layout)))

    def _keys(
        self, x: Tensor, *, start: int, layout: Layout | None, context: Context | None, cache: KVCache | None
    ) -> tuple[Tensor, Tensor]:
        """Return all keys and values: context, cached, own."""
        pairs: list[tuple[Tensor, Tensor]] = []
        if self.config.keys != "self" and context is not None:
            pairs.append(context if isinstance(context, tuple) else self.project_context(context))
        if self.kv is not None:
            k, v = self._key_value(self.kv(x))
            if self.config.rope != "none":
                k = self._rotate(k, layout, start)
            pairs.append((k, v) if cache is None else cache.append(k, v))
        if not pairs:
            raise ValueError(f"{self.config}: context is missing; give tokens [b, m, {self.context_dim}] (m may be 0).")
        if len(pairs) == 1:
            return pairs[0]
        return torch.cat([k for k, _ in pairs], dim=2), torch.cat([v for _, v in pairs], dim=2)

    def _bias(self, layout: Layout | None, tokens: int) -> Tensor | None:
        """Return what is added to the logits [1, heads, n, n], None without `pos_bias`."""
        if self.bias_table is None:
            return None
        frames, h, w = grid_sides(self.config, layout, tokens)
        if frames > 1:
            raise ValueError(f"{self.config}: pos_bias knows rows and columns, got a grid of {frames} frames.")
        return self.bias_table((h, w), 0 if layout is None else layout.prefix)

    def _local(self, v: Tensor, layout: Layout | None) -> Tensor:
        """Return the filtered values [b, heads, n, vd], 0 for the tokens of a prefix."""
        assert self.local_v is not None
        f, h, w = grid_sides(self.config, layout, v.shape[2])
        first = v.shape[2] - f * h * w
        pixels = v[:, :, first:].reshape(-1, h, w, v.shape[3]).permute(0, 3, 1, 2)
        filtered = self.local_v(pixels).permute(0, 2, 3, 1).reshape(*v.shape[:2], -1, v.shape[3])
        return F.pad(filtered, (0, 0, first, 0))

    def project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys [b, kv_heads, m, hd] and values [b, kv_heads, m, vd] of context tokens [b, m, d_c]."""
        if self.config.keys == "self":
            raise refusal(self.config, "context")
        check_shape(context, "Attention: context", "b m d", d=self.context_dim)
        projection = self.kv if self.context_kv is None else self.context_kv
        assert projection is not None, "keys='context' always has its own projection"
        return self._key_value(projection(context))

    def new_cache(self, batch: int, max_len: int, *, device: torch.device | str, dtype: torch.dtype) -> KVCache | None:
        """Return an empty KVCache, or None for pure cross-attention, which has nothing to remember."""
        if self.config.keys == "context":
            return None
        if not self.config.causal:
            raise refusal(self.config, "cache")
        return KVCache(batch, self.kv_heads, max_len, self.key_dim, self.value_dim, device=device, dtype=dtype)

    def _key_value(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Split projected rows [k; v] into normed key heads and value heads."""
        k, v = projected.split([self.kv_heads * self.key_dim, self.kv_heads * self.value_dim], dim=-1)
        return self.k_norm(split_heads(k, self.kv_heads)), split_heads(v, self.kv_heads)

    def _rotate(self, heads: Tensor, layout: Layout | None, start: int) -> Tensor:
        """Rotate heads [b, heads, n, hd] of tokens that begin at `start`."""
        axes, n, width = ROPE_AXES[self.config.rope], heads.shape[2], self.key_dim
        layout = Layout() if layout is None else layout
        key = ("rotary", axes, n, width, start, heads.device)
        cos, sin = layout.memo(key, lambda: rotary(layout.positions(axes, n, heads.device, start), width))
        return rotate(heads, cos, sin, axes)
