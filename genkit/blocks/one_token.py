"""One token at a time through a causal block: its numbers without its modules' bookkeeping.

Letters: b sequences, d width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from genkit.blocks.attend import attend
from genkit.blocks.attention import Attention
from genkit.blocks.branch import Block, Branch
from genkit.blocks.caches import KVCache
from genkit.blocks.fast_linear import fast_linear
from genkit.blocks.mlp import MLP
from genkit.blocks.wrappers import TokenShift

Layer = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class StepLayers:
    """The weights of a block of attention and MLP, in the order of their use; q and [k; v] are two products.

    Args:
        q, kv, proj, fc1, fc2: weight and bias.
        norm1, norm2: weight and bias.
        act: between the MLP's layers.
        heads: of the attention.
        scale: of its logits.
        eps: of the norms.
        time_mix: [d], of a token shift around the attention; None without.
    """

    q: Layer
    kv: Layer
    proj: Layer
    norm1: Layer
    fc1: Layer
    fc2: Layer
    norm2: Layer
    act: Callable[[Tensor], Tensor]
    heads: int
    scale: float
    eps: float
    time_mix: Tensor | None = None

    @classmethod
    def of(cls, block: Block) -> StepLayers:
        """Take the weights of a block of plain causal attention and MLP; no copies."""
        first, second = (cast(Branch, branch) for branch in block.branches)
        shift = first.f if isinstance(first.f, TokenShift) else None
        attention, mlp = cast(Attention, first.f if shift is None else shift.inner), cast(MLP, second.f)
        return cls(
            q=layer(attention.q), kv=layer(attention.kv), proj=layer(attention.proj), norm1=layer(first.norm), fc1=layer(mlp.fc1),
            fc2=layer(mlp.fc2), norm2=layer(second.norm), act=mlp.act, heads=attention.heads, scale=attention.scale,
            eps=cast(Any, first.norm).eps, time_mix=None if shift is None else shift.time_mix.detach(),
        )  # fmt: skip

    def attended(self, x: Tensor, cache: KVCache) -> Tensor:
        """Return what tokens x [b, 1, d] see of themselves and of those before, [b, 1, d]; the cache grows by them."""
        q = fast_linear(x, *self.q).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = fast_linear(x, *self.kv).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # b 1 2 h hd -> 2 b h 1 hd
        k, v = cache.append(k, v)
        return fast_linear(attend(q, k, v, scale=self.scale).transpose(1, 2).flatten(2), *self.proj)

    def fed(self, x: Tensor) -> Tensor:
        """Return the MLP's part of tokens x [b, 1, d]."""
        return fast_linear(self.act(fast_linear(x, *self.fc1)), *self.fc2)

    def normed(self, x: Tensor, norm: Layer) -> Tensor:
        """Return tokens behind one of the two norms."""
        return F.layer_norm(x, x.shape[-1:], *norm, self.eps)


def layer(module: Any) -> Layer:
    """Return weight and bias of a layer or norm, without gradients."""
    return module.weight.detach(), None if module.bias is None else module.bias.detach()
