"""Attention inside groups of equally many tokens that follow each other in some order: O(n) for points, sparse voxels and mesh tokens.

Sources: Liu et al., FlatFormer, CVPR 2023, arXiv 2301.08739 (snakes through windows); Morton order as in Wu et al., Point Transformer V3,
2024, arXiv 2312.10035.
Letters: b batch, n tokens, d width, g groups, s tokens of a group, hd head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.attend import attend
from genkit.blocks.caps import Cache, Caps, Context, MixerConfig, TokenMixer, option, refusal, refuse_arguments, register
from genkit.blocks.embeddings import point_sincos
from genkit.blocks.heads import head_count, join_heads, split_heads
from genkit.blocks.layout import Layout
from genkit.checks import check_shape

MORTON_BITS = 20  # of each coordinate; three of them fit an int64


@register("group")
@dataclass(frozen=True)
class GroupConfig(MixerConfig):
    """Options of attention in groups.

    Args:
        size: s. The last group of a sequence that s does not divide takes its missing tokens from the one before, as keys only.
        order: what follows what: the tokens as they come ("given"), a snake through windows of the last two coordinates ("snake"), or
            Morton order of cells of all coordinates ("morton"). Tokens at one place keep the order in which they come.
        axis: coordinate along which the snake runs, 0 or 1.
        window: sides of the snake's windows, or of Morton's cells, in units of the coordinates.
        shift: windows begin half a window (rounded down) earlier. Blocks that alternate in `axis` and `shift` let groups exchange.
        heads: number of heads; the model's default if None.
        qkv_bias: biases of the query, key and value projections.
        out_bias: bias of the output projection.
        pos: what queries and keys see beside the tokens: nothing, or sines of the last two coordinates ("sincos").
        pos_scale: factors of those coordinates.
    """

    size: int = option(64, int)
    order: str = option("given", "given", "snake", "morton")
    axis: int = option(0, int)
    window: tuple[float, float] = option((8, 8), tuple)
    shift: bool = option(False, bool)
    heads: int | None = option(None, int, None)
    qkv_bias: bool = option(True, bool)
    out_bias: bool = option(True, bool)
    pos: str = option("none", "none", "sincos")
    pos_scale: tuple[float, float] = option((1, 1), tuple)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1 or self.axis not in (0, 1):
            raise ValueError(f"group: size must be positive and axis 0 or 1, got size={self.size}, axis={self.axis}.")
        for name in ("window", "pos_scale"):
            pair = getattr(self, name)
            if len(pair) != 2 or not all(isinstance(side, (int, float)) and side > 0 for side in pair):
                raise ValueError(f"group: {name} must be two numbers above 0, got {pair}.")

    @property
    def caps(self) -> Caps:
        """A set operation where positions decide the order."""
        return Caps(set_op=self.order != "given")

    def build(self, dim: int, *, heads: int | None = None, context_dim: int | None = None) -> GroupAttention:
        """Build the module for width `dim`."""
        return GroupAttention(dim, self, head_count("group", self.heads, heads, dim))


def group_places(tokens: int, size: int, device: torch.device | None = None) -> Tensor:
    """Return which tokens stand in each group, [g, s] places in their order; the first n of them, read on, are 0, 1, 2, ...

    Example:
        >>> group_places(5, 3).tolist()
        [[0, 1, 2], [3, 4, 2]]
    """
    size = min(size, tokens)
    places = torch.arange(math.ceil(tokens / size) * size, device=device)
    return torch.where(places < tokens, places, places - size).view(-1, size)


def lexicographic(keys: list[Tensor]) -> Tensor:
    """Return the order [..., n] that sorts tokens by the first key [..., n], then the second, ...; equal ones stay as they come."""
    order = torch.argsort(keys[-1], dim=-1, stable=True)
    for key in reversed(keys[:-1]):
        order = order.gather(-1, torch.argsort(key.gather(-1, order), dim=-1, stable=True))
    return order


def snake_order(pos: Tensor, window: tuple[float, float], axis: int = 0, shift: bool = False) -> Tensor:
    """Return the order [..., n] of points [..., n, 2]: rows of windows, to and fro, and inside a window columns, to and fro.

    Args:
        pos: coordinates.
        window: sides.
        axis: coordinate along which the rows run.
        shift: windows begin half a window earlier.
    """
    moved = [pos[..., i] + (window[i] // 2 if shift else 0) for i in (axis, 1 - axis)]
    (along, inside_along), (across, inside_across) = (
        (torch.floor(x / side), torch.remainder(x, side)) for x, side in zip(moved, (window[axis], window[1 - axis]), strict=True)
    )
    turn, column = (1 - 2 * torch.remainder(x, 2) for x in (across, inside_along.floor()))
    return lexicographic([across, turn * along, turn * inside_along, turn * column * inside_across])


def morton_order(pos: Tensor, cell: tuple[float, float]) -> Tensor:
    """Return the order [..., n] of points [..., n, axes] along the Morton curve: bits of the cells' numbers in turn.

    Args:
        pos: coordinates of one to three axes; the smallest of a set are at 0, and cells beyond number 2^20 - 1 are one with it.
        cell: sides of the cells by the last two coordinates; a third has the first one's.
    """
    sides = torch.tensor([cell[0], *cell][-pos.shape[-1] :], device=pos.device, dtype=pos.dtype)
    cells = torch.floor((pos - pos.amin(-2, keepdim=True)) / sides).long().clamp(max=2**MORTON_BITS - 1)
    bits = (cells[..., None] >> torch.arange(MORTON_BITS, device=pos.device)) & 1
    axes = pos.shape[-1]
    places = torch.arange(MORTON_BITS, device=pos.device) * axes + torch.arange(axes - 1, -1, -1, device=pos.device)[:, None]
    return lexicographic([(bits << places).sum((-1, -2))])


class GroupAttention(TokenMixer):
    """softmax(q k^T hd^-0.5) v in groups, with projections `q`, `kv` (rows k then v, heads contiguous) and `proj`.

    Args:
        dim: d, a multiple of heads.
        config: the options.
        heads: number of heads.
    """

    def __init__(self, dim: int, config: GroupConfig, heads: int) -> None:
        super().__init__()
        self.config: GroupConfig = config
        self.heads, self.dim = heads, dim
        self.q = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=config.qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=config.out_bias)

    def forward(
        self,
        x: Tensor,
        *,
        layout: Layout | None = None,
        context: Context | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Attend in the groups.

        Args:
            x: [b, n, d].
            layout: with positions or a grid, unless order="given" and pos="none"; tokens in front of a grid lie at its origin.
            context, mask, cache: not taken.

        Returns:
            [b, n, d].

        Raises:
            ValueError: for arguments that are not taken, or without the positions that the order needs.
        """
        refuse_arguments(self.config, context=context, mask=mask, cache=cache)
        sizes = check_shape(x, "GroupAttention: x", "b n d", d=self.dim)
        if not sizes["n"]:
            return self.proj(x)
        order = self.order(layout, sizes["n"], x.device)
        out = self.in_groups(x, order, layout).flatten(1, 2)[:, : sizes["n"]]
        if order is not None:
            back = order.argsort(dim=1).expand(len(x), -1)
            out = out.gather(1, back[..., None].expand_as(out))
        return out

    def order(self, layout: Layout | None, tokens: int, device: torch.device) -> Tensor | None:
        """Return which token comes first, second, ..., [b|1, n]; None for as they come."""
        config, known = self.config, Layout() if layout is None else layout
        if config.order == "given":
            return None
        if config.order == "snake":
            options = (config.window, config.axis, config.shift)
            return known.memo(("snake", *options, device), lambda: snake_order(known.positions(2, tokens, device), *options))
        axes = min(3, known.pos.shape[-1] if known.pos is not None else len(known.grid or (0, 0)))
        return known.memo(("morton", config.window, device), lambda: morton_order(known.positions(axes, tokens, device), config.window))

    def in_groups(self, x: Tensor, order: Tensor | None, layout: Layout | None = None) -> Tensor:
        """Return what the tokens of each group get [b, g, s, d], those it borrows too.

        Args:
            x: [b, n, d].
            order: from `order`.
            layout: of the tokens.
        """
        b, n, _ = x.shape
        seen = x if self.config.pos == "none" else x + self._sines(layout, n, x)
        places = group_places(n, self.config.size, x.device)
        index = places.flatten()[None] if order is None else order[:, places.flatten()]

        def fold(tokens: Tensor) -> Tensor:
            taken = tokens.gather(1, index[..., None].expand(b, -1, self.dim))
            return split_heads(taken.reshape(b * len(places), -1, self.dim), self.heads)

        bias = (None, None) if self.kv.bias is None else self.kv.bias.chunk(2)
        k, v = (F.linear(tokens, weight, part) for tokens, weight, part in zip((seen, x), self.kv.weight.chunk(2), bias, strict=True))
        out = join_heads(attend(fold(self.q(seen)), fold(k), fold(v)))
        return self.proj(out).unflatten(0, (b, len(places)))

    def _sines(self, layout: Layout | None, tokens: int, like: Tensor) -> Tensor:
        """Return what queries and keys see beside the tokens, [b|1, n, d]."""
        known, scale = Layout() if layout is None else layout, self.config.pos_scale

        def make() -> Tensor:
            pos = known.positions(2, tokens, like.device)
            return point_sincos(pos * torch.tensor(scale, device=like.device, dtype=torch.float32), self.dim)

        return known.memo(("point_sincos", self.dim, scale, like.device), make).to(like.dtype)

    def new_cache(self, batch: int, max_len: int, *, device: torch.device | str, dtype: torch.dtype) -> None:
        """Refuse: groups are cut from all tokens."""
        raise refusal(self.config, "cache")
