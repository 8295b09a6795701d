"""Meshes against meshes, file by file: everything in `genkit.eval.shapes` from points sampled by area.

Letters: p sampled points.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.checks import shorten
from genkit.data.containment import contains
from genkit.data.winding import winding_numbers
from genkit.eval import shapes

SUFFIXES = (".obj", ".ply", ".stl", ".glb", ".gltf", ".off")
THRESHOLDS = (0.01, 0.02, 0.05)


def find_meshes(path: Path) -> list[Path]:
    """Return the mesh files at a path: the file itself, or those right in a folder by name.

    Raises:
        FileNotFoundError: if there is none.
    """
    found = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.suffix.lower() in SUFFIXES)
    if not found:
        raise FileNotFoundError(f"{str(path)!r} holds no meshes; expected {', '.join(SUFFIXES)}.")
    return found


def load_mesh(path: Path) -> Any:
    """Load a file as one mesh.

    Raises:
        ValueError: if it cannot be read or has no faces.
    """
    import trimesh

    try:
        mesh = trimesh.load(path, force="mesh", process=False)
    except (ValueError, OSError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be read as a mesh ({error}).") from error
    if not len(getattr(mesh, "faces", ())):
        raise ValueError(f"{path} has no faces.")
    return mesh


def sample(mesh: Any, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return points [p, 3] uniform by area and the normals of their faces [p, 3]."""
    import trimesh

    points, faces = trimesh.sample.sample_surface(mesh, count, seed=seed)
    return torch.from_numpy(np.array(points)), torch.from_numpy(np.array(mesh.face_normals[faces]))


def compare(true: Any, predicted: Any, count: int = 10_000, queries: int = 5_000, seed: int = 0) -> dict[str, float]:
    """Measure a predicted mesh against the true one, in the meshes' own unit.

    Args:
        true, predicted: trimesh meshes.
        count: points sampled on each.
        queries: points of the volume and near the surface for the two occupancy figures.
        seed: of the points.

    Returns:
        Metric -> value. Thresholds, edge radius and noise are shares of the true mesh's largest half side: 0.01, 0.004 and 0.02 on unit
        shapes.
    """
    scale = float(np.ptp(true.vertices, axis=0).max()) / 2 or 1.0
    (p, p_normals), (q, q_normals) = sample(true, count, seed), sample(predicted, count, seed + 1)
    found = shapes.PointDistances.between(p, q)
    values = {"chamfer-l1-sum": found.chamfer(), "chamfer-l2-sum": found.chamfer(2), "hausdorff": found.hausdorff()}
    for threshold in THRESHOLDS:
        values[f"fscore@{threshold:g}"] = found.fscore(threshold * scale)[0]
    values["normal-consistency"] = shapes.normal_consistency(p, p_normals, q, q_normals)
    edges = [points[shapes.edge_points(points, normals, 0.004 * scale)] for points, normals in ((p, p_normals), (q, q_normals))]
    if all(len(points) for points in edges):
        values["edge-chamfer-l1-sum"] = shapes.PointDistances.between(*edges).chamfer()
    values |= _occupancies(true, predicted, p, queries, scale, seed)
    a, b = (shapes.mesh_counts(torch.from_numpy(np.array(m.vertices)), torch.from_numpy(np.array(m.faces))) for m in (true, predicted))
    return values | {"vertex-ratio": b.vertices / a.vertices, "face-ratio": b.faces / a.faces, "watertight": float(b.watertight)}


def _occupancies(true: Any, predicted: Any, surface: Tensor, queries: int, scale: float, seed: int) -> dict[str, float]:
    """Return volume and surface IoU."""
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.from_numpy(np.array(true.bounds))
    volume = low - 0.1 * scale + torch.rand(queries, 3, generator=generator, dtype=torch.float64) * (high - low + 0.2 * scale)
    near = surface[:queries] + 0.02 * scale * torch.randn(min(queries, len(surface)), 3, generator=generator, dtype=torch.float64)
    found = {}
    for name, points in (("volume-iou", volume), ("surface-iou", near)):
        found[name] = shapes.occupancy_iou(*(_inside(mesh, points) for mesh in (true, predicted)))
    return found


def _inside(mesh: Any, points: Tensor) -> Tensor:
    """Return which points [q, 3] lie in a mesh: by crossings if it closes, which is fast, else by winding numbers."""
    if mesh.is_watertight:
        return torch.from_numpy(contains(mesh.vertices, mesh.faces, points.numpy()))
    return winding_numbers(points, torch.from_numpy(np.array(mesh.vertices)), torch.from_numpy(np.array(mesh.faces))) > 0.5


def compare_files(true: Path, predicted: Path, count: int = 10_000, seed: int = 0) -> dict[str, dict[str, float]]:
    """Compare mesh files, or those with equal names (up to the suffix) of two folders.

    Returns:
        Name -> metric -> value.

    Raises:
        ValueError: if folders hold different names.
    """
    pairs = [find_meshes(path) for path in (true, predicted)]
    if true.is_file() and predicted.is_file():
        return {true.stem: compare(load_mesh(true), load_mesh(predicted), count, seed=seed)}
    names = [[file.stem for file in files] for files in pairs]
    if names[0] != names[1]:
        alone = sorted(set(names[0]) ^ set(names[1]))
        raise ValueError(f"{str(true)!r} and {str(predicted)!r} hold different meshes: {shorten(alone)}; pairs need equal names.")
    files = zip(*pairs, strict=True)
    return {a.stem: compare(load_mesh(a), load_mesh(b), count, seed=seed) for a, b in files}
