"""What tasks on meshes share: augmented, quantised meshes with the points that they are known by.

Letters: b meshes, f faces, p points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from genkit.data.mesh_augment import Augmentation, augmented, condition_points
from genkit.data.mesh_samples import MeshBounds, MeshSamples, StoredMesh
from genkit.tokenizers.mesh_tokens import BINS, CanonicalMesh, canonical, quantised
from genkit.training.task import StepContext

TRIALS = 8  # augmentations of a mesh before it is taken as it is
SURVIVING = 0.2  # share of faces that quantising has to leave


@dataclass
class MeshDataConfig:
    """Settings of the data.

    Attributes:
        data: folder of meshes, parquet file with vertices and faces, or hub data set.
        bounds: of faces, and of vertices per face.
        bins: steps a side.
        num_points: of the condition.
        augment: scale, turn and shift meshes.
        seed: of the initial weights.
    """

    data: str = "data/lowpoly/train.parquet"
    bounds: MeshBounds = field(default_factory=MeshBounds)
    bins: int = BINS
    num_points: int = 8192
    augment: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_points < 1 or self.bins < 2:
            raise ValueError(f"num_points must be at least 1 and bins at least 2, got {self.num_points} and {self.bins}.")


@dataclass
class MeshItem:
    """One mesh of a step.

    Args:
        mesh: quantised, in canonical order.
        points: [p, 6] half precision.
    """

    mesh: CanonicalMesh
    points: np.ndarray


class MeshDraws:
    """Draws the meshes of steps.

    Args:
        config: the settings.
        samples: the meshes; those that cannot be learned even as they are are left out.
        fits: tells whether a quantised mesh can be learned; one that cannot is augmented anew.

    Raises:
        ValueError: if no mesh can be learned.
    """

    def __init__(self, config: MeshDataConfig, samples: MeshSamples, fits: Callable[[CanonicalMesh], bool]) -> None:
        self.config, self.samples, self.fits = config, samples, fits
        samples.keep(
            lambda stored: self._learnable(self._quantised(stored, Augmentation()), stored), "too long, or too much lost in quantising"
        )

    def items(self, batch: dict[str, Tensor], ctx: StepContext) -> list[MeshItem]:
        """Return the meshes of a batch of indices [b]."""
        index = batch["index"].tolist()
        seeds = (ctx.rand("mesh", len(index), 2).cpu().double() * 2**24).long().tolist()
        return [self.item(number, np.random.default_rng(seed)) for number, seed in zip(index, seeds, strict=True)]

    def item(self, number: int, rng: np.random.Generator) -> MeshItem:
        """Return mesh `number`, augmented where that leaves it learnable."""
        stored, bins, count = self.samples.meshes[number], self.config.bins, self.config.num_points
        draws = [Augmentation.draw(rng) for _ in range(TRIALS)] if self.config.augment else []
        found = (self._quantised(stored, draw) for draw in draws)
        mesh = next((mesh for mesh in found if self._learnable(mesh, stored)), None) or self._quantised(stored, Augmentation())
        points = condition_points(mesh.positions(bins), mesh.faces, rng.random(count), rng.random((count, 2)))
        return MeshItem(mesh, points)

    def _quantised(self, stored: StoredMesh, draw: Augmentation) -> CanonicalMesh:
        return canonical(quantised(augmented(stored.vertices, draw), self.config.bins), stored.faces)

    def _learnable(self, mesh: CanonicalMesh, stored: StoredMesh) -> bool:
        return len(mesh.faces) >= max(1, SURVIVING * len(stored.faces)) and self.fits(mesh)


def stacked_points(items: Sequence[MeshItem], device: torch.device) -> Tensor:
    """Return the points [b, p, 6] of meshes, fp32."""
    return torch.from_numpy(np.stack([item.points for item in items])).float().to(device)
