"""Adapters: small trained side branches of a frozen network.

Source: Chen et al., AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition, NeurIPS 2022, arXiv 2205.13535.
Letters: b batch, n tokens, d width.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.branch import Branch
from genkit.blocks.caps import ChannelMixer
from genkit.blocks.norms import build_norm
from genkit.checks import choose

MODES = ("parallel", "sequential")
NORMS = ("none", "in", "out")


class Adapter(nn.Module):
    """scale * up(ReLU(down(x))), zero at the start.

    Args:
        dim: d.
        bottleneck: width in the middle.
        scale: a number, or None for a learned one that starts at 1.
        norm: a layer norm in front ("in"), behind the scale ("out"), or none.
        dropout: in the middle, in training.
        mode: "parallel": beside the branch, from the stream in front of it; "sequential": behind the mixer, with a residual of its own.
    """

    def __init__(
        self, dim: int, bottleneck: int = 64, *, scale: float | None = 0.1, norm: str = "none", dropout: float = 0.1, mode: str = "parallel"
    ) -> None:
        super().__init__()
        choose(norm, NORMS, "norm of an adapter")
        choose(mode, MODES, "mode of an adapter")
        if bottleneck < 1 or not 0 <= dropout < 1:
            raise ValueError(f"Adapter: bottleneck must be positive and dropout lie in [0, 1), got {bottleneck} and {dropout}.")
        self.mode, self.place, self.dropout = mode, norm, dropout
        self.norm = build_norm("none" if norm == "none" else "ln", dim)
        self.down, self.up = nn.Linear(dim, bottleneck), nn.Linear(bottleneck, dim)
        self.scale: nn.Parameter | float = nn.Parameter(torch.ones(1)) if scale is None else scale
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the published start values: Kaiming-uniform down, zero up and biases."""
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added for tokens x [b, n, d]."""
        hidden = F.relu(self.down(self.norm(x) if self.place == "in" else x))
        out: Tensor = self.up(F.dropout(hidden, self.dropout, self.training)) * self.scale
        return self.norm(out) if self.place == "out" else out


def add_adapters(
    model: nn.Module, bottleneck: int = 64, *, scale: float | None = 0.1, norm: str = "none", dropout: float = 0.1, mode: str = "parallel"
) -> list[nn.Parameter]:
    """Freeze a model and give an adapter to each of its branches of a channel mixer.

    Args:
        model: of blocks of `genkit.blocks`.
        bottleneck, scale, norm, dropout, mode: of the adapters, see `Adapter`.

    Returns:
        The parameters to train.

    Raises:
        ValueError: for a model without such branches, or one that has adapters already.
    """
    branches = [part for part in model.modules() if isinstance(part, Branch) and isinstance(part.f, ChannelMixer)]
    if not branches or any(branch.adapter is not None for branch in branches):
        state = "none" if not branches else "some with adapters"
        raise ValueError(f"add_adapters: needs branches of channel mixers without adapters; {type(model).__name__} has {state}.")
    model.requires_grad_(False)
    trained: list[nn.Parameter] = []
    for branch in branches:
        weight = next(branch.f.parameters())
        adapter = Adapter(branch.dim, bottleneck, scale=scale, norm=norm, dropout=dropout, mode=mode)
        branch.adapter = adapter.to(weight.device, weight.dtype).train(branch.training)
        trained += cast(nn.Module, branch.adapter).parameters()
    return trained
