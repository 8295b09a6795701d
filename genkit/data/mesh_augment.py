"""Meshes as a mesh generator learns them: augmented, quantised, with points of their surface as the condition.

Source: Chen et al. 2024 (MeshAnything V2, arXiv 2408.02555) and its released training code.
Letters: v vertices, f faces, p points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from genkit.data.surfaces import points_on_faces

SCALES = (0.75, 1.25)
SHIFT = 0.1
Turns = Literal["any", "quarter"]
POINT_LIMIT = 0.9995
"""Largest coordinate of condition points; those of a mesh of longest side 1 are doubled first."""


@dataclass(frozen=True)
class Augmentation:
    """One draw.

    Args:
        scale: of the three axes.
        angle: about y, radians.
        shift: of the three axes, before it is cut so that the mesh stays inside.
        mirror: x is turned round, last; faces then wind the other way.
    """

    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    angle: float = 0.0
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    mirror: bool = False

    @classmethod
    def draw(cls, rng: np.random.Generator, turns: Turns = "any", shift: float = SHIFT, mirror: bool = False) -> Augmentation:
        """Draw scales, angle and shifts, in this order, as published by default, then whether to mirror.

        Args:
            rng: the source.
            turns: about y by any angle, or by quarters, which leaves what lies along the axes there.
            shift: the largest.
            mirror: half of the meshes.
        """
        scale, angle = tuple(rng.uniform(*SCALES, 3).tolist()), float(rng.uniform(0, 2 * np.pi))
        if turns == "quarter":
            angle = np.pi / 2 * (angle // (np.pi / 2))
        shifts = tuple(rng.uniform(-shift, shift, 3).tolist())
        return cls(scale, angle, shifts, mirror and bool(rng.random() < 0.5))


def centred_box(vertices: NDArray[Any]) -> NDArray[np.float64]:
    """Return vertices [v, 3] with their box centred and its longest side 1.

    Raises:
        ValueError: for none, numbers that are not finite, or no extent.
    """
    positions = np.asarray(vertices, np.float64)
    if not len(positions) or not np.isfinite(positions).all():
        raise ValueError(f"a mesh to be written as tokens needs finite vertices, got {len(positions)} of which some are not finite.")
    low, high = positions.min(0), positions.max(0)
    side = (high - low).max()
    if not side > 0:
        raise ValueError("the mesh has no extent: all vertices are in one place.")
    return ((positions - (low + high) / 2) / side).clip(-0.5, 0.5)


def augmented(vertices: NDArray[Any], draw: Augmentation) -> NDArray[np.float64]:
    """Return vertices [v, 3] in [-0.5, 0.5]: scaled by axis, turned about y, boxed again, shifted as far as there is room, mirrored."""
    positions = centred_box(vertices) * np.asarray(draw.scale)
    positions -= (positions.min(0) + positions.max(0)) / 2
    x, y, z = positions.T
    cosine, sine = np.round((np.cos(draw.angle), np.sin(draw.angle)), 15)  # quarters are exact: flat faces stay flat when quantised
    turned = centred_box(np.stack([x * cosine + z * sine, y, -x * sine + z * cosine], axis=1))
    room = np.asarray(draw.shift).clip(-0.5 - turned.min(0), 0.5 - turned.max(0))
    return (turned + room).clip(-0.5, 0.5) * (-1 if draw.mirror else 1, 1, 1)


def condition_points(
    positions: NDArray[Any], faces: NDArray[Any], u_face: NDArray[np.float64], u_place: NDArray[np.float64]
) -> NDArray[np.float16]:
    """Return the points [p, 6] that a mesh in [-0.5, 0.5] is known by: positions times 2 * 0.9995, then normals, in half precision."""
    scaled = np.asarray(positions, np.float64) * 2 * POINT_LIMIT
    points, normals = points_on_faces(scaled, faces, u_face, u_place)
    return np.concatenate([points.clip(-POINT_LIMIT, POINT_LIMIT), normals], axis=1).astype(np.float16)


def rough_points(points: NDArray[np.float16], noise: float, rng: np.random.Generator) -> NDArray[np.float16]:
    """Return condition points [p, 6] with Gaussian noise of that standard deviation; unit normals with ten times as much."""
    draws = rng.normal(size=points.shape) * noise
    positions = (points[:, :3] + draws[:, :3]).clip(-POINT_LIMIT, POINT_LIMIT)
    normals = points[:, 3:] + 10 * draws[:, 3:]
    normals /= np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-6)
    return np.concatenate([positions, normals], axis=1).astype(np.float16)


@dataclass(frozen=True)
class NormalisedPoints:
    """Points as an encoder takes them, and the way back.

    Args:
        points: [p, 6] half precision, largest coordinate 0.9995.
        centre: [3] of the given points' box.
        half_side: largest coordinate of the centred points.
    """

    points: NDArray[np.float16]
    centre: NDArray[np.float64]
    half_side: float

    def back(self, positions: NDArray[Any]) -> NDArray[np.float64]:
        """Return mesh positions in [-0.5, 0.5] at the place and size of the given points."""
        return np.asarray(positions, np.float64) * 2 * self.half_side + self.centre


def normalised_points(rows: NDArray[Any]) -> NormalisedPoints:
    """Return points with normals [p, 6] of any place and size as an encoder takes them; half precision comes last.

    Raises:
        ValueError: for other shapes, numbers that are not finite, normals that are no unit vectors, or points in one place.
    """
    array = np.asarray(rows, np.float64)
    if array.ndim != 2 or array.shape[1] != 6:
        hint = (
            "; normals are missing: sample them with the surface, or estimate them first" if array.ndim == 2 and array.shape[1] == 3 else ""
        )
        raise ValueError(f"a point cloud must be [points, 6], positions and unit normals, got {list(array.shape)}{hint}.")
    if not len(array) or not np.isfinite(array).all():
        bad = int((~np.isfinite(array).all(1)).sum())
        raise ValueError(f"a point cloud needs finite numbers, got {len(array)} points of which {bad} are not.")
    lengths = np.linalg.norm(array[:, 3:], axis=1)
    if (wrong := (lengths <= 0.99) | (lengths > 1.01)).any():
        raise ValueError(f"normals must be unit vectors, {int(wrong.sum())} of {len(array)} have lengths such as {lengths[wrong][0]:.3g}.")
    low, high = array[:, :3].min(0), array[:, :3].max(0)
    centre = (low + high) / 2
    half_side = float(np.abs(array[:, :3] - centre).max())
    if not half_side > 0:
        raise ValueError("the point cloud has no extent: all points are in one place.")
    positions = (array[:, :3] - centre) / half_side * POINT_LIMIT
    return NormalisedPoints(np.concatenate([positions, array[:, 3:]], axis=1).astype(np.float16), centre, half_side)
