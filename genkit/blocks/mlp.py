"""The feed-forward channel mixer, with gating and nested widths.

Nested widths: the first m hidden units of the same matrices form a smaller network, chosen per call.
Source: Devvrit et al., MatFormer: Nested Transformer for Elastic Inference, 2023, arXiv 2310.07707.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.caps import Caps, ChannelMixer, MixerConfig, option, refuse_arguments, register
from genkit.blocks.layout import Layout
from genkit.blocks.norms import build_norm


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "tanh": torch.tanh,
    "relu": F.relu,
    "relu2": _relu2,
    "silu": F.silu,
}


@register("mlp")
@dataclass(frozen=True)
class MLPConfig(MixerConfig):
    """Options of the feed-forward mixer.

    Args:
        ratio: hidden width as a multiple of d.
        hidden: hidden width itself; wins over `ratio`.
        act: activation between the two layers.
        gated: act(gate(x)) * fc1(x) in place of act(fc1(x)); "product": act(gate(x) * fc1(x)), as the public reproduction of MatFormer has
            it.
        bias: whether the layers have biases.
        nested: widths that a call may ask for, as fractions of the hidden width, ascending up to 1.
        dropout: of hidden units, in training.
    """

    ratio: float = option(4.0, float, int)
    hidden: int | None = option(None, int, None)
    act: str = option("gelu", *ACTIVATIONS)
    gated: bool | str = option(False, bool, "product")
    bias: bool = option(True, bool)
    nested: tuple[float, ...] = option((1,), tuple)
    dropout: float = option(0.0, float, int)

    offers: ClassVar[Mapping[str, str]] = {"width": "mlp(nested=...)"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio <= 0 or (self.hidden is not None and self.hidden < 1):
            raise ValueError(f"mlp: ratio and hidden must be positive, got ratio={self.ratio}, hidden={self.hidden}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"mlp: dropout must lie in [0, 1), got {self.dropout}.")
        numbers = all(isinstance(g, (int, float)) and not isinstance(g, bool) and 0 < g <= 1 for g in self.nested)
        if not numbers or not self.nested or list(self.nested) != sorted(set(self.nested)) or self.nested[-1] != 1:
            raise ValueError(f"mlp: nested must be ascending fractions that end with 1, such as (0.25, 0.5, 1), got {self.nested}.")

    @property
    def caps(self) -> Caps:
        """Each token alone: every law of token order holds."""
        return Caps(set_op=True, causal=True, cache=True, mask=True)

    def build(self, dim: int, *, heads: int | None = None, context_dim: int | None = None) -> MLP:
        """Build the module for width `dim`."""
        return MLP(dim, self)


class MLP(ChannelMixer):
    """fc2(act(fc1(x))), or fc2(act(gate(x)) * fc1(x)).

    Args:
        dim: d.
        config: the options.

    Example:
        >>> mlp = MLPConfig(ratio=2, nested=(0.5, 1)).build(8)
        >>> mlp(torch.randn(1, 3, 8), width=0.5).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, dim: int, config: MLPConfig) -> None:
        super().__init__()
        self.config: MLPConfig = config
        hidden = round(dim * config.ratio) if config.hidden is None else config.hidden
        if hidden < 1:
            raise ValueError(f"mlp: the hidden layer needs at least one unit, got dim={dim} * ratio={config.ratio}.")
        uneven = [g for g in config.nested if abs(hidden * g - round(hidden * g)) > 1e-6]
        if uneven:
            raise ValueError(f"mlp: nested widths must cut hidden={hidden} at whole units, got {uneven}.")
        self.hidden = hidden
        self.act = ACTIVATIONS[config.act]
        self.fc1 = nn.Linear(dim, hidden, bias=config.bias)
        self.gate = nn.Linear(dim, hidden, bias=config.bias) if config.gated else None
        self.fc2 = nn.Linear(hidden, dim, bias=config.bias)

    def forward(self, x: Tensor, *, layout: Layout | None = None, width: float | None = None) -> Tensor:
        """Map tokens.

        Args:
            x: [b, n, d].
            layout: unused; part of the protocol.
            width: one of the nested fractions; the full width if None.

        Returns:
            [b, n, d].

        Raises:
            ValueError: if the width is not one of those the config nests.
        """
        if width is not None and width not in self.config.nested:
            raise ValueError(f"{self.config}: width must be one of {self.config.nested}, got {width}; list it in nested=(...).")
        units = self.hidden if width is None else round(self.hidden * width)
        hidden = self._first(self.fc1, x, units)
        if self.gate is None:
            hidden = self.act(hidden)
        elif self.config.gated == "product":
            hidden = self.act(self._first(self.gate, x, units) * hidden)
        else:
            hidden = self.act(self._first(self.gate, x, units)) * hidden
        if self.config.dropout:
            hidden = F.dropout(hidden, self.config.dropout, self.training)
        if units == self.hidden:
            return self.fc2(hidden)
        return F.linear(hidden, self.fc2.weight[:, :units], self.fc2.bias)

    def _first(self, layer: nn.Linear, x: Tensor, units: int) -> Tensor:
        """Apply the first `units` rows of a layer."""
        if units == self.hidden:
            return layer(x)
        return F.linear(x, layer.weight[:units], None if layer.bias is None else layer.bias[:units])


@register("bn_mlp")
@dataclass(frozen=True)
class BatchNormMLPConfig(MixerConfig):
    """Options of the feed-forward mixer of convolutional transformers: a batch norm behind each layer.

    Args:
        ratio: hidden width as a multiple of d.
        act: activation between the two layers.
        bias: whether the layers have biases.
    """

    ratio: float = option(2.0, float, int)
    act: str = option("relu", *ACTIVATIONS)
    bias: bool = option(False, bool)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio <= 0:
            raise ValueError(f"bn_mlp: ratio must be positive, got {self.ratio}.")

    @property
    def caps(self) -> Caps:
        """Each token alone, once trained."""
        return Caps(set_op=True, causal=True, cache=True, mask=True)

    def build(self, dim: int, *, heads: int | None = None, context_dim: int | None = None) -> BatchNormMLP:
        """Build the module for width `dim`."""
        return BatchNormMLP(dim, self)


class BatchNormMLP(ChannelMixer):
    """norm2(fc2(act(norm1(fc1(x))))) with batch norms, which in training look at all tokens of a batch.

    Args:
        dim: d.
        config: the options.
    """

    def __init__(self, dim: int, config: BatchNormMLPConfig) -> None:
        super().__init__()
        self.config: BatchNormMLPConfig = config
        hidden = round(dim * config.ratio)
        self.act = ACTIVATIONS[config.act]
        self.fc1, self.norm1 = nn.Linear(dim, hidden, bias=config.bias), build_norm("bn", hidden)
        self.fc2, self.norm2 = nn.Linear(hidden, dim, bias=config.bias), build_norm("bn", dim)

    def forward(self, x: Tensor, *, layout: Layout | None = None, width: float | None = None) -> Tensor:
        """Map tokens x [b, n, d]; there is no nested width."""
        refuse_arguments(self.config, width=width)
        return self.norm2(self.fc2(self.act(self.norm1(self.fc1(x)))))
