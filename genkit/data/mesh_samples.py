"""Meshes for mesh generators: those whose faces and shares are within bounds, held in memory.

Source of the filter: Chen et al. 2024 (MeshAnything V2, arXiv 2408.02555) and its released training code.
Letters: v vertices, f faces.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from genkit.data.mesh_augment import centred_box
from genkit.data.shape_samples import meshes_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeshBounds:
    """Which meshes to take.

    Args:
        min_faces, max_faces: triangles.
        min_ratio, max_ratio: vertices per face of the welded mesh; 0.4 to 0.7 as published.

    Raises:
        ValueError: for bounds that nothing fits.
    """

    min_faces: int = 1
    max_faces: int = 1600
    min_ratio: float = 0.0
    max_ratio: float = 3.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_faces <= self.max_faces or not 0 <= self.min_ratio <= self.max_ratio:
            raise ValueError(f"bounds must ascend, got faces {self.min_faces}..{self.max_faces}, ratio {self.min_ratio}..{self.max_ratio}.")

    def refusal(self, vertices: int, faces: int) -> str:
        """Return why a mesh is not taken, or ""."""
        if faces < self.min_faces:
            return "fewer faces than min_faces"
        if faces > self.max_faces:
            return "more faces than max_faces"
        return "" if self.min_ratio <= vertices / faces <= self.max_ratio else "vertices per face out of bounds"


@dataclass(frozen=True)
class StoredMesh:
    """A mesh.

    Args:
        name: of it.
        vertices: [v, 3] float64, box centred, longest side 1; equal positions welded.
        faces: [f, 3] int64, without degenerate and duplicate ones.
    """

    name: str
    vertices: NDArray[np.float64]
    faces: NDArray[np.int64]


def welded(vertices: NDArray[np.float64], faces: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return a mesh with positions welded that agree to 1e-5 of its size, and without degenerate and duplicate faces.

    Raises:
        ValueError: if nothing is left, or numbers are not finite.
    """
    positions = np.asarray(vertices, np.float64)
    if not len(faces):
        raise ValueError("the mesh has no faces.")
    boxed = centred_box(positions)
    _, first, inverse = np.unique(np.round(boxed * 1e5).astype(np.int64), axis=0, return_index=True, return_inverse=True)
    found = inverse.reshape(-1)[faces]
    ordered = np.sort(found, axis=1)
    has_area = (ordered[:, 0] != ordered[:, 1]) & (ordered[:, 1] != ordered[:, 2])
    _, single = np.unique(ordered[has_area], axis=0, return_index=True)
    kept = found[has_area][np.sort(single)]
    if not len(kept):
        raise ValueError("all faces are degenerate.")
    used, renumbered = np.unique(kept, return_inverse=True)
    return boxed[first][used], renumbered.reshape(-1, 3)


def parts_of(
    vertices: NDArray[np.float64], faces: NDArray[np.int64], max_faces: int
) -> list[tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """Return what a mesh is made of, as meshes of their own: its connected pieces, and groups of neighbouring ones.

    A group starts at the largest piece that is in none yet and takes the nearest others that fit into `max_faces`. Pieces that have more
    alone are left out.

    Args:
        vertices: [v, 3], welded.
        faces: [f, 3].
        max_faces: of a part.
    """
    from trimesh.graph import connected_component_labels

    edges = np.concatenate([faces[:, :2], faces[:, 1:]])
    labels = connected_component_labels(edges, node_count=len(vertices))[faces[:, 0]]
    pieces = [faces[labels == label] for label in np.unique(labels)]
    pieces = sorted((piece for piece in pieces if len(piece) <= max_faces), key=len, reverse=True)
    if not pieces:
        return []
    centres = np.array([(vertices[piece].min((0, 1)) + vertices[piece].max((0, 1))) / 2 for piece in pieces])
    sizes, free, groups = np.array([len(piece) for piece in pieces]), np.ones(len(pieces), bool), []
    while free.any():
        start = int(np.argmax(free))
        group, total = [], 0
        for other in np.argsort(np.linalg.norm(centres - centres[start], axis=1), kind="stable"):
            if free[other] and total + sizes[other] <= max_faces:
                group.append(int(other))
                total += sizes[other]
        free[group] = False
        groups += [np.concatenate([pieces[i] for i in group])] if len(group) > 1 else []
    found = []
    for part in (*pieces, *groups):
        used, renumbered = np.unique(part, return_inverse=True)
        found.append((centred_box(vertices[used]), renumbered.reshape(-1, 3)))
    return found


def _look(vertices: NDArray[np.float64], faces: NDArray[np.int64]) -> bytes:
    """Return what is equal for meshes that look the same to a hundredth of their size, in whatever order their faces are."""
    corners = np.sort(np.round(vertices[faces] * 100).astype(np.int8) @ np.array([40000, 200, 1]), axis=1)
    return corners[np.lexsort(corners.T)].tobytes()


class MeshSamples(Dataset[dict[str, Tensor]]):
    """Meshes of a folder, parquet file or hub data set; item i is {"index"}, `meshes[i]` the mesh.

    Args:
        path: see `genkit.data.shape_samples.meshes_of`.
        bounds: which to take.
        split: of a data set.
        parts: take meshes with more than `bounds.max_faces` apart, see `parts_of`; parts that look the same are taken once.
        whole_repeats: times that each mesh within bounds is there, so that parts do not outnumber them.

    Raises:
        ValueError: if none can be used.

    Attributes:
        meshes: taken.
        refused: reason -> how many.
    """

    def __init__(
        self, path: str | Path, bounds: MeshBounds | None = None, split: str = "train", parts: bool = False, whole_repeats: int = 1
    ) -> None:
        bounds = bounds or MeshBounds()
        seen: set[bytes] = set()
        self.meshes: list[StoredMesh] = []
        self.refused: Counter[str] = Counter()
        for name, load in meshes_of(path, split):
            try:
                mesh = load()
                vertices, faces = welded(np.asarray(mesh.vertices), np.asarray(mesh.faces, np.int64))
            except (ValueError, OSError, KeyError, IndexError, TypeError, AttributeError) as error:
                self.refused[f"cannot be used: {str(error).split(';')[0][:80]}"] += 1
                continue
            reason = bounds.refusal(len(vertices), len(faces))
            if parts and len(faces) > bounds.max_faces and self._take_apart(name, vertices, faces, bounds, seen):
                continue
            if reason:
                self.refused[reason] += 1
            else:
                self.meshes += [StoredMesh(name, vertices, faces)] * whole_repeats
        self.path = path
        self._report()

    def _take_apart(self, name: str, vertices: NDArray[np.float64], faces: NDArray[np.int64], bounds: MeshBounds, seen: set[bytes]) -> bool:
        """Take the parts of a mesh that are within bounds and look like none `seen`; tell whether there were parts within bounds."""
        found = False
        for number, (positions, corners) in enumerate(parts_of(vertices, faces, bounds.max_faces)):
            look = _look(positions, corners)
            if bounds.refusal(len(positions), len(corners)):
                continue
            if look not in seen:
                self.meshes.append(StoredMesh(f"{name}/{number}", positions, corners))
            seen.add(look)
            found = True
        return found

    def keep(self, is_fit: Callable[[StoredMesh], bool], reason: str) -> None:
        """Leave out the meshes that do not fit, for a reason that is counted.

        Raises:
            ValueError: if none is left.
        """
        kept = [mesh for mesh in self.meshes if is_fit(mesh)]
        lost = len(self.meshes) - len(kept)
        self.meshes = kept
        if lost:
            self.refused[reason] += lost
            self._report()

    def _report(self) -> None:
        if not self.meshes:
            raise ValueError(f"{str(self.path)!r}: none of {self.refused.total()} meshes can be used: {dict(self.refused)}.")
        if self.refused:
            logger.warning("%d meshes of %s, %d left out: %s", len(self.meshes), self.path, self.refused.total(), dict(self.refused))

    @property
    def data_hash(self) -> str:
        """What changes with the meshes."""
        digest = hashlib.sha256()
        for stored in self.meshes:
            digest.update(stored.name.encode() + stored.vertices.tobytes() + stored.faces.tobytes())
        return digest.hexdigest()[:24]

    def __len__(self) -> int:
        return len(self.meshes)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"mesh index {index} is outside 0..{len(self) - 1}.")
        return {"index": torch.tensor(index)}
