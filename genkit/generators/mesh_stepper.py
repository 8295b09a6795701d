"""One id at a time through a mesh transformer: its numbers without its modules' bookkeeping.

Letters: b sequences, d width, k ids.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from genkit.blocks.branch import Block
from genkit.blocks.caches import KVCache
from genkit.blocks.fast_linear import fast_linear
from genkit.blocks.one_token import StepLayers
from genkit.generators.mesh_transformer import OFFSET, MeshCaches, MeshTransformer


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
        for own, block in zip(self.layers, cache, strict=True):
            x = own.normed(x + own.attended(x, cast(KVCache, block[0])), own.norm1)
            x = own.normed(x + own.fed(x), own.norm2)
        return fast_linear(x[:, -1], net.lm_head.weight.detach(), None)
