"""One id at a time through a mesh transformer: its numbers without its modules' bookkeeping.

Letters: b sequences, d width, k ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from genkit.blocks.attend import attend
from genkit.blocks.attention import Attention
from genkit.blocks.branch import Block, Branch
from genkit.blocks.caches import KVCache
from genkit.blocks.fast_linear import fast_linear
from genkit.blocks.mlp import MLP
from genkit.generators.mesh_transformer import OFFSET, MeshCaches, MeshTransformer

Layer = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class StepLayers:
    """The weights of one block, in the order of their use; q and [k; v] are two products.

    Args:
        q, kv, proj, fc1, fc2: weight and bias.
        norm1, norm2: weight and bias.
        heads: of the attention.
        eps: of the norms.
    """

    q: Layer
    kv: Layer
    proj: Layer
    norm1: Layer
    fc1: Layer
    fc2: Layer
    norm2: Layer
    heads: int
    eps: float

    @classmethod
    def of(cls, block: Block) -> StepLayers:
        """Take the weights of a post-norm block of attention and MLP; no copies."""
        first, second = (cast(Branch, branch) for branch in block.branches)
        attention, mlp = cast(Attention, first.f), cast(MLP, second.f)
        return cls(
            q=_layer(attention.q), kv=_layer(attention.kv), proj=_layer(attention.proj), norm1=_layer(first.norm), fc1=_layer(mlp.fc1),
            fc2=_layer(mlp.fc2), norm2=_layer(second.norm), heads=attention.heads, eps=cast(Any, first.norm).eps,
        )  # fmt: skip


def _layer(module: Any) -> Layer:
    return module.weight.detach(), None if module.bias is None else module.bias.detach()


class MeshStepper:
    """Evaluates one id per sequence.

    Args:
        transformer: its weights are used as they are, so changes of them are seen; moving it to another device or type is not.
    """

    def __init__(self, transformer: MeshTransformer) -> None:
        self.transformer = transformer
        self.layers = [StepLayers.of(cast(Block, block)) for block in transformer.blocks]

    @torch.no_grad()
    def __call__(self, ids: Tensor, slots: Tensor, place: int, cache: MeshCaches) -> Tensor:
        """Return logits [b, k] of the id after ids [b, 1], which stand at a place and have slots [b, 1]; the caches grow by them.

        Raises:
            ValueError: if the positions do not suffice.
        """
        net = self.transformer
        if place + OFFSET >= len(net.position_embed.weight):
            raise ValueError(f"MeshStepper: place {place} is asked for, the model has {len(net.position_embed.weight) - OFFSET}.")
        x = (
            net.embed(ids) + net.slot_embed.weight[slots] + net.segment_embed.weight[1] + net.position_embed.weight[place + OFFSET]
        ).detach()
        width = x.shape[-1]
        for own, block in zip(self.layers, cache, strict=True):
            q = fast_linear(x, *own.q).unflatten(-1, (own.heads, -1)).transpose(1, 2)
            k, v = fast_linear(x, *own.kv).unflatten(-1, (2, own.heads, -1)).permute(2, 0, 3, 1, 4)  # b 1 2 h hd -> 2 b h 1 hd
            k, v = cast(KVCache, block[0]).append(k, v)
            mixed = attend(q, k, v).transpose(1, 2).flatten(2)
            x = F.layer_norm(x + fast_linear(mixed, *own.proj), (width,), *own.norm1, own.eps)
            x = F.layer_norm(x + fast_linear(F.relu(fast_linear(x, *own.fc1)), *own.fc2), (width,), *own.norm2, own.eps)
        return fast_linear(x[:, -1], net.lm_head.weight.detach(), None)
