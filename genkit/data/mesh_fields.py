"""Signed fields of real meshes, also of those that do not close.

Positive inside, in the mesh's unit. A mesh is seen as a solid and sheets:

- inside is where the generalised winding number exceeds 1/2, which open and overlapping parts do not break;
- a face with inside on exactly one of its sides bounds the solid: the distance to those faces is the magnitude there;
- a face with outside on both sides is a sheet (floors, planes, leaves): it becomes a plate of a given thickness;
- a face with inside on both sides (where parts overlap) bounds nothing.

field = max(solid, thickness / 2 - distance to the sheets). The alternative, an unsigned distance minus an offset, would give every closed
mesh an inner surface too.

Source: Jacobson et al. 2013 for winding numbers; the mixture of points follows the Hunyuan3D releases.
Letters: p points, f faces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from genkit.data.surfaces import rows, sharp_rows, uniform_points
from genkit.data.winding import winding_numbers

if TYPE_CHECKING:
    import trimesh
    from numpy.typing import NDArray

THICKNESS = 0.02  # of sheets, in units of a shape that spans 2
INSIDE = 0.501  # beside a sheet the winding number is 1/2, give or take rounding
SIDE = 1e-4  # how far beside a face its sides are looked at
PAIRS = 2**17  # point-triangle pairs at a time: 1 MB a number, so that they stay in a processor's cache
SPREADS = {"near": (0.005, 0.05), "sharp": (0.001, 0.003, 0.006, 0.01, 0.02, 0.04)}
VOLUME = 1.05  # half side of the box of volume points


def triangle_distances(points: Tensor, triangles: Tensor) -> Tensor:
    """Return each point's distance to the nearest of some triangles, [p] float32, computed in float64.

    Args:
        points: [p, 3].
        triangles: [f, 3, 3].
    """
    if not len(triangles):
        return torch.full((len(points),), float("inf"), device=points.device)
    whole = triangles.double()
    parts = points.double().split(max(1, PAIRS // len(triangles)))
    return torch.cat([_squared(part, whole).amin(1) for part in parts]).sqrt().float()


def _squared(points: Tensor, triangles: Tensor) -> Tensor:
    """Return squared distances [p, f] float64: to the plane above a triangle, else to the nearest edge."""
    a, b, c = triangles.unbind(1)
    normal = torch.linalg.cross(b - a, c - a)
    length = normal.norm(dim=1)
    unit = normal / length.clamp_min(1e-12)[:, None]
    from_origin = points.square().sum(1, keepdim=True)
    best, outside = None, (length <= 1e-12).expand(len(points), -1)
    for start, end in ((a, b), (b, c), (c, a)):
        edge = end - start
        squared = edge.square().sum(1).clamp_min(1e-20)
        # |p - s - t e|^2 = |p - s|^2 + t (t |e|^2 - 2 e.(p - s)), t the place along the edge
        dot = torch.addmm(-(start * edge).sum(1), points, edge.T)
        t = (dot / squared).clamp_(0, 1)
        found = torch.addmm(from_origin + start.square().sum(1), points, start.T, alpha=-2).addcmul_(t, t * squared - 2 * dot)
        best = found if best is None else torch.minimum(best, found)
        outward = torch.linalg.cross(edge, unit)
        outside = outside | (points @ outward.T > (start * outward).sum(1))
    assert best is not None
    plane = torch.addmm(-(a * unit).sum(1), points, unit.T).square()
    return torch.where(outside, best.clamp_min(0), plane)


@dataclass
class MeshField:
    """The signed field of a mesh.

    Args:
        vertices: [v, 3] float32.
        faces: [f, 3] int64.
        solid, sheets: [f] bool, see above.
        thickness: of sheets.
    """

    vertices: Tensor
    faces: Tensor
    solid: Tensor
    sheets: Tensor
    thickness: float = THICKNESS

    @classmethod
    def of(cls, mesh: trimesh.Trimesh, thickness: float = THICKNESS) -> MeshField:
        """Look at both sides of every face of a mesh with finite vertices."""
        vertices, faces = (torch.from_numpy(np.array(x)) for x in (mesh.vertices, mesh.faces))
        vertices, faces = vertices.float(), faces.long()
        corners = vertices[faces]
        normal = torch.nn.functional.normalize(torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), dim=1)
        centres = corners.mean(1)
        above, below = (winding_numbers(centres + side * normal, vertices, faces) > INSIDE for side in (SIDE, -SIDE))
        has_area = normal.norm(dim=1) > 0.5
        return cls(vertices, faces, (above != below) & has_area, ~above & ~below & has_area, thickness)

    def __call__(self, points: Tensor) -> Tensor:
        """Return the field [p] float32 at points [p, 3]."""
        points = points.float()
        triangles, has_solid = self.vertices[self.faces], bool(self.solid.any())
        inside = has_solid & (winding_numbers(points, self.vertices, self.faces) > INSIDE)
        distance = triangle_distances(points, triangles[self.solid])
        field = torch.where(inside, distance, -distance)
        return torch.maximum(field, self.thickness / 2 - triangle_distances(points, triangles[self.sheets]))


@dataclass(frozen=True)
class FieldCounts:
    """How many points of each kind a training sample stores.

    Args:
        volume: uniform in a box of half side 1.05.
        near: around surface points, half with each of two spreads.
        sharp: around sharp-edge points, a sixth with each of six spreads.
        surface, edges: uniform and sharp-edge points of the surface, for the encoder.
    """

    volume: int = 16384
    near: int = 16384
    sharp: int = 8192
    surface: int = 8192
    edges: int = 8192


def field_samples(mesh: trimesh.Trimesh, counts: FieldCounts, seed: int) -> dict[str, NDArray[Any]]:
    """Return the training sample of a normalised mesh.

    Args:
        mesh: from `genkit.data.surfaces.normalised`.
        counts: of points.
        seed: of all draws.

    Returns:
        `surface` [p, 7] (uniform rows, then sharp-edge rows), `points` [p, 3] (volume, near, sharp) and `field` [p], float32.

    Raises:
        ValueError: if the surface has no area, or the field has no inside.
    """
    rng = np.random.default_rng(seed)
    uniform, edges = rows(*uniform_points(mesh, counts.surface, rng), 0), sharp_rows(mesh, counts.edges, rng)
    volume = rng.uniform(-VOLUME, VOLUME, (counts.volume, 3))
    near = uniform_points(mesh, counts.near, rng)[0]
    near += spread(rng, len(near), SPREADS["near"]).clip(-0.25, 0.25)
    sharp = sharp_rows(mesh, counts.sharp, rng)[:, :3]
    sharp += spread(rng, len(sharp), SPREADS["sharp"])
    points = np.concatenate([volume, near, sharp]).astype(np.float32)
    field = MeshField.of(mesh)(torch.from_numpy(points)).numpy()
    if not (field > 0).any():
        raise ValueError("the mesh has no inside: no closed part, and no sheet thick enough to be met.")
    return {"surface": np.concatenate([uniform, edges]).astype(np.float32), "points": points, "field": field.astype(np.float32)}


def spread(rng: np.random.Generator, count: int, sigmas: tuple[float, ...]) -> NDArray[np.float64]:
    """Return normal offsets [count, 3], equal shares with each standard deviation."""
    sigma = np.resize(np.repeat(sigmas, -(-count // len(sigmas))), count)
    return rng.standard_normal((count, 3)) * sigma[:, None]
