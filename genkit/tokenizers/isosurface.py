"""From a field to a mesh: marching cubes slab by slab, floaters away, a face budget.

Marching cubes is scikit-image's (Lewiner et al. 2003); slabs share a plane of points, so that the mesh is that of the whole grid.

Letters: v vertices, f faces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from skimage.measure import marching_cubes

from genkit.tokenizers.volume_decoders import no_surface
from genkit.tokenizers.volume_grid import SparseField

if TYPE_CHECKING:
    import trimesh
    from numpy.typing import NDArray

SLAB_POINTS = 2**24
FLOATER_SHARE = 0.005
FIRST_CELLS = 256  # a side of a mesh that decimation stops short at
FINE = 2**16  # vertices on shared planes are one where they agree to this part of a cell


@dataclass
class Surface:
    """Triangles in grid units.

    Args:
        vertices: [v, 3] float64, in steps of the grid.
        faces: [f, 3] int64, counter-clockwise seen from outside.
    """

    vertices: NDArray[np.float64]
    faces: NDArray[np.int64]


def lewiner(volume: NDArray[np.float32], level: float = 0.0) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return vertices and faces of a dense volume as scikit-image finds them, nan vertices beside unknown points included."""
    with np.errstate(invalid="ignore"):
        vertices, faces, _, _ = marching_cubes(volume, level, method="lewiner")
    return vertices, faces


def isosurface(field: SparseField, level: float = 0.0) -> Surface:
    """Return the surface where a field crosses a level, in steps of its grid; faces at unknown points are left out.

    Raises:
        NoSurfaceError: if there is none.
    """
    side = field.side
    depth = max(2, SLAB_POINTS // side**2)
    all_vertices, all_faces, count = [], [], 0
    for low in range(0, side - 1, depth - 1):
        slab = field.dense(low, min(low + depth, side)).float().cpu().numpy()
        known = slab[np.isfinite(slab)]
        if not len(known) or not known.min() < level < known.max():
            continue
        vertices, faces = lewiner(slab, level)
        vertices = vertices.astype(np.float64) + np.array([low, 0, 0])
        faces = faces[np.isfinite(vertices[faces]).all(axis=(1, 2))].astype(np.int64)
        all_vertices.append(vertices)
        all_faces.append(faces + count)
        count += len(vertices)
    if not any(len(faces) for faces in all_faces):
        raise no_surface(field.values)
    vertices, faces = join_planes(np.concatenate(all_vertices), np.concatenate(all_faces), depth - 1)
    return Surface(vertices, faces[:, ::-1])


def join_planes(vertices: NDArray[np.float64], faces: NDArray[np.int64], step: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Make one of vertices that two slabs have on a shared plane, and leave out vertices without faces."""
    target = np.arange(len(vertices))
    used = np.unique(faces)
    shared = used[(vertices[used, 0] % step == 0) & (vertices[used, 0] > 0)]
    if len(shared):
        _, first, inverse = np.unique((vertices[shared] * FINE).round().astype(np.int64), axis=0, return_index=True, return_inverse=True)
        target[shared] = shared[first][inverse.reshape(-1)]
    faces = target[faces]
    kept, renumbered = np.unique(faces, return_inverse=True)
    return vertices[kept], renumbered.reshape(-1, 3)


def to_mesh(surface: Surface, resolution: int, bound: float = 1.01, legacy_scale: int | None = None) -> trimesh.Trimesh:
    """Return a mesh in the shape's coordinates.

    Args:
        surface: in steps of the grid.
        resolution: of the grid.
        bound: the grid spans [-bound, bound].
        legacy_scale: the resolution that was asked for; vertices are then divided by one more than it, as the released code does, which
            shrinks and shifts the mesh.
    """
    import trimesh

    steps = resolution if legacy_scale is None else legacy_scale + 1
    return trimesh.Trimesh(surface.vertices / steps * (2 * bound) - bound, surface.faces, process=False)


def without_floaters(mesh: trimesh.Trimesh, share: float = FLOATER_SHARE) -> trimesh.Trimesh:
    """Leave out connected parts with less than a share of the faces; the largest stays."""
    import trimesh

    labels = trimesh.graph.connected_component_labels(mesh.face_adjacency, node_count=len(mesh.faces))
    counts = np.bincount(labels)
    keep = counts >= share * len(mesh.faces)
    keep[counts.argmax()] = True
    if keep.all():
        return mesh
    found = mesh.copy()
    found.update_faces(keep[labels])
    found.remove_unreferenced_vertices()
    return found


def decimated(mesh: trimesh.Trimesh, max_faces: int) -> trimesh.Trimesh:
    """Return a mesh of at most so many faces, by quadric errors.

    Where these stop too early, as they do at thin walls, close vertices are joined first, on cells that double in size until it goes on.

    Raises:
        ValueError: for fewer than four faces, or a mesh that cannot be brought down to so many.
    """
    import fast_simplification
    import trimesh

    if max_faces < 4:
        raise ValueError(f"max_faces must be at least 4 (a closed mesh), got {max_faces}.")
    if len(mesh.faces) <= max_faces:
        return mesh
    vertices, faces = mesh.vertices, mesh.faces
    cell = float(np.ptp(vertices, axis=0).max()) / FIRST_CELLS
    while len(faces) > max_faces:
        vertices, faces = fast_simplification.simplify(
            np.asarray(vertices, np.float32), np.asarray(faces, np.int32), target_count=max_faces
        )
        if len(faces) > max_faces:
            vertices, faces = _joined(np.asarray(vertices, np.float64), faces, cell)
            cell *= 2
    if not len(faces):
        raise ValueError(f"a mesh of {len(mesh.faces):,} faces cannot be brought down to {max_faces}.")
    return trimesh.Trimesh(vertices, faces, process=False)


def _joined(vertices: NDArray[Any], faces: NDArray[Any], cell: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Join the vertices [v, 3] of each cubic cell to their mean; faces [f, 3] that lose a corner, or are there twice, go."""
    _, owner = np.unique(np.floor(vertices / cell).astype(np.int64), axis=0, return_inverse=True)
    owner = owner.reshape(-1)
    means = np.stack([np.bincount(owner, axis) for axis in vertices.T], axis=1) / np.bincount(owner)[:, None]
    faces = owner[faces]
    faces = faces[(faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])]
    _, first = np.unique(np.sort(faces, axis=1), axis=0, return_index=True)
    return means, faces[np.sort(first)]
