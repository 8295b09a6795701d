"""One frozen network for several roles: low-rank adapters (peft) that are switched, instead of a copy for each.

The bare network is the teacher; with the adapter "student" or "critic" it is that role. Adapters start at zero effect, so all roles start
as the teacher. Source: Hu et al. 2021 (LoRA, arXiv 2106.09685).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from genkit.generators.edm_layers import ResampleConv2d


def _layers() -> Any:
    """Return peft.

    Raises:
        ImportError: if it is missing; names the extra.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA roles need peft: pip install 'genkit-torch[peft]', or leave out task_config.lora.") from error
    return peft


def adaptable(module: nn.Module) -> list[str]:
    """Return the linear layers and the convolutions that an adapter can follow: those that do not resample."""
    return [
        name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d) and not isinstance(layer, ResampleConv2d)
    ]


class SharedNetwork(nn.Module):
    """A frozen network with adapters.

    Args:
        base: the network; it is changed in place.
        roles: names of the adapters.
        rank: of each.
        alpha: scale of an adapter's output, times 1 / rank; the rank itself if None.

    Raises:
        ValueError: if the rank is not at least 1. ImportError: without peft.
    """

    def __init__(self, base: nn.Module, roles: Sequence[str], rank: int, alpha: float | None = None) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"lora rank must be at least 1, got {rank}.")
        peft = _layers()
        base.requires_grad_(False)
        settings: dict[str, Any] = {"r": rank, "lora_alpha": rank if alpha is None else alpha, "target_modules": adaptable(base)}
        for role in roles:
            peft.inject_adapter_in_model(peft.LoraConfig(**settings), base, adapter_name=role)
        self.base, self.roles = base, tuple(roles)
        self._allow()

    def _tuners(self) -> list[Any]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [layer for layer in self.base.modules() if isinstance(layer, BaseTunerLayer)]

    def _allow(self) -> None:
        """Let every adapter be trained: choosing one freezes the others."""
        for name, parameter in self.base.named_parameters():
            parameter.requires_grad_("lora_" in name)

    @contextlib.contextmanager
    def role(self, name: str | None) -> Iterator[nn.Module]:
        """Give the network as a role; None is the bare one."""
        wanted = {parameter: parameter.requires_grad for parameter in self.base.parameters()}
        for layer in self._tuners():
            layer.enable_adapters(name is not None)
            if name is not None:
                layer.set_adapter([name])
        for parameter, needs in wanted.items():
            parameter.requires_grad_(needs)
        yield self.base

    def forward(self, name: str | None, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the network as a role."""
        with self.role(name) as network:
            return network(*args, **kwargs)

    def parameters_of(self, name: str) -> nn.ParameterList:
        """Return an adapter's parameters."""
        return nn.ParameterList([p for key, p in self.base.named_parameters() if "lora_" in key and f".{name}." in key])

    def merged(self, name: str) -> nn.Module:
        """Return a copy of the network with an adapter merged into its weights, without adapters."""
        found = copy.deepcopy(self.base)
        from peft.tuners.tuners_utils import BaseTunerLayer

        for path, layer in [item for item in found.named_modules() if isinstance(item[1], BaseTunerLayer)]:
            layer.enable_adapters(True)
            layer.set_adapter([name])
            layer.merge(adapter_names=[name])
            parent, _, leaf = path.rpartition(".")
            owner = found.get_submodule(parent)
            if isinstance(owner, nn.ModuleDict):
                owner[leaf] = layer.get_base_layer()
            else:
                setattr(owner, leaf, layer.get_base_layer())
        return found.eval().requires_grad_(False)
