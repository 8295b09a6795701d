"""Context times value: convolutional context modulates each token's hidden units, in place of attention and MLP together.

Source: Ma et al., Efficient Modulation for Vision Networks, ICLR 2024, arXiv 2403.19963.
Letters: b batch, n tokens, d width, e expansion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.caps import Caps, MixerConfig, option, register
from genkit.blocks.conv import to_map, to_tokens
from genkit.blocks.grid_mixer import Grid, GridMixer
from genkit.blocks.layout import Layout


@register("modulation")
@dataclass(frozen=True)
class ModulationConfig(MixerConfig):
    """Options of efficient modulation.

    Args:
        e: hidden width as a multiple of d; the context is repeated e times.
        k: side of the filters, odd, or a tuple of them whose results are added.
        act: whether hidden units are activated; left out at e = 1 as published if None.
        bias: of the maps in and out.
    """

    e: int = option(1, int)
    k: int | tuple[int, ...] = option(7, int, tuple)
    act: bool | None = option(None, bool, None)
    bias: bool = option(True, bool)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.e < 1 or not self.sides or any(not isinstance(k, int) or k < 1 or k % 2 == 0 for k in self.sides):
            raise ValueError(f"modulation: e must be positive and k odd, got e={self.e}, k={self.k}.")

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of all filters."""
        return self.k if isinstance(self.k, tuple) else (self.k,)

    @property
    def caps(self) -> Caps:
        """Needs the whole grid."""
        return Caps(grid=True)

    def build(self, dim: int, *, heads: int | None = None, context_dim: int | None = None) -> EfficientModulation:
        """Build the module for width `dim`."""
        return EfficientModulation(dim, self)


class EfficientModulation(GridMixer):
    """fc2(fc1(x) * c), c = g(sum of GELU(filters(f(x)))), repeated e times.

    Args:
        dim: d.
        config: the options.
    """

    takes_prefix = False

    def __init__(self, dim: int, config: ModulationConfig) -> None:
        super().__init__(dim, config)
        self.config: ModulationConfig = config
        self.activates = config.e > 1 if config.act is None else config.act
        self.f, self.g = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.filters = nn.ModuleList(nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim) for k in config.sides)
        self.fc1 = nn.Linear(dim, config.e * dim, bias=config.bias)
        self.fc2 = nn.Linear(config.e * dim, dim, bias=config.bias)

    def mix(self, x: Tensor, grid: Grid, layout: Layout) -> Tensor:
        """Modulate the tokens."""
        hidden = self.fc1(x)
        hidden = F.gelu(hidden) if self.activates else hidden
        context_tokens = self.context(x, grid)
        return self.fc2(hidden * context_tokens.repeat(1, 1, self.config.e))

    def context(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Return the context [b, n, d] of tokens [b, n, d]."""
        pixels = to_map(self.f(x), grid)
        total = F.gelu(self.filters[0](pixels))
        for layer in self.filters[1:]:
            total = total + F.gelu(layer(pixels))
        return self.g(to_tokens(total, len(x)))
