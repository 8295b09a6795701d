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


class FlatMuon(torch.optim.Optimizer):
    """torch's Muon for matrices and for kernels of convolutions, which it takes as matrices [out, in * h * w].

    Args:
        params: parameters of two or more axes.
        lr: peak learning rate, AdamW's scale.
        weight_decay: decoupled.

    Raises:
        ImportError: if this torch has no Muon.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ImportError(f"optimizer 'muon' needs torch 2.9 or newer, got {torch.__version__}; upgrade torch or choose 'adamw'.")
        own = list(params)
        self.flat = {p: nn.Parameter(p.detach().flatten(1)) for p in own}  # share the memory of what they flatten
        self.muon = torch.optim.Muon(list(self.flat.values()), lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        super().__init__(own, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step on the gradients at hand; the state lies under the real parameters."""
        self.muon.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        for p, flat in self.flat.items():
            if flat.data_ptr() != p.data_ptr():
                raise RuntimeError("FlatMuon: a parameter was moved after the optimizer was built; build optimizers last.")
            flat.grad = None if p.grad is None else p.grad.flatten(1)
            self.muon.state[flat] = self.state[p]
        self.muon.step()
        for p, flat in self.flat.items():
            self.state[p], flat.grad = self.muon.state[flat], None
        return None


def muon_with_adamw(
    matrices: Iterable[Tensor], others: Iterable[Tensor], lr: float, betas: tuple[float, float], weight_decay: float
) -> CombinedOptimizer:
    """Return Muon over the matrices and AdamW over the rest, with one learning rate and decay.

    Args:
        matrices: parameters [m, n] inside blocks, or kernels of convolutions.
        others: all other parameters.
        lr: peak learning rate, AdamW's scale.
        betas: of AdamW.
        weight_decay: of both.

    Raises:
        ImportError: if this torch has no Muon.
    """
    muon = FlatMuon(matrices, lr, weight_decay)
    return CombinedOptimizer(muon, torch.optim.AdamW(list(others), lr=lr, betas=betas, weight_decay=weight_decay))


def adamw_or_muon(
    module: nn.Module,
    kind: str,
    where: tuple[str, ...],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """Return one optimizer over a module's trained parameters.

    Args:
        module: the model.
        kind: "adamw", or "muon": Muon for matrices and kernels, AdamW for the rest.
        where: prefixes of the names that Muon takes.
        lr, betas, weight_decay: of the optimizer.
        eps: of AdamW alone.
    """
    if kind == "muon":
        return muon_with_adamw(*kernels(module, where), lr=lr, betas=betas, weight_decay=weight_decay)
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def kernels(module: nn.Module, where: tuple[str, ...]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split a convolutional model's trained parameters into matrices and kernels below some submodules, and the rest.

    Args:
        module: the model.
        where: prefixes of names.
    """
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    is_matrix = [name.startswith(where) and p.ndim > 1 for name, p in trained]
    matrices = [p for (_, p), inside in zip(trained, is_matrix, strict=True) if inside]
    return matrices, [p for (_, p), inside in zip(trained, is_matrix, strict=True) if not inside]


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
