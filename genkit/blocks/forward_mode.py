"""Forward-mode differentiation (`torch.func.jvp`): which tensors carry a tangent, for operations whose fast kernels do not support it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def has_tangent(*tensors: Tensor) -> bool:
    """Tell whether any of some tensors carries a tangent; False under `torch.compile`."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
