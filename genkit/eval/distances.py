"""Distances between rows of features in float64: chunked, exact for copies.

|u - v|^2 = |u|^2 + |v|^2 - 2 u.v costs one matrix product, but cancels where two rows are close; such pairs are computed again from the
difference, so that a copy has distance 0 (float32 products give 0.016 at d = 2048, which turns ties into accidents).

Letters: n, m rows, d features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from genkit.checks import check_shape

CLOSE = 1e-9  # share of |u|^2 + |v|^2 below which a squared distance is computed from the difference
CHUNK = 2**24  # distances held at a time, 128 MB


def squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """Return squared Euclidean distances [n, m], float64, of rows [n, d] and [m, d]."""
    u, v = first.double(), second.double()
    sizes = u.square().sum(1)[:, None] + v.square().sum(1)
    squared = sizes - 2 * (u @ v.T)
    rows, columns = (squared < CLOSE * sizes).nonzero(as_tuple=True)
    for part in range(0, len(rows), 65536):
        i, j = rows[part : part + 65536], columns[part : part + 65536]
        squared[i, j] = (u[i] - v[j]).square().sum(1)
    return squared.clamp_(min=0)


def distance_blocks(first: Tensor, second: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, distances [rows, m]), float64, a bounded number of rows of `first` [n, d] at a time against all of `second` [m, d].

    Raises:
        ValueError: if the two do not have the same number of features, or one has no row.
    """
    dim = check_shape(first, "distances: first", "n d")["d"]
    check_shape(second, "distances: second", "m d", d=dim)
    if not len(first) or not len(second):
        raise ValueError(f"distances: both sets need samples, got {len(first)} and {len(second)}.")
    step = max(1, CHUNK // len(second))
    for start in range(0, len(first), step):
        rows = slice(start, min(start + step, len(first)))
        yield rows, squared_distances(first[rows], second).sqrt()


def neighbour_radii(features: Tensor, k: int) -> Tensor:
    """Return each row's distance to its k-th neighbour, itself left out: [n] float64 for rows [n, d].

    Raises:
        ValueError: if there are not more than k rows.
    """
    if k < 1 or len(features) <= k:
        raise ValueError(f"the {k}-th neighbour needs k of at least 1 and more than k samples, got {len(features)} samples.")
    return torch.cat([block.kthvalue(k + 1, dim=1).values for _, block in distance_blocks(features, features)])
