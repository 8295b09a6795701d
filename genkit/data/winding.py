"""Generalised winding numbers: inside and outside of meshes that need not close.

Source: Jacobson et al. 2013, doi 10.1145/2461912.2461916.
Letters: q points, v vertices, f faces.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genkit.checks import check_shape

CHUNK = 2**17  # point-face pairs at a time: 1 MB a number, so that they stay in a processor's cache


def winding_numbers(queries: Tensor, vertices: Tensor, faces: Tensor) -> Tensor:
    """Return the generalised winding number of a mesh around points: about 1 inside, 0 outside.

    w = sum over faces of 2 atan2(a . (b x c), |a||b||c| + (a.b)|c| + (b.c)|a| + (c.a)|b|) / 4 pi; a, b, c from the point to the corners

    The products follow from what belongs to the faces alone and from distances to vertices: with corners A, B, C and a point q,
    a . (b x c) = A . (B x C) - q . (A x B + B x C + C x A), and 2 a.b = |a|^2 + |b|^2 - |A - B|^2.

    Args:
        queries: [q, 3].
        vertices: [v, 3].
        faces: [f, 3], integer.

    Returns:
        [q] float64, computed in float64.
    """
    check_shape(queries, "winding_numbers: queries", "q 3")
    points, i, j, k = vertices.double(), *faces.long().unbind(1)
    a, b, c = points[i], points[j], points[k]
    normal = torch.linalg.cross(a, b) + torch.linalg.cross(b, c) + torch.linalg.cross(c, a)
    offset = (a * torch.linalg.cross(b, c)).sum(1)
    ab, bc, ca = ((x - y).square().sum(1) for x, y in ((a, b), (b, c), (c, a)))
    totals = []
    for part in queries.double().split(max(1, CHUNK // max(len(faces), 1))):
        away = torch.cdist(part, points, compute_mode="donot_use_mm_for_euclid_dist")
        la, lb, lc = away[:, i], away[:, j], away[:, k]
        sa, sb, sc = la.square(), lb.square(), lc.square()
        size = la * lb * lc + 0.5 * ((sa + sb - ab) * lc + (sb + sc - bc) * la + (sc + sa - ca) * lb)
        totals.append(2 * torch.atan2(offset - part @ normal.T, size).sum(1))
    return torch.cat(totals) / (4 * math.pi)
