"""Max-relative graph convolution on a fixed sparse graph: every K-th token of a row and of a column, round the border.

Source: Munir et al., MobileViG: Graph-Based Sparse Attention for Mobile Vision Applications, CVPR workshops 2023, arXiv 2307.00395.
Letters: b batch, n tokens, d width, h w grid rows and columns, K distance between neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.caps import Caps, MixerConfig, option, register
from genkit.blocks.conv import to_map, to_tokens
from genkit.blocks.grid_mixer import Grid, GridMixer
from genkit.blocks.layout import Layout
from genkit.blocks.norms import build_norm


def relative(x: Tensor, k: int, method: str = "auto") -> Tensor:
    """Return how far each token stands above the lowest of its neighbours, itself included.

    Args:
        x: [b, d, h, w].
        k: neighbours are k, 2 k, ... rows or columns away, round the border.
        method: "roll" moves the map once per neighbour, "min" takes minima of classes, which is the same where k divides both sides, and
            "auto" takes what is possible.

    Returns:
        [b, d, h, w], at least 0.

    Raises:
        ValueError: for method="min" where k does not divide the sides.
    """
    h, w = x.shape[2:]
    divides = h % k == 0 and w % k == 0
    if method == "min" and not divides:
        raise ValueError(f"graph: method='min' needs a grid that K divides, got K={k} and {h} x {w}; use 'auto'.")
    if divides and method != "roll":
        rows = x.unflatten(2, (h // k, k))
        columns = x.unflatten(3, (w // k, k))
        lowest_row = rows.amin(2, keepdim=True).expand(rows.shape).flatten(2, 3)
        lowest_column = columns.amin(3, keepdim=True).expand(columns.shape).flatten(3, 4)
        return x - torch.minimum(lowest_row, lowest_column)
    lowest = x
    for axis, length in ((2, h), (3, w)):
        for shift in range(k, length, k):
            lowest = torch.minimum(lowest, x.roll(shift, axis))
    return x - lowest


@register("graph")
@dataclass(frozen=True)
class GraphConfig(MixerConfig):
    """Options of graph convolution.

    Args:
        K: distance between neighbours.
        method: "auto", "roll" or "min", see `relative`.
        norm: behind each linear map: "none", "ln" or "bn", as published.
    """

    K: int = option(2, int)
    method: str = option("auto", "auto", "roll", "min")
    norm: str = option("none", "none", "ln", "bn")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.K < 1:
            raise ValueError(f"graph: K must be positive, got {self.K}.")

    @property
    def caps(self) -> Caps:
        """Needs the whole grid."""
        return Caps(grid=True)

    def build(self, dim: int, *, heads: int | None = None, context_dim: int | None = None) -> Graph:
        """Build the module for width `dim`."""
        return Graph(dim, self)


class Graph(GridMixer):
    """fc2(GELU(edges([y, relative(y)]))), y = fc1(x), a norm behind each map.

    Args:
        dim: d.
        config: the options.
    """

    def __init__(self, dim: int, config: GraphConfig) -> None:
        super().__init__(dim, config)
        self.config: GraphConfig = config
        self.fc1, self.norm1 = nn.Linear(dim, dim), build_norm(config.norm, dim)
        self.edges, self.edges_norm = nn.Linear(2 * dim, 2 * dim), build_norm(config.norm, 2 * dim)
        self.fc2, self.norm2 = nn.Linear(2 * dim, dim), build_norm(config.norm, dim)

    def mix(self, x: Tensor, grid: Grid, layout: Layout) -> Tensor:
        """Relate the tokens of the grid; those of the prefix have no neighbours."""
        first = layout.prefix
        y = self.norm1(self.fc1(x))
        above = to_tokens(relative(to_map(y[:, first:], grid), self.config.K, self.config.method), len(x))
        above = F.pad(above, (0, 0, first, 0)) if first else above
        return self.norm2(self.fc2(self.related(torch.cat([y, above], dim=-1))))

    def related(self, pairs: Tensor) -> Tensor:
        """Return [b, n, 2 d] of tokens beside what they stand above their neighbours [b, n, 2 d]."""
        return F.gelu(self.edges_norm(self.edges(pairs)))
