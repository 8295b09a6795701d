"""FlashVDM's decoder: cells of space attend to the few tokens that matter to them.

A cell's tokens are chosen by some of its points, then all of its points attend to those only:

- "mean": per head, the k tokens with the largest mean of q . k over every 50th point (every 100th on the coarse grid)
- "merge": the tokens that the softmax of any 30th point, averaged over heads, gives more than 1e-6; the same for all heads
- "mass" (ours): per head, the fewest tokens that hold a share of the mean attention of every 50th point

Cells are evaluated together, padded to the largest of their group. Which points are asked depends on the order within a cell: "stable" is
raster order, "torch" the order in which the released code found them.

Source: Lai et al. 2025 (FlashVDM, arXiv 2503.16302), section 3.2, and its released code for the constants.
Letters: k points, n tokens, c cells, s tokens of a cell, hd head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genkit.blocks.attend import attend
from genkit.checks import choose
from genkit.tokenizers.shape_vae import ShapeVAE
from genkit.tokenizers.volume_decoders import RULES, ClosedQuery, ShapeQuery, check_resolution, level_resolutions, no_surface, refine
from genkit.tokenizers.volume_grid import SparseField, pack

SELECTIONS = ("mean", "merge", "mass")
COARSE_CELLS, FINE_CELLS = 4, 6  # a side
EVERY = {"coarse": 100, "mean": 50, "merge": 30, "mass": 50}
MERGED_WEIGHT = 1e-6


@dataclass(frozen=True)
class FlashDecoder:
    """Hierarchical decoding in which every cell attends to a choice of the tokens.

    Args:
        selection: one of `SELECTIONS`.
        order: of the points in a cell, "stable" or "torch".
        num_tokens: k of "mean"; a third of the tokens if None (1,024 of 3,072 and 256 of 512 as published).
        mass: share of the attention that "mass" keeps.
        rule: what may hold the surface, "band" as published, or "grow".
        min_resolution: of the coarsest grid.
        num_chunks: points at a time.
        bound: of the grid.
        closed: points at the grid's border are outside, whatever the model says.
    """

    selection: str = "mean"
    order: str = "stable"
    num_tokens: int | None = None
    mass: float = 0.999
    rule: str = "band"
    min_resolution: int = 63
    num_chunks: int = 8000
    bound: float = 1.01
    closed: bool = True

    def __post_init__(self) -> None:
        choose(self.selection, SELECTIONS, "selection")
        choose(self.order, ("stable", "torch"), "order of points")
        choose(self.rule, RULES, "rule")
        if not 0 < self.mass <= 1 or (self.num_tokens is not None and self.num_tokens < 1):
            raise ValueError(f"mass must lie in (0, 1] and num_tokens be at least 1, got {self.mass} and {self.num_tokens}.")

    def levels(self, resolution: int) -> list[int]:
        """Return the resolutions from coarse to fine; the coarsest has a side that four cells divide.

        Example:
            >>> FlashDecoder().levels(256), FlashDecoder().levels(384)
            ([63, 126, 252], [95, 190, 380])
        """
        levels = level_resolutions(resolution, self.min_resolution)
        coarse = round(levels[0] / COARSE_CELLS) * COARSE_CELLS - 1
        return [coarse * 2**i for i in range(len(levels))]

    @torch.no_grad()
    def __call__(self, vae: ShapeVAE, tokens: Tensor, resolution: int, trace: list[dict[str, Any]] | None = None) -> SparseField:
        """Return the field of a shape's tokens [n, d] on a grid of about a resolution; `trace` receives what every level found and kept.

        Raises:
            ValueError: for resolutions out of range, or tokens of several shapes.
            NoSurfaceError: if the field has no surface.
        """
        check_resolution(resolution)
        query = CellQuery(vae, tokens, self, self.levels(resolution)[0], trace)
        asked = ClosedQuery(query, self.bound) if self.closed else query
        return refine(asked, self.levels(resolution), self.bound, self.rule, trace=trace)


class CellQuery(ShapeQuery):
    """A shape that is asked cell by cell: first at the whole coarse grid, then at lists of points.

    Args:
        vae: the model.
        tokens: [n, d].
        decoder: the settings.
        coarse: resolution of the first grid.
        trace: receives the choices, or None.
    """

    def __init__(self, vae: ShapeVAE, tokens: Tensor, decoder: FlashDecoder, coarse: int, trace: list[dict[str, Any]] | None) -> None:
        super().__init__(vae, tokens, decoder.num_chunks)
        self.decoder, self.coarse, self.trace = decoder, coarse, trace
        published = {3072: 1024, 512: 256}.get(len(tokens), len(tokens) // 3)
        self.count = min(max(decoder.num_tokens or published, 1), len(tokens))

    def __call__(self, points: Tensor) -> Tensor:
        """Return logits [k] at points [k, 3]: the coarse grid at the first call, points near the surface later."""
        if not len(points):
            raise no_surface(points.new_zeros(1))
        is_coarse = not self.evaluations
        self.evaluations += len(points)
        cells = self.coarse_cells() if is_coarse else self.fine_cells(points)
        order = torch.sort(cells, stable=self.decoder.order == "stable" or is_coarse).indices
        counts = torch.bincount(cells)
        counts = counts[counts > 0]
        values = torch.empty(len(points), device=points.device)
        values[order] = self.by_cells(points[order], counts, is_coarse)
        return values

    def coarse_cells(self) -> Tensor:
        """Return the cell [k] of every point of the coarse grid."""
        side = self.coarse + 1
        axis = torch.arange(side, device=self.device) // (side // COARSE_CELLS)
        axis = axis.clamp_max(COARSE_CELLS - 1)
        grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)
        return pack(grid, COARSE_CELLS).flatten()

    @staticmethod
    def fine_cells(points: Tensor) -> Tensor:
        """Return the cell [k] of points in their box, cut in six a side; axes without extent are one cell."""
        low, high = points.amin(0), points.amax(0)
        extent = high - low
        place = ((points - low) / torch.where(extent > 0, extent, 1) * (FINE_CELLS - 0.001)).floor().long()
        return pack(place, FINE_CELLS)

    def by_cells(self, points: Tensor, counts: Tensor, is_coarse: bool) -> Tensor:
        """Return logits [k] of points in the order of their cells, which hold counts [c] of them."""
        ends = counts.cumsum(0)
        values, kept = torch.empty(len(points), device=points.device), []
        sizes = counts.tolist()
        for first, last in groups(sizes, self.chunk):
            begin, end = int(ends[first - 1]) if first else 0, int(ends[last - 1])
            length = torch.tensor(sizes[first:last], device=points.device)
            found, choice = self.group(points[begin:end], length, is_coarse)
            values[begin:end] = found
            kept.append(choice)
        if self.trace is not None:
            self.trace.append({"counts": counts, "kept": torch.cat(kept)})
        return values

    def group(self, points: Tensor, counts: Tensor, is_coarse: bool) -> tuple[Tensor, Tensor]:
        """Return the logits [k] of a few cells' points, and which tokens each cell kept [c, heads, n] bool."""
        head, widest = self.vae.head, int(counts.max())
        starts = counts.cumsum(0) - counts
        slots = torch.arange(widest, device=points.device)
        filled = slots < counts[:, None]
        rows = (starts[:, None] + slots).clamp_max(len(points) - 1)
        x, q = head.queries(self.embed(points))
        q = q[0].transpose(0, 1)[rows].transpose(1, 2)  # c heads k hd
        step = EVERY["coarse"] if is_coarse else EVERY[self.decoder.selection]
        index, valid = self.choose(q[:, :, ::step], filled[:, ::step], is_coarse)
        out = torch.empty(len(points), q.shape[1], q.shape[-1], dtype=q.dtype, device=points.device)
        keys, values = self.keys[0], self.values[0]
        heads = torch.arange(len(keys), device=points.device)[:, None]
        room = max(1, 2**25 // (index.shape[1] * index.shape[2] * keys.shape[-1]))
        for part in torch.arange(len(index), device=points.device).split(room):
            chosen = index[part]
            mask = None if bool(valid[part].all()) else valid[part][:, :, None]
            attended = attend(q[part], keys[heads, chosen], values[heads, chosen], mask=mask, scale=head.attention.scale)
            out[rows[part][filled[part]]] = attended.transpose(1, 2)[filled[part]]
        logits = head.finish(x, out.transpose(0, 1)[None])[0].float()
        kept = torch.zeros(len(index), *keys.shape[:2], dtype=torch.bool, device=points.device)
        return logits, kept.scatter_(2, index, valid)

    def choose(self, q: Tensor, filled: Tensor, is_coarse: bool) -> tuple[Tensor, Tensor]:
        """Return the chosen tokens [c, heads, s] and which of these entries count.

        Args:
            q: [c, heads, k, hd] queries of the points that are asked.
            filled: [c, k] bool, which of them exist.
            is_coarse: the coarse grid takes "mean" whatever the selection is.
        """
        keys, selection = self.keys[0], "mean" if is_coarse and self.decoder.selection == "merge" else self.decoder.selection
        if selection == "mean":
            weight = filled.to(q.dtype) / filled.sum(1, keepdim=True)
            scores = torch.einsum("chd,hnd->chn", torch.einsum("chkd,ck->chd", q, weight), keys)
            index = scores.topk(self.count, dim=-1).indices
            return index, torch.ones_like(index, dtype=torch.bool)
        scale = 1.0 if selection == "merge" else self.vae.head.attention.scale
        found = torch.stack([self.attention_of(part, use, scale, selection) for part, use in zip(q, filled, strict=True)])
        if selection == "merge":
            wanted = found > MERGED_WEIGHT
        else:
            ordered, place = found.sort(dim=-1, descending=True)
            before = ordered.cumsum(-1) - ordered
            wanted = torch.zeros_like(found, dtype=torch.bool).scatter_(2, place, before < self.decoder.mass)
        most = int(wanted.sum(-1).max())
        valid, index = wanted.to(torch.uint8).sort(dim=-1, descending=True, stable=True)
        return index[..., :most], valid[..., :most].bool()

    def attention_of(self, q: Tensor, use: Tensor, scale: float, selection: str) -> Tensor:
        """Return one cell's attention [heads, n] of the points that are asked: the largest mean over heads, or the mean over points."""
        weights = (q[:, use] @ self.keys[0].transpose(1, 2) * scale).float().softmax(-1)
        if selection == "merge":
            return weights.mean(0, keepdim=True).amax(1).expand(len(weights), -1)
        return weights.mean(1)


def groups(sizes: list[int], most: int) -> list[tuple[int, int]]:
    """Return ranges of neighbouring cells with at most so many padded points together, at least one cell each."""
    found, first, widest = [], 0, 0
    for i, size in enumerate(sizes):
        widest = max(widest, size)
        if i > first and widest * (i + 1 - first) > most:
            found.append((first, i))
            first, widest = i, size
    return [*found, (first, len(sizes))] if sizes else []
