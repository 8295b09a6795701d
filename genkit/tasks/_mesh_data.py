"""What tasks on meshes share: augmented, quantised meshes with the points that they are known by.

Letters: b meshes, f faces, p points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from genkit.data.mesh_augment import SHIFT, Augmentation, Turns, augmented, condition_points, rough_points
from genkit.data.mesh_samples import MeshBounds, MeshSamples, StoredMesh
from genkit.tokenizers.mesh_tokens import BINS, CanonicalMesh, canonical, quantised
from genkit.tokenizers.point_encoder import PointEncoder
from genkit.training.optimizers import adamw_or_muon
from genkit.training.task import StepContext

TRIALS = 8  # augmentations of a mesh before it is taken as it is
SURVIVING = 0.2  # share of faces that quantising has to leave


@dataclass
class MeshTaskConfig:
    """Settings of the data, the point encoder and the optimizer.

    Attributes:
        data: folder of meshes, parquet file with vertices and faces, or hub data set.
        bounds: of faces, and of vertices per face.
        parts: take meshes with too many faces apart, see `genkit.data.mesh_samples.parts_of`, instead of leaving them out.
        whole_repeats: times that an epoch has each of the other meshes, so that parts do not outnumber them.
        bins: steps a side.
        num_points: of the condition.
        augment: scale, turn, shift and mirror meshes.
        turns: about y: by any angle as published, or by quarters, for assets that lie along the axes.
        shift: largest shift of a mesh whose longest side is 1; 0 centres it, as the pipeline does.
        mirror: half of the meshes.
        point_noise: each mesh's points are as rough as a standard deviation drawn between 0 and this, where shapes span 2; normals ten
            times as much. For surfaces that are scanned or generated.
        seed: of the initial weights.
        point_encoder: of `PointEncoder`, to learn along.
        pretrained_point_encoder: folder of one that stays as it is, instead.
        optimizer: "adamw", or "muon": Muon for the matrices of the blocks, AdamW for the rest.
        lr, betas, weight_decay: of the optimizer.
        export_dtype: floating type of the exported weights.
    """

    data: str = "data/lowpoly/train.parquet"
    bounds: MeshBounds = field(default_factory=MeshBounds)
    parts: bool = False
    whole_repeats: int = 1
    bins: int = BINS
    num_points: int = 8192
    augment: bool = True
    turns: Turns = "any"
    shift: float = SHIFT
    mirror: bool = False
    point_noise: float = 0.0
    seed: int = 0
    point_encoder: dict[str, Any] = field(default_factory=dict)
    pretrained_point_encoder: str | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.1
    export_dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}.")
        if bool(self.point_encoder) == (self.pretrained_point_encoder is not None):
            raise ValueError("give either point_encoder (to learn along) or pretrained_point_encoder.")
        if not 0 <= self.shift < 1:
            raise ValueError(f"shift must lie in [0, 1), got {self.shift}.")
        if self.whole_repeats < 1:
            raise ValueError(f"whole_repeats must be at least 1, got {self.whole_repeats}.")
        if not 0 <= self.point_noise < 1:
            raise ValueError(f"point_noise must lie in [0, 1), got {self.point_noise}.")
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

    def __init__(self, config: MeshTaskConfig, samples: MeshSamples, fits: Callable[[CanonicalMesh], bool]) -> None:
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
        options = self.config.turns, self.config.shift, self.config.mirror
        draws = [Augmentation.draw(rng, *options) for _ in range(TRIALS)] if self.config.augment else []
        found = (self._quantised(stored, draw) for draw in draws)
        mesh = next((mesh for mesh in found if self._learnable(mesh, stored)), None) or self._quantised(stored, Augmentation())
        points = condition_points(mesh.positions(bins), mesh.wound, rng.random(count), rng.random((count, 2)))
        if noise := self.config.point_noise:
            points = rough_points(points, rng.uniform(0, noise), rng)
        return MeshItem(mesh, points)

    def _quantised(self, stored: StoredMesh, draw: Augmentation) -> CanonicalMesh:
        faces = stored.faces[:, ::-1] if draw.mirror else stored.faces
        return canonical(quantised(augmented(stored.vertices, draw), self.config.bins), faces)

    def _learnable(self, mesh: CanonicalMesh, stored: StoredMesh) -> bool:
        return len(mesh.faces) >= max(1, SURVIVING * len(stored.faces)) and self.fits(mesh)


def stacked_points(items: Sequence[MeshItem], device: torch.device) -> Tensor:
    """Return the points [b, p, 6] of meshes, fp32."""
    return torch.from_numpy(np.stack([item.points for item in items])).float().to(device)


@torch.no_grad()
def known_by(items: Sequence[MeshItem], device: torch.device, frozen: Mapping[str, nn.Module]) -> Any:
    """Return what a step's networks know meshes by: features of a frozen point encoder, or points [b, p, 6] for one that learns along."""
    points = stacked_points(items, device)
    return frozen["point_encoder"](points) if "point_encoder" in frozen else points


def open_meshes(config: MeshTaskConfig) -> MeshSamples:
    """Open the meshes that the settings name."""
    return MeshSamples(config.data, config.bounds, parts=config.parts, whole_repeats=config.whole_repeats)


def open_encoder(config: MeshTaskConfig) -> PointEncoder | None:
    """Open the point encoder that stays as it is, if the settings name one."""
    folder = config.pretrained_point_encoder
    return None if folder is None else cast(PointEncoder, PointEncoder.from_pretrained(folder))


def mesh_optimizer(module: nn.Module, config: MeshTaskConfig, inner: tuple[str, ...]) -> torch.optim.Optimizer:
    """Return one optimizer over a module's trained parameters; Muon, if chosen, takes matrices below `inner` and the point encoder's."""
    where = (*inner, *(f"point_encoder.{part}." for part in ("cross", "blocks", "decoder_blocks")))
    return adamw_or_muon(module, config.optimizer, where, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
