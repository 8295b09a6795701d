"""Points on the surface of a mesh: uniform by area, and on sharp edges.

A row is position, unit normal, and 0 for a uniform or 1 for a sharp-edge point: what `ShapeVAE` encodes.

Source: Chen et al. 2024 (Dora, arXiv 2412.17808) for sharp-edge sampling, with the constants of the Hunyuan3D releases.
Letters: v vertices, f faces, p points.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import trimesh
    from numpy.typing import NDArray

LIMIT = 0.9999
SHARP_COSINE = 0.985
MOST_FACES = 10_000_000


def normalised(mesh: trimesh.Trimesh) -> tuple[trimesh.Trimesh, NDArray[np.float64], float]:
    """Return a mesh whose box is centred and whose longest side is 2 * 0.9999, and the centre and factor: new = (old - centre) * factor.

    Raises:
        ValueError: for meshes without faces, with too many, with numbers that are not finite, or without extent.
    """
    vertices = np.asarray(mesh.vertices, np.float64)
    if not len(mesh.faces) or not len(vertices):
        raise ValueError("the mesh has no faces; give a mesh with a surface.")
    if len(mesh.faces) > MOST_FACES:
        raise ValueError(f"the mesh has {len(mesh.faces):,} faces, more than {MOST_FACES:,}; decimate it first.")
    if not np.isfinite(vertices).all():
        bad = int((~np.isfinite(vertices).all(1)).sum())
        raise ValueError(f"{bad} of {len(vertices)} vertices are not finite; repair the mesh.")
    low, high = vertices.min(0), vertices.max(0)
    side = float((high - low).max())
    if not side > 0:
        raise ValueError("the mesh has no extent: all vertices are in one place.")
    centre, factor = (low + high) / 2, 2 * LIMIT / side
    found = mesh.copy()
    found.vertices = (vertices - centre) * factor
    return found, centre, factor


def smallest_cosines(
    vertex_normals: NDArray[np.float64], face_normals: NDArray[np.float64], faces: NDArray[Any], *, official: bool = False
) -> NDArray[np.float64]:
    """Return for every vertex [v] the smallest cosine, at most 1, between its normal and those of its faces.

    Args:
        vertex_normals: [v, 3].
        face_normals: [f, 3].
        faces: [f, 3].
        official: as released: of the faces that have a vertex at the same corner only the last counts, which misses sharp vertices.
    """
    smallest = np.ones(len(vertex_normals))
    for corner in range(3):
        index = faces[:, corner]
        cosine = (vertex_normals[index] * face_normals).sum(1)
        if official:
            smallest[index] = np.minimum(smallest[index], cosine)
        else:
            np.minimum.at(smallest, index, cosine)
    return smallest


def sharp_edges(faces: NDArray[Any], is_sharp: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the directed edges [e, 2] with sharp ends: first corners 0-1 of all faces, then 1-2, then 2-0."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).astype(np.int64)
    return edges[is_sharp[edges].all(1)]


def points_on_edges(
    vertices: NDArray[np.float64], normals: NDArray[np.float64], edges: NDArray[np.int64], u: NDArray[np.float64], w: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return points [p, 3] on edges and their interpolated normals, not of length 1.

    Args:
        vertices, normals: [v, 3].
        edges: [e, 2]; taken with probability in proportion to length.
        u: [p] in [0, 1), chooses the edges.
        w: [p, 1] in [0, 1), share of an edge's first end.
    """
    lengths = np.linalg.norm(vertices[edges[:, 0]] - vertices[edges[:, 1]], axis=1)
    index = np.searchsorted(np.cumsum(lengths / lengths.sum()), u).clip(max=len(edges) - 1)
    first, second = edges[index, 0], edges[index, 1]
    return w * vertices[first] + (1 - w) * vertices[second], w * normals[first] + (1 - w) * normals[second]


def points_on_faces(
    vertices: NDArray[Any], faces: NDArray[Any], u_face: NDArray[np.float64], u_place: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return points [p, 3] of a surface and the normals of their faces [p, 3].

    Args:
        vertices: [v, 3].
        faces: [f, 3].
        u_face: [p] in [0, 1), choose faces in proportion to area.
        u_place: [p, 2] in [0, 1), shares of two edges; both are mirrored where they add up to more than 1.

    Raises:
        ValueError: if the surface has no area.
    """
    corners = np.asarray(vertices, np.float64)[np.asarray(faces, np.int64)]
    edges = corners[:, 1:] - corners[:, :1]
    normals = np.cross(edges[:, 0], edges[:, 1])
    lengths = np.linalg.norm(normals, axis=1)
    total = np.cumsum(lengths / 2)
    if not len(total) or not total[-1] > 0:
        raise ValueError("the mesh has no area: all faces are lines or points.")
    index = np.searchsorted(total, u_face * total[-1]).clip(max=len(total) - 1)
    share = np.where(u_place.sum(1, keepdims=True) > 1, np.abs(u_place - 1), u_place)
    points = corners[index, 0] + (share[:, :, None] * edges[index]).sum(1)
    unit = np.divide(normals, lengths[:, None], out=np.zeros_like(normals), where=lengths[:, None] > 0)
    return points, unit[index]


def uniform_points(mesh: trimesh.Trimesh, count: int, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return points [p, 3] spread by area, and the normals of their faces.

    Raises:
        ValueError: if the surface has no area.
    """
    return points_on_faces(np.asarray(mesh.vertices), np.asarray(mesh.faces), rng.random(count), rng.random((count, 2)))


def surface_points(mesh: trimesh.Trimesh, uniform: int, sharp: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return rows [uniform + sharp, 7] of a normalised mesh: uniform points, then sharp-edge points (uniform ones where no edge is sharp).

    Raises:
        ValueError: if the surface has no area.
    """
    points, normals = uniform_points(mesh, uniform, rng)
    parts = [rows(points, normals, 0)]
    if sharp:
        parts.append(sharp_rows(mesh, sharp, rng))
    return np.concatenate(parts).astype(np.float32)


def sharp_rows(mesh: trimesh.Trimesh, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return rows [count, 7] on sharp edges, or uniform ones where there are none."""
    normals = np.asarray(mesh.vertex_normals)
    is_sharp = smallest_cosines(normals, np.asarray(mesh.face_normals), np.asarray(mesh.faces)) < SHARP_COSINE
    edges = sharp_edges(np.asarray(mesh.faces), is_sharp)
    vertices = np.asarray(mesh.vertices)
    if not len(edges) or not np.linalg.norm(vertices[edges[:, 0]] - vertices[edges[:, 1]], axis=1).sum() > 0:
        return rows(*uniform_points(mesh, count, rng), 0)
    return rows(*points_on_edges(vertices, normals, edges, rng.random(count), rng.random((count, 1))), 1)


def rows(points: NDArray[np.float64], normals: NDArray[np.float64], label: int) -> NDArray[np.float64]:
    """Return points, their normals made unit, and a label side by side, [p, 7]."""
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    unit = np.divide(normals, lengths, out=np.zeros_like(normals), where=lengths > 0)
    return np.concatenate([points, unit, np.full((len(points), 1), label)], axis=1)
