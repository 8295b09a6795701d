"""Keys and values of tokens that many ENAT blocks attend to, for all blocks at once.

Within one evaluation every encoder block has the same reused tokens as context, and every decoder block the same visible tokens; only the
modulation and the projection differ between blocks. So the norm runs once, and the projections are one batched matrix product: the same
numbers as block by block, with a few kernel launches instead of several per block.

Legend: b batch, p context tokens, d width, hd head width, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from genkit.blocks.attention import Attention
from genkit.blocks.branch import Block, Branch

MAX_BATCHED_TOKENS = 2048
"""Above this many context tokens (b times p) single products fill the device, and all blocks' keys at once would only cost memory."""


@dataclass(frozen=True)
class ContextWeights:
    """Context projections of consecutive blocks, stacked once per generated batch.

    Args:
        weight: [L, 2 d, d].
        bias: [L, 1, 2 d].
    """

    weight: Tensor
    bias: Tensor

    def part(self, start: int, end: int) -> ContextWeights:
        """Return the weights of blocks start .. end - 1, as views."""
        return ContextWeights(self.weight[start:end], self.bias[start:end])


def stack_weights(blocks: Sequence[Block]) -> ContextWeights | None:
    """Stack the context projections of blocks, in the dtype in which they will be multiplied.

    Returns:
        The weights, or None where a projection is no plain Linear (an adapter around it has to be called).
    """
    layers = [layer for block in blocks if type(layer := _attention(block).context_kv) is nn.Linear]
    if len(layers) < len(list(blocks)):
        return None
    weight = torch.stack([layer.weight for layer in layers])
    bias = torch.stack([layer.bias for layer in layers])[:, None]
    if torch.is_autocast_enabled(weight.device.type):
        dtype = torch.get_autocast_dtype(weight.device.type)
        weight, bias = weight.to(dtype), bias.to(dtype)
    return ContextWeights(weight, bias)


def project(
    blocks: Sequence[Block], context: Tensor, vectors: Tensor, weights: ContextWeights | None
) -> Sequence[Tensor | tuple[Tensor, Tensor]]:
    """Return for each block its context in the form that its forward takes: keys and values, or the tokens themselves.

    Args:
        blocks: L blocks whose first branch attends to the context.
        context: [b, p, d].
        vectors: [b, L, 8, d], modulation of these blocks; numbers 2 and 3 are the shift and scale of the context.
        weights: of these blocks; without them, or with many tokens, each block projects for itself.
    """
    b, p, d = context.shape
    if weights is None or b * p > MAX_BATCHED_TOKENS:
        return [context] * len(blocks)
    normed = cast(Branch, blocks[0].branches[0]).context_norm(context)
    shift, scale = vectors[:, :, 2:4].permute(2, 1, 0, 3)[..., None, :]  # [L, b, 1, d] each
    modulated = torch.addcmul(shift, normed, 1 + scale).flatten(1, 2)  # [L, b p, d]
    rows = torch.baddbmm(weights.bias, modulated.to(weights.weight.dtype), weights.weight.transpose(1, 2))
    heads = _attention(blocks[0]).heads
    keys, values = rows.view(len(blocks), b, p, 2, heads, d // heads).permute(3, 0, 1, 4, 2, 5)  # [L, b, heads, p, hd] each
    return list(zip(keys, values, strict=True))


def _attention(block: Block) -> Attention:
    return cast(Attention, cast(Branch, block.branches[0]).f)
