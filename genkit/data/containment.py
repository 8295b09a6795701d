"""Inside and outside of closed meshes: faces that a ray from each point crosses, odd in number inside.

For meshes of marching cubes, of tens of thousands of small faces: a face is compared with the few points above or below it only. Meshes
that do not close need `genkit.data.winding`.

Letters: q points, v vertices, f faces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import trimesh

PAIRS = 2**22  # of a face and a cell, at a time
MOST_CELLS = 512  # a side


def contains(vertices: NDArray[Any], faces: NDArray[Any], points: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which points [q] lie inside a closed mesh, by the faces that a ray in z crosses.

    Args:
        vertices: [v, 3].
        faces: [f, 3].
        points: [q, 3].
    """
    corners, at = np.asarray(vertices, np.float64)[np.asarray(faces, np.int64)], np.asarray(points, np.float64)
    if not len(corners) or not len(at):
        return np.zeros(len(at), bool)
    low, high = corners[..., :2].min((0, 1)), corners[..., :2].max((0, 1))
    side = int(np.clip(np.sqrt(len(at)), 1, MOST_CELLS))
    unit = np.maximum((high - low) / side, 1e-300)

    def cells_of(places: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.clip(((places - low) / unit).astype(np.int64), 0, side - 1)

    near = np.flatnonzero(((at[:, :2] >= low) & (at[:, :2] <= high)).all(1))
    cell = cells_of(at[near, :2])
    order = np.argsort(cell[:, 0] * side + cell[:, 1], kind="stable")
    near, number = near[order], (cell[:, 0] * side + cell[:, 1])[order]
    begins = np.searchsorted(number, np.arange(side * side + 1))
    first, last = cells_of(corners[..., :2].min(1)), cells_of(corners[..., :2].max(1))
    spans = last - first + 1
    crossings = np.zeros(len(at), np.int64)
    counts = spans.prod(1)
    for part in np.array_split(np.arange(len(corners)), max(1, int(counts.sum()) // PAIRS + 1)):
        face = np.repeat(part, counts[part])
        place = np.arange(len(face)) - np.repeat(np.cumsum(counts[part]) - counts[part], counts[part])
        cells = (first[face, 0] + place // spans[face, 1]) * side + first[face, 1] + place % spans[face, 1]
        held = begins[cells + 1] - begins[cells]
        face, start = np.repeat(face, held), np.repeat(begins[cells], held)
        point = near[start + np.arange(len(face)) - np.repeat(np.cumsum(held) - held, held)]
        np.add.at(crossings, point[_crosses(corners[face], at[point])], 1)
    return crossings % 2 == 1


def contains_mostly(mesh: trimesh.Trimesh, points: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which points [q] lie inside a mesh with at most a few holes: of a closed one by one ray, else what two of three rays say."""
    if mesh.is_watertight:
        return contains(mesh.vertices, mesh.faces, points)
    turns = [np.roll(np.arange(3), k) for k in range(3)]
    votes = [contains(np.asarray(mesh.vertices)[:, turn], mesh.faces, np.asarray(points)[:, turn]) for turn in turns]
    found: NDArray[np.bool_] = np.sum(votes, axis=0) >= 2
    return found


def _crosses(corners: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which faces [k, 3, 3] lie above points [k, 3]."""
    (ax, ay, az), (bx, by, bz), (cx, cy, cz) = (corners[:, i].T for i in range(3))
    x, y, z = points.T
    area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
    with np.errstate(divide="ignore", invalid="ignore"):
        u = ((bx - x) * (cy - y) - (cx - x) * (by - y)) / area
        v = ((cx - x) * (ay - y) - (ax - x) * (cy - y)) / area
        w = 1 - u - v
        found: NDArray[np.bool_] = (u >= 0) & (v >= 0) & (w >= 0) & (u * az + v * bz + w * cz > z)
    return found
