"""Metrics of video tasks while training: restored clips against the true ones, and how far made clips are from real ones.

- those of `genkit.eval.prediction.METRICS`: of clips that were not trained on, what a mask hides is made and compared
- "frechet-clips": Frechet distance on features of frames (`genkit.eval.clips.FrameFeatures`), not FVD
- "fvd": on I3D's logits, with `weights`

Letters: b clips, f frames, c channels, h w rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from genkit.checks import choose
from genkit.data.clips import ClipDataset
from genkit.eval.clips import ClipFeatures, FrameFeatures, I3DFeatures
from genkit.eval.features import FeatureNetwork
from genkit.eval.frechet import GaussianStatistics, frechet_distance
from genkit.eval.i3d import I3D
from genkit.eval.prediction import METRICS, restoration_metrics
from genkit.tasks._clips import training_clips
from genkit.training.evaluation import EvaluationConfig
from genkit.weights import read_checkpoint

DISTANCES = ("frechet-clips", "fvd")


def check_clip_metrics(config: EvaluationConfig) -> None:
    """Refuse metrics that clips do not have.

    Raises:
        ValueError: naming the nearest.
    """
    for name in config.metrics:
        choose(name, (*METRICS, *DISTANCES), "metric of clips")
    if "fvd" in config.metrics and config.weights is None:
        raise ValueError("metric 'fvd' needs train.evaluate.weights, those of I3D (i3d_pretrained_400.pt); 'frechet-clips' needs none.")


def held_out_clips(config: EvaluationConfig, sprites: bool, size: int, frames: int, stride: int, seed: int) -> ClipDataset:
    """Open the clips to judge by.

    Args:
        config: `real` names clips as a recipe's `data` does; for a task on sprites, an array of clips such as Moving MNIST's test set, or
            sprites, which then move in ways of their own.
        sprites: whether the task learns from sprites.
        size, frames, stride: of the clips.
        seed: of the task's own sprites.
    """
    path = Path(config.real)
    is_clips = path.suffix == ".npy" and path.is_file() and np.load(path, mmap_mode="r", allow_pickle=False).ndim > 3
    moving = sprites and not is_clips
    source = {"data": None, "sprites": config.real} if moving else {"data": config.real, "sprites": None}
    return training_clips(**source, size=size, frames=frames, stride=stride, sequences=config.num_samples, seed=seed + 1)


def batches(clips: ClipDataset, config: EvaluationConfig, device: torch.device) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the first clips that are to be used, as (numbers, frames [b, f, c, h, w])."""
    count = min(len(clips), config.num_samples)
    for first in range(0, count, config.batch_size):
        indices = list(range(first, min(first + config.batch_size, count)))
        yield indices, torch.stack([clips[i]["frames"] for i in indices]).to(device)


class ClipMetrics:
    """The metrics asked for, over batches of clips.

    Args:
        config: names them.
        frames: of a clip.
        device: where features are computed.
    """

    def __init__(self, config: EvaluationConfig, frames: int, device: torch.device) -> None:
        self.names, self.frames = [name for name in config.metrics if name in METRICS], frames
        self.rows: dict[str, list[Tensor]] = {}
        self.features: dict[str, ClipFeatures] = {}
        self.statistics: dict[str, dict[str, GaussianStatistics]] = {"real": {}, "made": {}}
        if "frechet-clips" in config.metrics:
            self.features["frechet-clips"] = FrameFeatures(FeatureNetwork("efficientnet-lite0", size=config.size), device)
        if "fvd" in config.metrics:
            self.features["fvd"] = I3DFeatures(I3D(read_checkpoint(Path(str(config.weights)))[0]).to(device))

    def compare(self, made: Tensor, truth: Tensor, mask: Tensor, suffix: str = "") -> None:
        """Add restored clips.

        Args:
            made, truth: [b, f, c, h, w].
            mask: [b, f, h, w] bool, True = was made.
            suffix: behind the names of these metrics.
        """
        for clip in zip(made, truth, mask, strict=True):
            found = restoration_metrics(*clip)
            for name in self.names:
                self.rows.setdefault(f"{name}{suffix}", []).append(found[name])

    def add(self, kind: Literal["real", "made"], clips: Tensor) -> None:
        """Add clips [b, f, c, h, w] in [-1, 1] to one of the two sets between which distances are taken."""
        pixels = ((clips.float().clamp(-1, 1) + 1) * 127.5).round().byte().expand(-1, -1, 3, -1, -1)
        for name, features in self.features.items():
            rows = features(pixels)
            statistics = self.statistics[kind]
            if name not in statistics:
                statistics[name] = GaussianStatistics(rows.shape[1], features.source(self.frames))
            statistics[name].update(rows)

    def compute(self) -> dict[str, float]:
        """Return means and distances by name."""
        real, made = self.statistics["real"], self.statistics["made"]
        means = {name: float(torch.stack(rows).mean()) for name, rows in self.rows.items()}
        return means | {name: frechet_distance(real[name], made[name], own.ddof) for name, own in self.features.items()}
