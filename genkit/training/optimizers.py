"""Optimizers that the tasks share.

Muon (Jordan et al. 2024; `torch.optim.Muon`) steps a matrix along its orthogonalised momentum. Rare associations, such as the one
asset that a prompt names, are then learned about as fast as frequent ones. It is made for the matrices inside blocks; embeddings, biases
and norms stay with AdamW, whose learning rate it shares: its steps are scaled to the RMS of AdamW's (Liu et al. 2025, arXiv 2502.16982).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers behind the interface of one: their parameter groups in order, one state, one step.

    Args:
        *optimizers: of different parameters; they share groups and state with this one from now on.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Give each optimizer its groups and the common state."""
        first = 0
        for optimizer in self.optimizers:
            last = first + len(optimizer.param_groups)
            optimizer.param_groups, optimizer.state = self.param_groups[first:last], self.state
            first = last

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every optimizer on the gradients at hand.

        Raises:
            ValueError: if a closure is given.
        """
        if closure is not None:
            raise ValueError("CombinedOptimizer.step takes no closure; compute the gradients first.")
        for optimizer in self.optimizers:
            optimizer.step()
        return None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups and state."""
        super().load_state_dict(state_dict)
        self._share()


def muon_with_adamw(
    matrices: Iterable[Tensor], others: Iterable[Tensor], lr: float, betas: tuple[float, float], weight_decay: float
) -> CombinedOptimizer:
    """Return Muon over the matrices and AdamW over the rest, with one learning rate and decay.

    Args:
        matrices: parameters [m, n] inside blocks.
        others: all other parameters.
        lr: peak learning rate, AdamW's scale.
        betas: of AdamW.
        weight_decay: of both.

    Raises:
        ImportError: if this torch has no Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(f"optimizer 'muon' needs torch 2.9 or newer, got {torch.__version__}; upgrade torch or choose 'adamw'.")
    muon = torch.optim.Muon(list(matrices), lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return CombinedOptimizer(muon, torch.optim.AdamW(list(others), lr=lr, betas=betas, weight_decay=weight_decay))


def block_matrices(module: nn.Module, blocks: str = "blocks") -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split a model's trained parameters into the matrices of its blocks and the rest.

    Args:
        module: the model.
        blocks: name of the submodule that holds the blocks.
    """
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    is_matrix = [name.startswith(f"{blocks}.") and p.ndim == 2 for name, p in trained]
    matrices = [p for (_, p), inside in zip(trained, is_matrix, strict=True) if inside]
    return matrices, [p for (_, p), inside in zip(trained, is_matrix, strict=True) if not inside]
