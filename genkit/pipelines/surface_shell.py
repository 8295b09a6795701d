"""A new surface around a mesh: marching cubes of the unsigned distance, which closes holes, joins parts and forgets the triangulation.

What MeshAnything does on request before it samples points. The shell has two walls, one inside the other.

Letters: p points, f faces, c cells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from genkit.data.mesh_fields import triangle_distances
from genkit.tokenizers.isosurface import lewiner

if TYPE_CHECKING:
    import trimesh
    from numpy.typing import NDArray

SCALE = 0.95
CELL = 8  # grid points a side that are looked at together
DEPTHS = range(4, 11)


def unsigned_field(triangles: Tensor, size: int, band: float) -> NDArray[Any]:
    """Return the distance to triangles at grid points 2 i / size - 1, exact up to `band` and some larger number beyond.

    Args:
        triangles: [f, 3, 3]; float64 for the digits of the published surface.
        size: points a side, a multiple of 8.
        band: above 0.

    Returns:
        [size, size, size], axes x, y, z.
    """
    axis = 2 * torch.arange(size, dtype=triangles.dtype) / size - 1
    field = triangles.new_full((size, size, size), 4.0)
    cells = axis.view(-1, CELL)
    low, high = cells[:, 0] - band, cells[:, -1] + band  # what a triangle has to reach to matter to a cell
    reaches = (triangles.amin(1)[:, :, None] <= high) & (triangles.amax(1)[:, :, None] >= low)  # f, axis, cells
    for x in range(len(cells)):
        in_slab = triangles[reaches[:, 0, x]]
        rows, columns = reaches[reaches[:, 0, x], 1], reaches[reaches[:, 0, x], 2]
        for y in range(len(cells)):
            for z in range(len(cells)):
                own = in_slab[rows[:, y] & columns[:, z]]
                if not len(own):
                    continue
                spans = tuple(slice(CELL * k, CELL * k + CELL) for k in (x, y, z))
                points = torch.stack(torch.meshgrid(*(axis[span] for span in spans), indexing="ij"), -1).view(-1, 3)
                field[spans] = triangle_distances(points, own).view(CELL, CELL, CELL)
    found: NDArray[Any] = field.numpy()
    return found


def surface_shell(mesh: trimesh.Trimesh, depth: int = 7, scale: float | None = None) -> trimesh.Trimesh:
    """Return the shell around a mesh at a distance of one grid step, at the mesh's place and size.

    Args:
        mesh: any mesh.
        depth: the grid has 2^depth points a side.
        scale: half of the mesh's longest side in a grid that spans [-1, 1]; if None 0.95, or what leaves the shell whole.

    Raises:
        ValueError: for a depth out of range, or a mesh without extent.
    """
    import trimesh

    if depth not in DEPTHS:
        raise ValueError(f"the depth of the grid must lie in {DEPTHS.start}..{DEPTHS.stop - 1}, got {depth}.")
    vertices: NDArray[Any] = np.asarray(mesh.vertices, np.float64)
    low, high = vertices.min(0), vertices.max(0)
    side = float((high - low).max())
    if not np.isfinite(vertices).all() or not side > 0:
        raise ValueError("the mesh has no extent, or vertices that are not finite.")
    size = 2**depth
    scale = min(SCALE, 1 - 6 / size) if scale is None else scale
    centre, factor = (low + high) / 2, 2 * scale / side
    triangles = torch.from_numpy(((vertices - centre) * factor)[np.asarray(mesh.faces)])
    level = 2 / size
    field = unsigned_field(triangles, size, level * 3)
    found, faces = lewiner(field, level)
    return trimesh.Trimesh((2 * found / size - 1) / factor + centre, faces, process=False)
