"""What stands around a linear map and is used in its place.

Letters: o outputs, i inputs of a layer.
"""

from __future__ import annotations

from torch import Tensor, nn


class AroundLinear(nn.Module):
    """Base of the modules around a linear map; a subclass writes `weight` and `forward`.

    Args:
        base: the linear map.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    @property
    def in_features(self) -> int:
        """i, of the base."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """o, of the base."""
        return self.base.out_features

    @property
    def bias(self) -> Tensor | None:
        """Of the base."""
        return self.base.bias


def put_module(model: nn.Module, name: str, part: nn.Module) -> None:
    """Replace a submodule."""
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, part)
