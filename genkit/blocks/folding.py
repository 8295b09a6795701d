"""Batch norms folded into the linear map or convolution beside them: the same numbers in evaluation, and a layer less.

Letters: o outputs, i inputs of a layer.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from genkit.blocks.branch import Branch
from genkit.blocks.mlp import MLP
from genkit.blocks.norms import BatchNorm

M = TypeVar("M", bound=nn.Module)
# (layer, the norm behind it), by the names that mixers give them
BEHIND = (("fc1", "norm1"), ("fc2", "norm2"), ("filters", "norm"), ("qkv", "qkv_norm"), ("proj", "proj_norm"), ("edges", "edges_norm"))


def factor_and_offset(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Return a and c [d] float64 of a batch norm in evaluation, x -> a x + c."""
    mean, variance = cast(Tensor, norm.running_mean).double(), cast(Tensor, norm.running_var).double()
    factor = norm.weight.double() / (variance + norm.eps).sqrt()
    return factor, norm.bias.double() - mean * factor


def fold_batch_norms(module: M) -> M:
    """Return a copy, in evaluation mode, whose batch norms lie in the layers in front of them, or behind them in front of an MLP.

    Args:
        module: blocks of `genkit.blocks` and what holds them. Norms that stand elsewhere stay, unless their module has a `fold_norms`.
    """
    folded = copy.deepcopy(module).eval()
    with torch.no_grad():
        for part in folded.modules():
            for layer_name, norm_name in BEHIND:
                norm, layer = getattr(part, norm_name, None), getattr(part, layer_name, None)
                if isinstance(norm, BatchNorm) and isinstance(layer, (nn.Linear, nn.Conv2d)):
                    factor, offset = factor_and_offset(norm)
                    _replace(layer, factor.view(-1, *[1] * (layer.weight.ndim - 1)) * layer.weight.double(), factor, offset)
                    setattr(part, norm_name, nn.Identity())
            if isinstance(part, Branch) and isinstance(part.norm, BatchNorm) and part.residual == "pre" and isinstance(part.f, MLP):
                for layer in filter(None, (part.f.fc1, part.f.gate)):
                    fold_into(layer, *factor_and_offset(part.norm))
                part.norm = nn.Identity()
            if hasattr(part, "fold_norms"):
                cast(Any, part).fold_norms()
    return folded


@torch.no_grad()
def fold_into(layer: nn.Linear, factor: Tensor, offset: Tensor) -> None:
    """Make a linear map take x for what was factor * x + offset, both [d]."""
    weight = layer.weight.double()
    _replace(layer, weight * factor, torch.ones((), dtype=torch.float64), weight @ offset)


def _replace(layer: nn.Linear | nn.Conv2d, weight: Tensor, factor: Tensor, offset: Tensor) -> None:
    """Give a layer another weight, and the bias factor * bias + offset."""
    bias = offset if layer.bias is None else factor * layer.bias.double() + offset
    layer.bias = nn.Parameter(bias.to(layer.weight))
    layer.weight.copy_(weight)
