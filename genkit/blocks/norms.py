"""Normalisation over the channel axis, with float32 statistics and the input's dtype outside."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from genkit.checks import choose

NORMS = ("ln", "ln_noaffine", "rms", "rms_noaffine", "bn", "none")


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis; PyTorch's kernel keeps the statistics in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., d]."""
        if self.weight is None or self.weight.dtype == x.dtype:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), bias, self.eps).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, statistics in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., d]."""
        weight = None if self.weight is None else self.weight.float()
        return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)


class BatchNorm(nn.BatchNorm1d):
    """Batch norm of the last axis over all others: on tokens [b, n, d] what BatchNorm2d is on maps [b, d, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., d]."""
        return super().forward(x.flatten(0, -2)).view(x.shape)


def build_norm(kind: str, dim: int, eps: float = 1e-5) -> nn.Module:
    """Build a norm over the last axis.

    Args:
        kind: one of "ln", "ln_noaffine" (for modulated branches), "rms", "rms_noaffine", "bn" (batch norm: its averages
            mix the steps of a generator; for published weights and tokenizers), "none" (identity).
        dim: d.
        eps: added to the variance or mean square.
    """
    choose(kind, NORMS, "norm")
    if kind == "none":
        return nn.Identity()
    if kind == "bn":
        return BatchNorm(dim, eps=eps)
    affine = not kind.endswith("_noaffine")
    norm = LayerNorm if kind.startswith("ln") else RMSNorm
    return norm(dim, eps=eps, elementwise_affine=affine)
