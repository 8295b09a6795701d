"""Input embedding and output head of ENAT and NAT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.norms import build_norm
from genkit.checks import check_shape

LOGITS_AT = ("all", "masked", "none")


def grid_of(sample_size: int | Sequence[int]) -> tuple[int, int]:
    """Return rows and columns of a token grid, from its side or both.

    Raises:
        ValueError: for another number of sides.
    """
    sides = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(int(side) for side in sample_size)
    if len(sides) != 2:
        raise ValueError(f"sample_size must be one side or [rows, columns], got {sample_size}.")
    return sides[0], sides[1]


class TokenEmbedding(nn.Module):
    """dropout(LayerNorm(word[id] + position)).

    Args:
        num_ids: codes and the mask id.
        num_tokens: n.
        dim: d.
        dropout: probability to drop a value in training.
    """

    def __init__(self, num_ids: int, num_tokens: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.word = nn.Embedding(num_ids, dim)
        self.position = nn.Parameter(torch.empty(num_tokens, dim))
        self.norm = build_norm("ln", dim, eps=1e-6)
        self.dropout = dropout

    def forward(self, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        """Embed a grid.

        Args:
            ids: [b, n] int64.
            keep: [b, n, d] bool, the values that dropout keeps; drawn by PyTorch's generator in training if None.

        Returns:
            [b, n, d].
        """
        embedded: Tensor = self.norm(self.word(ids) + self.position)
        if keep is None:
            return F.dropout(embedded, self.dropout, self.training)
        check_shape(keep, "ENATTransformer2DModel: embedding_keep", "b n d", **dict(zip("bnd", embedded.shape, strict=True)))
        return embedded * keep / (1 - self.dropout)


class CodeHead(nn.Module):
    """logits = word LayerNorm(GELU(fc(x))) + bias, with the input embedding's word table.

    The table is used without gradient, as published: it learns from the input side only.

    Args:
        dim: d.
        num_ids: codes and the mask id, which has a bias but no logit.
    """

    def __init__(self, dim: int, num_ids: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, dim)
        self.norm = build_norm("ln", dim, eps=1e-5)
        self.bias = nn.Parameter(torch.zeros(num_ids))

    def forward(self, x: Tensor, word: Tensor) -> Tensor:
        """Return logits [b, k, K] of features x [b, k, d] over the K codes; word is [K + 1, d]."""
        return F.linear(self.norm(F.gelu(self.fc(x))), word.detach()[:-1], self.bias[:-1])
