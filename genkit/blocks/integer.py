"""Networks on integers: 8-bit weights, rounded weights and activations in training, integer forms of softmax, GELU and layer norm.

A tensor is given as values and their scale, values / scale being whole numbers. Everything is computed in float32, as published; quotients
are used as they come and not rounded first, which the floors behind them see.

Sources: Li and Gu, I-ViT: Integer-only Quantization for Efficient Vision Transformer Inference, ICCV 2023, arXiv 2207.01405; You et al.,
ShiftAddViT, NeurIPS 2023, arXiv 2306.06446, for weights that are powers of two.
Letters: o outputs, i inputs of a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.around_linear import AroundLinear, put_module
from genkit.checks import choose

M = TypeVar("M", bound=nn.Module)

WEIGHTS = ("int", "pow2")
MOMENTUM = 0.95  # of the range of activations
LARGEST = 2.0**31 - 1
SHIFTS = (-14, 0)  # of weights that are powers of two, in 5 bits


def through(rounded: Tensor, x: Tensor) -> Tensor:
    """Return `rounded`, with the gradient of x."""
    return x + (rounded - x).detach()


def scale_of(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Return the scale of numbers between two bounds: the larger magnitude is the largest integer of so many bits."""
    return torch.maximum(low.abs(), high.abs()) / (2 ** (bits - 1) - 1)


def quantised(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return x rounded to the integers of so many bits times the scale; the gradient passes where nothing is cut."""
    whole = (x / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return through(whole.round(), whole) * scale


def powers_of_two(weight: Tensor) -> Tensor:
    """Return a weight rounded to +-2^s with s in `SHIFTS`, the gradient passing."""
    shift = weight.abs().clamp_min(2.0 ** SHIFTS[0]).log2().round().clamp(*SHIFTS)
    return through(torch.where(weight < 0, -1.0, 1.0) * 2**shift, weight)


def shift_exp(z: Tensor, scale: Tensor, n: int) -> Tensor:
    """Return about 2^n / scale * exp(z * scale) of integers z <= 0 by shifts and one division."""
    z = z + (z / 2).floor() - (z / 16).floor()
    unit = (-1 / scale).floor()
    z = torch.maximum(z, n * unit)
    count = (z / unit).floor()
    rest = z - unit * count
    return ((rest / 2 - unit) * 2 ** (n - count)).floor().clamp_min(0)


def shiftmax(x: Tensor, scale: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Return softmax over the last axis and its scale [1], of values with a scale."""
    z = x / scale
    e = shift_exp(z - z.amax(-1, keepdim=True), scale, 15)
    factor = (LARGEST / e.sum(-1, keepdim=True).clamp_max(LARGEST)).floor()
    unit = torch.full((1,), 2.0 ** (1 - bits), device=x.device)
    return (e * factor / 2.0 ** (32 - bits)).floor() * unit, unit


def shift_gelu(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return x sigmoid(1.702 x) in 8 bits and its scale, of values with a scale.

    As published, the reciprocal of the sum is an integer, of 3 to 4 bits where the scale is about 0.04: errors up to 0.3 at |x| of 5.
    """
    z = x / scale
    most = z.amax(-1, keepdim=True)
    e, of_zero = shift_exp(z - most, 1.702 * scale, 23), shift_exp(-most, 1.702 * scale, 23)
    share = (e * (LARGEST / (e + of_zero).clamp_max(LARGEST)).floor() / 2.0**24).floor()
    return z * share * (scale / 128), scale / 128


def integer_layer_norm(x: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the layer norm over the last axis and its scale, of values with a scale; ten Newton steps give the integer root."""
    z = x / scale
    y = z - z.mean(-1, keepdim=True).round()
    squares, root = y.square().sum(-1, keepdim=True), torch.full_like(y[..., :1], 2.0**16)
    for _ in range(10):
        root = ((root + (squares / root).floor()) / 2).floor()
    y = (y * (LARGEST / root).floor() / 2).floor()
    unit = x.shape[-1] ** 0.5 / 2.0**30
    return (y + (bias / weight / unit).floor()) * (unit * weight), unit * weight


def requantised(parts: Sequence[tuple[Tensor, Tensor]], bits: int = 8) -> tuple[Tensor, Tensor]:
    """Return the sum of some values with scales on a new scale, by integer products and shifts, and that scale.

    Args:
        parts: values and scales; the first, and a residual.
        bits: of the result.
    """
    total = sum(x for x, _ in parts)
    assert isinstance(total, Tensor)
    scale, whole = scale_of(total.amin(), total.amax(), bits), torch.zeros_like(total, dtype=torch.float64)
    for x, old in parts:
        mantissa, exponent = torch.frexp(old.double() / scale.double())
        factor = (mantissa * 2.0**31).round() / 2.0 ** (31 - exponent)
        whole += ((x / old).round().double() * factor).round()
    return whole.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).float() * scale, scale


class FakeQuantLinear(AroundLinear):
    """A linear map as it will be on integers: rounded weights, each row with a scale, and rounded inputs by the range they had so far.

    Gradients pass the rounding. The range is kept with the weights.

    Args:
        base: the linear map, whose weights train on.
        bits: of weights and inputs.
        weights: "int", or "pow2": powers of two.

    Raises:
        ValueError: for fewer than 2 or more than 16 bits, or an unknown kind.
    """

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, base: nn.Linear, bits: int = 8, weights: str = "int") -> None:
        super().__init__(base)
        choose(weights, WEIGHTS, "kind of weights")
        if not 2 <= bits <= 16:
            raise ValueError(f"FakeQuantLinear: bits must lie in 2 .. 16, got {bits}.")
        self.bits, self.kind = bits, weights
        for name in ("low", "high"):
            self.register_buffer(name, torch.zeros((), device=base.weight.device))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool, device=base.weight.device))

    @property
    def weight(self) -> Tensor:
        """The rounded weight [o, i]."""
        weight = self.base.weight
        if self.kind == "pow2":
            return powers_of_two(weight)
        bound = weight.detach().abs().amax(1, keepdim=True).clamp_min(1e-12)
        return quantised(weight, scale_of(bound, bound, self.bits), self.bits)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Move the range towards that of x."""
        low, high = x.amin().float(), x.amax().float()
        keep = torch.where(self.seen, MOMENTUM, 0.0)
        self.low.copy_(keep * self.low + (1 - keep) * low)
        self.high.copy_(keep * self.high + (1 - keep) * high)
        self.seen.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., i] to [..., o]; in training the range follows x, and before it has seen any, inputs are not rounded."""
        if self.training:
            self.observe(x)
        scale = scale_of(self.low, self.high, self.bits).clamp_min(1e-12).to(x.dtype)
        return F.linear(torch.where(self.seen, quantised(x, scale, self.bits), x), self.weight, self.bias)


def add_fake_quant(model: nn.Module, bits: int = 8, weights: str = "int", inside: str = "blocks") -> list[str]:
    """Put `FakeQuantLinear` around the linear maps of a model's blocks, and return their names.

    Args:
        model: the model.
        bits, weights: see `FakeQuantLinear`.
        inside: name of the submodule that holds the blocks; "" for the whole model.

    Raises:
        ValueError: if there are none.
    """
    first = f"{inside}." if inside else ""
    names = [name for name, part in model.named_modules() if type(part) is nn.Linear and name.startswith(first)]
    if not names:
        raise ValueError(f"add_fake_quant: {type(model).__name__} has no linear maps below {inside!r}.")
    for name in names:
        put_module(model, name, FakeQuantLinear(model.get_submodule(name), bits, weights))  # type: ignore[arg-type]
    return names


@torch.no_grad()
def rounded(model: M) -> M:
    """Return a copy of a model in which every `FakeQuantLinear` is a plain linear map with the rounded weight; inputs stay exact."""
    found = copy.deepcopy(model)
    for name, part in list(found.named_modules()):
        if isinstance(part, FakeQuantLinear):
            part.base.weight.copy_(part.weight)
            put_module(found, name, part.base)
    return found


def to_int8(model: M, inputs: bool = False) -> M:
    """Turn the weights of a model's linear maps into 8-bit integers with a scale per row, in place, by torchao.

    The model computes as before and takes about a quarter of the memory of fp32; it can neither be trained nor saved afterwards.

    Args:
        model: the model.
        inputs: also round the inputs of these maps to 8 bits, by the range of each token, and multiply integers ("dynamic").

    Returns:
        The model.

    Raises:
        ImportError: without torchao.
        ValueError: if it has no linear maps, or their weights are integers already.
    """
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ImportError("to_int8 needs torchao: pip install 'genkit-torch[int8]'.") from error
    found = [part for part in model.modules() if isinstance(part, nn.Linear)]
    if not found:
        raise ValueError(f"to_int8: {type(model).__name__} has no linear maps.")
    if has_integers(model):
        raise ValueError(f"to_int8: the weights of {type(model).__name__} are integers already.")
    config = Int8DynamicActivationInt8WeightConfig() if inputs else Int8WeightOnlyConfig()
    quantize_(model, config, filter_fn=lambda part, name: isinstance(part, nn.Linear))
    return model


def has_integers(model: nn.Module) -> bool:
    """Tell whether `to_int8` has been at a model."""
    return any(isinstance(part, nn.Linear) and type(part.weight) not in (nn.Parameter, Tensor) for part in model.modules())
