"""The feed-forward channel mixer with a depthwise convolution of its hidden units: a neighbourhood for the price of a little more MLP.

Sources: inverted residuals of Sandler et al., MobileNetV2, CVPR 2018, arXiv 1801.04381; in transformers Wang et al., PVT v2, 2021, arXiv
2106.13797, and Munir et al., MobileViG, CVPRW 2023, arXiv 2307.00395.
Letters: b batch, n tokens, d width, m hidden width, f h w frames, rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genkit.blocks.caps import Caps, ChannelMixer, MixerConfig, option, refuse_arguments, register
from genkit.blocks.conv import to_map, to_tokens
from genkit.blocks.grid_mixer import grid_sides
from genkit.blocks.layout import Layout
from genkit.blocks.mlp import ACTIVATIONS
from genkit.blocks.norms import build_norm
from genkit.checks import check_shape


@register("conv_mlp")
@dataclass(frozen=True)
class ConvMLPConfig(MixerConfig):
    """Options of the feed-forward mixer with a convolution in the middle.

    Args:
        ratio: hidden width as a multiple of d.
        k: side of the filters, odd.
        act: activation in front of the filters and behind them.
        norm: behind each of the three layers: "none" or "bn".
        bias: whether the layers have biases.
    """

    ratio: float = option(4.0, float, int)
    k: int = option(3, int)
    act: str = option("gelu", *ACTIVATIONS)
    norm: str = option("none", "none", "bn")
    bias: bool = option(True, bool)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio <= 0:
            raise ValueError(f"conv_mlp: ratio must be positive, got {self.ratio}.")
        if self.k < 1 or self.k % 2 == 0:
            raise ValueError(f"conv_mlp: k must be odd and positive, got {self.k}.")

    @property
    def caps(self) -> Caps:
        """Needs the whole grid."""
        return Caps(grid=True)

    def build(self, dim: int, *, heads: int | None = None, context_dim: int | None = None) -> ConvMLP:
        """Build the module for width `dim`."""
        return ConvMLP(dim, self)


class ConvMLP(ChannelMixer):
    """norm2(fc2(act(norm(filters(act(norm1(fc1(x)))))))), the filters over the tokens of each frame.

    Args:
        dim: d.
        config: the options.
    """

    def __init__(self, dim: int, config: ConvMLPConfig) -> None:
        super().__init__()
        self.config: ConvMLPConfig = config
        self.dim, self.act = dim, ACTIVATIONS[config.act]
        hidden = round(dim * config.ratio)
        if hidden < 1:
            raise ValueError(f"conv_mlp: the hidden layer needs at least one unit, got dim={dim} * ratio={config.ratio}.")
        self.fc1, self.norm1 = nn.Linear(dim, hidden, bias=config.bias), build_norm(config.norm, hidden)
        self.filters = nn.Conv2d(hidden, hidden, config.k, padding=config.k // 2, groups=hidden, bias=config.bias)
        self.norm = build_norm(config.norm, hidden)
        self.fc2, self.norm2 = nn.Linear(hidden, dim, bias=config.bias), build_norm(config.norm, dim)

    def forward(self, x: Tensor, *, layout: Layout | None = None, width: float | None = None) -> Tensor:
        """Map tokens.

        Args:
            x: [b, n, d], the tokens of the grid in raster order behind the prefix.
            layout: with a grid (h, w) or (f, h, w).
            width: not taken.

        Returns:
            [b, n, d].

        Raises:
            ValueError: without a grid of all tokens, or for a width.
        """
        refuse_arguments(self.config, width=width)
        sizes = check_shape(x, "ConvMLP: x", "b n d", d=self.dim)
        grid = grid_sides(self.config, layout, sizes["n"])
        front = 0 if layout is None else layout.prefix
        hidden = self.act(self.norm1(self.fc1(x)))
        filtered = to_tokens(self.filters(to_map(hidden[:, front:], grid)), sizes["b"])
        if front:
            filtered = torch.cat([self._alone(hidden[:, :front]), filtered], dim=1)
        return self.norm2(self.fc2(self.act(self.norm(filtered))))

    def _alone(self, hidden: Tensor) -> Tensor:
        """Filter tokens [b, n, m] that have no neighbours: the centres of the filters, as on a map of one token."""
        centre = self.config.k // 2
        filtered = hidden * self.filters.weight[:, 0, centre, centre]
        return filtered if self.filters.bias is None else filtered + self.filters.bias
