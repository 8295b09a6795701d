"""Start values that several models share."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def normal_init(module: nn.Module, std: float = 0.02) -> None:
    """Draw the matrices of all linear layers and the tables of all embeddings below a module from N(0, std^2); biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
