"""Generalised winding numbers: inside and outside of meshes that need not close.

Source: Jacobson et al. 2013, doi 10.1145/2461912.2461916.
Letters: q points, v vertices, f faces.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genkit.checks import check_shape

CHUNK = 2**24  # numbers held at a time


def winding_numbers(queries: Tensor, vertices: Tensor, faces: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the generalised winding number of a mesh around points: about 1 inside, 0 outside.

    w = sum over faces of 2 atan2(a . (b x c), |a||b||c| + (a.b)|c| + (b.c)|a| + (c.a)|b|) / 4 pi; a, b, c from the point to the corners

    Args:
        queries: [q, 3].
        vertices: [v, 3].
        faces: [f, 3], integer.
        dtype: to compute in.

    Returns:
        [q] of that type.
    """
    check_shape(queries, "winding_numbers: queries", "q 3")
    corners = vertices.to(dtype)[faces.long()]
    totals = []
    for part in queries.to(dtype).split(max(1, CHUNK // (16 * max(len(faces), 1)))):
        a, b, c = (corners[None] - part[:, None, None]).unbind(2)
        la, lb, lc = a.norm(dim=-1), b.norm(dim=-1), c.norm(dim=-1)
        volume = (a * torch.linalg.cross(b, c)).sum(-1)
        size = la * lb * lc + (a * b).sum(-1) * lc + (b * c).sum(-1) * la + (c * a).sum(-1) * lb
        totals.append(2 * torch.atan2(volume, size).sum(1))
    return torch.cat(totals) / (4 * math.pi)
