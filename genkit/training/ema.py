"""Running averages of weights, kept in float32 and updated with one fused call."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class EMA:
    """Averaged copies of modules: average <- average + (1 - decay) (weight - average), buffers copied.

    Args:
        modules: name -> module to follow; copies start at its weights.
        decay: in [0, 1).
        use_warmup: cap the decay at (1 + step) / (10 + step), so that the first weights are soon forgotten.
        device: where the averages are kept; that of the modules if None.
    """

    def __init__(self, modules: Mapping[str, nn.Module], decay: float, use_warmup: bool = True, device: torch.device | None = None) -> None:
        self.decay, self.use_warmup, self.device = decay, use_warmup, device
        self.modules = {name: _averaged(module).to(device) for name, module in modules.items()}

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Bring averages that are kept elsewhere to a device for a while."""
        if self.device is None or self.device == device:
            yield
            return
        for module in self.modules.values():
            module.to(device)
        yield
        for module in self.modules.values():
            module.to(self.device)

    def decay_at(self, step: int) -> float:
        """Return the decay of the update after `step` earlier ones."""
        return min(self.decay, (1 + step) / (10 + step)) if self.use_warmup else self.decay

    @torch.no_grad()
    def update(self, modules: Mapping[str, nn.Module], step: int) -> None:
        """Move the averages towards the weights of `modules`, which has at least the names of this average."""
        for name, average in self.modules.items():
            mine: list[Tensor] = list(average.parameters())
            theirs = [p.to(q.device, q.dtype) for p, q in zip(modules[name].parameters(), mine, strict=True)]
            if mine:
                torch._foreach_lerp_(mine, theirs, 1.0 - self.decay_at(step))
            for buffer, value in zip(average.buffers(), modules[name].buffers(), strict=True):
                buffer.copy_(value)


def _averaged(module: nn.Module) -> nn.Module:
    """Copy a module for averaging: eval mode, no gradients, floating-point parameters in float32."""
    average = copy.deepcopy(module).eval().requires_grad_(False)
    for parameter in average.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return average
