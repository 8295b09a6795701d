"""Adaptive shift, scale and gate vectors (adaLN) that a block computes from its condition.

Source: Peebles and Xie, Scalable Diffusion Models with Transformers, 2022, section 3.2 (adaLN-Zero).
Letters: b batch, n tokens, d width, k vectors.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from genkit.checks import check_shape


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x * (1 + scale) + shift for x [b, n, d] and vectors [b, d]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Modulation(nn.Module):
    """Linear(SiLU(cond)) giving k vectors; starts at zero, so that gated branches start as the identity.

    Args:
        dim: d, width of each vector.
        num_vectors: k.
        cond_dim: width of the condition; `dim` if None.
    """

    def __init__(self, dim: int, num_vectors: int, cond_dim: int | None = None) -> None:
        super().__init__()
        self.num_vectors = num_vectors
        self.cond_dim = dim if cond_dim is None else cond_dim
        self.linear = nn.Linear(self.cond_dim, num_vectors * dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, cond: Tensor) -> Tensor:
        """Return the vectors [b, k, d] of a condition [b, cond_dim]."""
        check_shape(cond, "Modulation: cond", "b c", c=self.cond_dim)
        return self.linear(F.silu(cond)).unflatten(-1, (self.num_vectors, -1))
