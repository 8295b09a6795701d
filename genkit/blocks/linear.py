"""Linear attention: positive features of queries and keys in place of the softmax, so that keys and values are summed once.

Sources: Katharopoulos et al., Transformers are RNNs, 2020, arXiv 2006.16236 (elu + 1); Choromanski et al., Rethinking Attention with
Performers, 2021, arXiv 2009.14794 (ReLU features).
Letters: b batch, n tokens, d width, hd head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.caches import StateCache
from genkit.blocks.caps import Cache, Caps, Context, MixerConfig, TokenMixer, option, refuse_arguments, register
from genkit.blocks.hash_attention import HashAttention
from genkit.blocks.heads import head_count, join_heads, split_heads
from genkit.blocks.layout import Layout
from genkit.blocks.scan import scan
from genkit.checks import check_shape

RELU_FLOOR = 1e-3


def _relu(x: Tensor) -> Tensor:
    return F.relu(x) + RELU_FLOOR


def _elu1(x: Tensor) -> Tensor:
    return F.elu(x) + 1


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {"relu": _relu, "elu1": _elu1}


@register("linear")
@dataclass(frozen=True)
class LinearConfig(MixerConfig):
    """Options of linear attention.

    Args:
        feature: "relu" (plus a small floor, so that no sum is 0), "elu1" (elu + 1), or "hash": binary codes of shared queries and keys, see
            `HashAttention`, which its `fit_hash` fits.
        heads: number of heads; the model's default if None.
        causal: token i sees tokens up to i.
        chunk: tokens of a chunk of the causal form, for speed only.
        qkv_bias: biases of the query, key and value projections.
        out_bias: bias of the output projection.
        bits, anchors: of "hash".
        compat: "hash" as released: a token's own value where the kernel needs the sum of all.
    """

    feature: str = option("relu", *FEATURES, "hash")
    heads: int | None = option(None, int, None)
    causal: bool = option(False, bool)
    chunk: int = option(64, int)
    qkv_bias: bool = option(True, bool)
    out_bias: bool = option(True, bool)
    bits: int = option(16, int)
    anchors: int = option(25, int)
    compat: bool = option(False, bool)

    offers: ClassVar[Mapping[str, str]] = {"cache": "linear(causal=True)", "mask": "linear"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 1:
            raise ValueError(f"linear: chunk must be positive, got {self.chunk}.")
        if min(self.bits, self.anchors) < 1 or (self.feature == "hash" and self.causal):
            raise ValueError(f"linear: bits and anchors must be positive, and 'hash' is never causal, got {self.bits} and {self.anchors}.")

    @property
    def caps(self) -> Caps:
        """A set operation, or a causal one that goes on from its sums."""
        return Caps(set_op=not self.causal, causal=self.causal, cache=self.causal, mask=self.feature != "hash")

    def build(self, dim: int, *, heads: int | None = None, context_dim: int | None = None) -> LinearAttention | HashAttention:
        """Build the module for width `dim`."""
        chosen = head_count("linear", self.heads, heads, dim)
        return HashAttention(dim, self, chosen) if self.feature == "hash" else LinearAttention(dim, self, chosen)


class LinearAttention(TokenMixer):
    """f(q) (f(k)^T v) / (f(q) sum f(k)), in float32, with projections `q`, `kv` (rows k then v, heads contiguous) and `proj`.

    Args:
        dim: d, a multiple of heads.
        config: the options.
        heads: number of heads.
    """

    def __init__(self, dim: int, config: LinearConfig, heads: int) -> None:
        super().__init__()
        self.config: LinearConfig = config
        self.heads = heads
        self.feature = FEATURES[config.feature]
        self.q = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=config.qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=config.out_bias)

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
            mask: bool [b, n], True = attend to this token; a query without any gives the bias of the output.
            cache: from `new_cache`, with causal=True; the tokens x follow those it has seen.

        Returns:
            [b, n, d].

        Raises:
            ValueError: for arguments that are not taken, or a mask of another shape.
        """
        refuse_arguments(self.config, context=context, cache=None if self.config.causal else cache)
        sizes = check_shape(x, "LinearAttention: x", "b n d", d=self.q.in_features)
        if cache is not None and not isinstance(cache, StateCache):
            raise TypeError(f"linear: cache must be a StateCache from new_cache(), got {type(cache).__name__}.")
        q = self.feature(split_heads(self.q(x), self.heads).float())
        k, v = (split_heads(part, self.heads).float() for part in self.kv(x).chunk(2, dim=-1))
        k = self.feature(k)
        if mask is not None:
            k = k * _key_mask(mask, sizes["b"], sizes["n"])[:, None, :, None]
        with_ones = F.pad(v, (0, 1), value=1.0)  # the last column sums the keys
        if self.config.causal:
            no_decay = torch.zeros(self.heads, device=x.device)
            sums, state = scan(q, k, with_ones, no_decay, chunk=self.config.chunk, state=None if cache is None else cache["state"])
            if cache is not None:
                cache["state"] = state
        else:
            sums = q @ (k.transpose(-2, -1) @ with_ones)
        weight = sums[..., -1:]
        out = sums[..., :-1] / torch.where(weight == 0, 1.0, weight)
        return self.proj(join_heads(out).to(x.dtype))

    def new_cache(self, batch: int, max_len: int, *, device: torch.device | str, dtype: torch.dtype) -> StateCache:
        """Return empty sums, float32 whatever the dtype of the tokens, for any number of tokens."""
        refuse_arguments(self.config, cache=None if self.config.causal else max_len)
        width = self.q.in_features // self.heads
        return StateCache(state=torch.zeros(batch, self.heads, width, width + 1, device=device))


def _key_mask(mask: Tensor, b: int, n: int) -> Tensor:
    """Return a mask [b|1, n] of keys, checked."""
    if mask.dtype != torch.bool:
        raise TypeError(f"attention mask must be bool (True = attend), got {mask.dtype}; convert it with `mask.bool()`.")
    if mask.ndim != 2 or mask.shape[0] not in (1, b) or mask.shape[1] != n:
        raise ValueError(f"linear: mask must be [{b}, {n}] (keys only: no pair has a weight of its own), got {list(mask.shape)}.")
    return mask
