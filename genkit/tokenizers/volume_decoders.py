"""From the tokens of a shape to its field on a grid: everywhere, or only near the surface, level by level.

| decoder | evaluates | equals dense |
|---|---|---|
| `DenseDecoder` | all points | is it |
| `HierarchicalDecoder` | a coarse grid, then what may hold the surface | the same mesh |
| `FlashDecoder` | the same, each cell attending to few tokens | nearly, see `genkit.tokenizers.adaptive_kv` |

Two rules say what may hold the surface. "grow" (ours): cells whose corners differ in sign, and those whose own slope would reach zero half
a step further; then, on every level, the neighbours across faces that the surface crosses, until it closes. "band" (published): points
whose sign differs from a neighbour's or whose logit is below 0.95, widened twice. Both miss what no point of the coarse grid sees.

Source: Lai et al. 2025 (FlashVDM, arXiv 2503.16302), section 3.2. Published defects are left out: there the fine points of the hierarchical
decoder collapse to one, keys and values are computed for every chunk, and volumes are dense.
Letters: k points, n tokens, d width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genkit.checks import choose
from genkit.tokenizers.shape_vae import ShapeVAE
from genkit.tokenizers.volume_grid import SparseField, children, coordinates, corner_keys, dilate, pack, sign_changes, take, unpack

LEAST, MOST = 4, 1024
NEAR = 0.95  # logits saturate at 1
BORDER = 1e-5  # rounding of coordinates, as a share of the bound
RULES = ("grow", "band")
EDGES = tuple((a, b) for a in range(8) for b in range(a + 1, 8) if (a ^ b) in (1, 2, 4))  # pairs of the corners of a cell
FACES = tuple((axis, end, tuple(c for c in range(8) if (c >> axis & 1) == end)) for axis in range(3) for end in (0, 1))


class NoSurfaceError(ValueError):
    """The field has no surface inside the grid."""


class ShapeQuery:
    """A shape that can be asked at points, its keys and values computed once.

    Args:
        vae: the model.
        tokens: [n, d] of one shape, from `ShapeVAE.decode`.
        chunk: points at a time.
    """

    def __init__(self, vae: ShapeVAE, tokens: Tensor, chunk: int = 8000) -> None:
        if tokens.ndim != 2:
            raise ValueError(
                f"a decoder takes the tokens [n, d] of one shape, got {list(tokens.shape)}; decode shapes one after the other."
            )
        if chunk < 1:
            raise ValueError(f"num_chunks must be at least 1 point at a time, got {chunk}.")
        self.vae, self.chunk, self.evaluations = vae, chunk, 0
        self.keys, self.values = vae.head.keys_values(tokens[None])
        self.dtype, self.device = tokens.dtype, tokens.device

    def embed(self, points: Tensor) -> Tensor:
        """Return embedded points [1, k, 3 + 6 f] of points [k, 3]."""
        return self.vae.embed(points)[None].to(self.dtype)

    def __call__(self, points: Tensor) -> Tensor:
        """Return logits [k] fp32 at points [k, 3] fp32."""
        self.evaluations += len(points)
        parts = [self.vae.head(self.embed(part), self.keys, self.values)[0].float() for part in points.split(self.chunk)]
        return torch.cat(parts)


class ClosedQuery:
    """A query under which the border of the grid is outside, so that every shape closes, also one that a model lets run beyond the grid.

    Args:
        query: points [k, 3] -> logits [k].
        bound: the grid spans [-bound, bound].
    """

    def __init__(self, query: ShapeQuery, bound: float) -> None:
        self.query, self.bound, self.device = query, bound, query.device

    @property
    def evaluations(self) -> int:
        """Points at which the head was asked."""
        return self.query.evaluations

    def __call__(self, points: Tensor) -> Tensor:
        """Return logits [k] at points [k, 3].

        Raises:
            NoSurfaceError: if the first points, the whole of a grid, are all inside: then the border is not that of a shape.
        """
        is_first, values = not self.query.evaluations, self.query(points)
        if is_first and len(values) and bool((values > 0).all()):
            raise no_surface(values)
        at_border = points.abs().amax(1) >= self.bound * (1 - BORDER)
        return torch.where(at_border & (values > 0), -values, values)


def level_resolutions(resolution: int, least: int) -> list[int]:
    """Return the resolutions from coarse to fine: halved while at least `least`."""
    levels = [resolution]
    while levels[0] // 2 >= least:
        levels.insert(0, levels[0] // 2)
    return [levels[0] * 2**i for i in range(len(levels))]


def check_resolution(resolution: int) -> None:
    """Refuse resolutions that no decoder takes.

    Raises:
        ValueError: naming the memory that a dense grid would need.
    """
    if not LEAST <= resolution <= MOST:
        need = 4 * (resolution + 1) ** 3 / 1e9
        raise ValueError(f"octree_resolution must lie in {LEAST} .. {MOST}, got {resolution} (a dense grid of {need:,.1f} GB).")


@dataclass(frozen=True)
class DenseDecoder:
    """Evaluate every point.

    Args:
        num_chunks: points at a time.
        bound: of the grid.
        closed: points at the grid's border are outside, whatever the model says.
    """

    num_chunks: int = 8000
    bound: float = 1.01
    closed: bool = True

    @torch.no_grad()
    def __call__(self, vae: ShapeVAE, tokens: Tensor, resolution: int) -> SparseField:
        """Return the field of a shape's tokens [n, d] on a grid of a resolution.

        Raises:
            ValueError: for resolutions out of range, or tokens of several shapes.
        """
        check_resolution(resolution)
        query = ShapeQuery(vae, tokens, self.num_chunks)
        total = (resolution + 1) ** 3
        values = torch.empty(total, device=tokens.device)
        for start in range(0, total, self.num_chunks):
            keys = torch.arange(start, min(start + self.num_chunks, total), device=tokens.device)
            values[start : start + len(keys)] = query(coordinates(keys, resolution, self.bound))
        if self.closed and bool((values <= 0).any()):
            cube = values.view(3 * [resolution + 1])
            for axis in range(3):
                for side in (cube.select(axis, 0), cube.select(axis, -1)):
                    side.copy_(-side.abs())
        return SparseField(resolution, self.bound, None, values, query.evaluations)


@dataclass(frozen=True)
class HierarchicalDecoder:
    """Evaluate a coarse grid, then finer ones where the surface may be.

    Args:
        rule: "grow" or "band", see above.
        min_resolution: of the coarsest grid; it must see every part of the shape.
        margin: how many half steps the grow rule follows a cell's slope.
        num_chunks: points at a time.
        bound: of the grid.
        closed: points at the grid's border are outside, whatever the model says.
    """

    rule: str = "grow"
    min_resolution: int = 63
    margin: float = 1.0
    num_chunks: int = 8000
    bound: float = 1.01
    closed: bool = True

    def __post_init__(self) -> None:
        choose(self.rule, RULES, "rule")

    @torch.no_grad()
    def __call__(self, vae: ShapeVAE, tokens: Tensor, resolution: int, trace: list[dict[str, Any]] | None = None) -> SparseField:
        """Return the field of a shape's tokens [n, d] on a grid of a resolution; `trace` receives what every level found.

        Raises:
            ValueError: for resolutions out of range, or tokens of several shapes.
            NoSurfaceError: if the field has no surface.
        """
        check_resolution(resolution)
        query = ShapeQuery(vae, tokens, self.num_chunks)
        levels = level_resolutions(resolution, self.min_resolution)
        if levels[-1] != resolution:
            divisor = 2 ** (len(levels) - 1)
            raise ValueError(
                f"octree_resolution={resolution} cannot be halved {len(levels) - 1} times; choose a multiple of {divisor}, "
                f"{resolution // divisor * divisor} say, or a larger min_resolution."
            )
        return refine(ClosedQuery(query, self.bound) if self.closed else query, levels, self.bound, self.rule, self.margin, trace)


def refine(
    query: Any, levels: list[int], bound: float, rule: str, margin: float = 1.0, trace: list[dict[str, Any]] | None = None
) -> SparseField:
    """Evaluate the coarsest level wholly and each finer one where the rule says.

    Args:
        query: points [k, 3] -> logits [k]; has `device` and `evaluations`.
        levels: resolutions, each twice the one before.
        bound: of the grid.
        rule: one of `RULES`.
        margin: of the grow rule.
        trace: receives the keys, values and resolution of every level.

    Raises:
        NoSurfaceError: if nothing remains to refine.
    """
    keys: Tensor | None = None
    everywhere = torch.arange((levels[0] + 1) ** 3, device=query.device)
    values = query(coordinates(everywhere, levels[0], bound))
    cells = torch.arange(levels[0] ** 3, device=query.device)
    for i, resolution in enumerate(levels):
        if i:
            coarse = levels[i - 1]
            if rule == "grow":
                cells = children(may_hold_surface(cells, keys, values, coarse, margin), coarse)
                wanted = corner_keys(cells, resolution).unique()
            else:
                wanted = band(keys, values, coarse, is_last=resolution == levels[-1])
            if not len(wanted):
                raise no_surface(values)
            keys, values = wanted, query(coordinates(wanted, resolution, bound))
            if rule == "grow":
                cells, keys, values = grow(query, cells, keys, values, resolution, bound)
        if trace is not None:
            trace.append({"resolution": resolution, "keys": keys, "values": values})
    if not bool((values > 0).any() and (values < 0).any()):
        raise no_surface(values)
    return SparseField(levels[-1], bound, keys, values, query.evaluations)


def no_surface(values: Tensor) -> NoSurfaceError:
    """Return the error for a field without a surface."""
    low, high = float(values.min()), float(values.max())
    return NoSurfaceError(f"no surface found: the field lies in [{low:.3g}, {high:.3g}] and does not cross 0 inside the grid.")


def may_hold_surface(cells: Tensor, keys: Tensor | None, values: Tensor, resolution: int, margin: float) -> Tensor:
    """Return the cells that may hold the surface: corners of both signs, or one that the cell's own slope would bring to zero.

    Args:
        cells: [c], all corners known.
        keys, values: of the points.
        resolution: of their grid.
        margin: half steps that the slope is followed.
    """
    kept = []
    for part in cells.split(1_000_000):
        at_corners, _ = take(keys, values, corner_keys(part, resolution))
        inside = at_corners > 0
        slope = torch.stack([(at_corners[:, a] - at_corners[:, b]).abs() for a, b in EDGES]).amax(0)
        reached = at_corners.abs().amin(1) < 0.5 * margin * slope
        kept.append(part[(inside.any(1) & ~inside.all(1)) | reached])
    return torch.cat(kept)


def grow(query: Any, cells: Tensor, keys: Tensor, values: Tensor, resolution: int, bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """Follow the surface into cells that were not evaluated, until it leaves them nowhere; return cells, keys and values, sorted."""
    newest = cells
    while len(newest):
        inside = take(keys, values, corner_keys(newest, resolution))[0] > 0
        place, found = unpack(newest, resolution), []
        for axis, end, corners in FACES:
            crossed = inside[:, corners].any(1) & ~inside[:, corners].all(1)
            coordinate = place[:, 2 - axis]
            stays = coordinate < resolution - 1 if end else coordinate > 0
            found.append(newest[crossed & stays] + (1 if end else -1) * resolution**axis)
        reached = torch.cat(found).unique()
        newest = reached[~take(cells, cells, reached)[1]]
        points = corner_keys(newest, resolution).unique()
        points = points[~take(keys, values, points)[1]]
        if len(points):
            keys, order = torch.cat([keys, points]).sort()
            values = torch.cat([values, query(coordinates(points, resolution, bound))])[order]
        cells = torch.cat([cells, newest]).sort().values
    return cells, keys, values


def band(keys: Tensor | None, values: Tensor, resolution: int, is_last: bool) -> Tensor:
    """Return the points of the next level by the published rule.

    Args:
        keys, values: of the points of this level.
        resolution: of its grid.
        is_last: whether the next level is the last.
    """
    side = resolution + 1
    near = sign_changes(keys, values, side) | (values.abs() < NEAR)
    chosen = near.nonzero()[:, 0] if keys is None else keys[near]
    if not is_last:
        chosen = dilate(chosen, side)
    fine = pack(2 * unpack(chosen, side), 2 * resolution + 1)
    for _ in range(2 if is_last else 1):
        fine = dilate(fine, 2 * resolution + 1)
    return fine
