"""Video clips for evaluation, and Frechet distances over them: FVD on I3D's logits, or on the features of a picture network.

Clips come from an array [n, f, h, w, 3] uint8 (`.npy`, `.npz`), from a folder of folders of frames (each a clip, frames by name), or from
a folder of GIF, WebP or video files (the latter: extra `video`). Every clip gives its first frames, every `stride`-th.

Letters: n clips, f frames, h w rows and columns.
"""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.checks import choose, shorten
from genkit.data.images import find_pictures
from genkit.data.video_files import FILMS, iterate_clip
from genkit.eval.features import FeatureNetwork
from genkit.eval.frechet import GaussianStatistics, frechet_distance, merged
from genkit.eval.i3d import I3D, LEAST_FRAMES
from genkit.eval.metrics import GROUPS, QUANTILE, jackknife
from genkit.eval.pictures import decode, open_array
from genkit.eval.video import PREPARATIONS, prepare_clips

VIDEOS = (*FILMS, ".gif", ".webp")
DDOF = {"stylegan-v": 0}  # what a protocol's covariances subtract from n; 1 for the others


class Clips:
    """Clips of equal length.

    Args:
        path: array file or folder.
        frames: frames of each clip.
        stride: step between frames.

    Raises:
        FileNotFoundError: if nothing that can be read is there.
        ValueError: if arrays are misshapen or clips are too short; names them.
    """

    def __init__(self, path: str | Path, frames: int = 16, stride: int = 1) -> None:
        self.path, self.frames, self.stride = Path(path).expanduser(), frames, stride
        self.array: np.ndarray[Any, Any] | None = None
        self.items: list[Path] = []
        need = (frames - 1) * stride + 1
        if frames < 1 or stride < 1:
            raise ValueError(f"clips need at least 1 frame and a stride of at least 1, got frames={frames} and stride={stride}.")
        if self.path.is_file() and self.path.suffix in (".npy", ".npz"):
            self.array, _ = open_array(self.path)
            shape, dtype = self.array.shape, self.array.dtype
            if len(shape) != 5 or shape[4] != 3 or dtype != np.uint8 or shape[1] < need:
                raise ValueError(f"{str(path)!r}: clips must be uint8 [n, f of at least {need}, h, w, 3], got {dtype} {list(shape)}.")
        elif self.path.is_dir():
            self.items = sorted(item for item in self.path.iterdir() if item.is_dir() or item.suffix.lower() in VIDEOS)
            short = [item.name for item in self.items if item.is_dir() and len(find_pictures(item)) < need]
            if short:
                raise ValueError(f"{str(path)!r}: {len(short)} clips have fewer than {need} frames: {shorten(short)}.")
        if self.array is None and not self.items:
            raise FileNotFoundError(
                f"{str(path)!r} holds no clips; give an array, a folder of folders of frames, or of {', '.join(VIDEOS)} files."
            )

    def __len__(self) -> int:
        return len(self.array) if self.array is not None else len(self.items)

    def read(self, index: int) -> Tensor:
        """Return a clip [f, 3, h, w] uint8.

        Raises:
            ValueError: if a file cannot be decoded or is too short.
        """
        last = (self.frames - 1) * self.stride + 1
        if self.array is not None:
            return torch.from_numpy(np.array(self.array[index, : last : self.stride])).permute(0, 3, 1, 2)
        item = self.items[index]
        if item.is_dir():
            pictures = [decode(file, str(file), None)[0] for file in find_pictures(item)[: last : self.stride]]
        else:
            pictures = [frame for frame, _ in islice(iterate_clip(item), 0, last, self.stride)]
        if len(pictures) < self.frames:
            raise ValueError(f"{item} has fewer than {last} frames.")
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


class ClipFeatures:
    """A function from clips [b, f, 3, h, w] uint8 to features [b, d], and what its features are.

    Attributes:
        metric: name of the Frechet distance on these features.
        ddof: what covariances subtract from n.
        least_frames: frames that a clip needs.
    """

    metric: str
    ddof = 1
    least_frames = 1

    def source(self, frames: int) -> str:
        """Return what the features are: statistics that differ in it cannot be compared."""
        raise NotImplementedError

    def __call__(self, clips: Tensor) -> Tensor:
        """Compute features [b, d] on the CPU."""
        raise NotImplementedError


class I3DFeatures(ClipFeatures):
    """I3D's logits on clips prepared as a tool does: the features of FVD.

    Args:
        network: with the published weights.
        protocol: key of `genkit.eval.video.PREPARATIONS`; "stylegan-v" also divides covariances by n.

    Raises:
        ValueError: if the protocol is unknown.
    """

    metric, least_frames = "fvd", LEAST_FRAMES

    def __init__(self, network: I3D, protocol: str = "stylegan-v") -> None:
        choose(protocol, PREPARATIONS, "video protocol")
        self.network, self.protocol, self.ddof = network, protocol, DDOF.get(protocol, 1)
        self.device = next(network.parameters()).device

    def source(self, frames: int) -> str:
        """Return network, protocol and length."""
        return f"i3d, {self.protocol}, {frames} frames"

    @torch.inference_mode()
    def __call__(self, clips: Tensor) -> Tensor:
        """Compute logits [b, 400]."""
        return self.network(prepare_clips(clips, self.protocol).to(self.device)).cpu()


class FrameFeatures(ClipFeatures):
    """Features of frames by a picture network, pooled over a clip: the mean, which says what is seen, and the mean absolute change from
    frame to frame, which says how it moves. Our own measure, not FVD.

    Args:
        network: of pictures.
        device: where to compute.
    """

    metric, least_frames = "frechet-clips", 2

    def __init__(self, network: FeatureNetwork, device: str | torch.device = "cpu") -> None:
        self.network, self.device = network.to(device), torch.device(device)

    def source(self, frames: int) -> str:
        """Return network, size and length."""
        size = "frames as they are" if self.network.size is None else f"{self.network.size} px"
        return f"{self.network.name}, {size}, mean and mean change, {frames} frames"

    @torch.inference_mode()
    def __call__(self, clips: Tensor) -> Tensor:
        """Compute features [b, 2 * 1280]."""
        pictures = clips.flatten(0, 1).to(self.device).float() / 127.5 - 1
        features = self.network.features(pictures).unflatten(0, clips.shape[:2])
        return torch.cat([features.mean(1), features.diff(dim=1).abs().mean(1)], dim=1).cpu()


def clip_statistics(clips: Clips, features: ClipFeatures, batch_size: int = 4) -> list[GaussianStatistics]:
    """Return the moments of features over clips, in ten interleaved groups (fewer if there are fewer clips); one batch is in memory.

    Raises:
        ValueError: if the clips are too short for the features.
    """
    if clips.frames < features.least_frames:
        raise ValueError(f"{features.metric} needs clips of at least {features.least_frames} frames, got {clips.frames}.")
    groups: list[GaussianStatistics] = []
    for start in range(0, len(clips), batch_size):
        indices = range(start, min(start + batch_size, len(clips)))
        rows = torch.cat([features(clips.read(i)[None]) for i in indices])
        for i, row in zip(indices, rows, strict=True):
            if len(groups) < GROUPS:
                groups.append(GaussianStatistics(rows.shape[1], features.source(clips.frames)))
            groups[i % GROUPS].update(row[None])
    return groups


def frechet_clip_distance(
    real: Clips, fake: Clips, features: ClipFeatures, batch_size: int = 4
) -> tuple[float, tuple[float, float] | None]:
    """Return the Frechet distance of two sets of clips and its 95 % interval by a jackknife over ten groups.

    Args:
        real, fake: clips; 20 of each are needed for an interval.
        features: of clips; `I3DFeatures` makes it FVD.
        batch_size: clips at a time.

    Raises:
        ValueError: if the clips are too short for the features.
        RuntimeError: if a set has fewer than two clips.
    """
    sets = [clip_statistics(clips, features, batch_size) for clips in (real, fake)]
    whole = [merged(groups) for groups in sets]
    value = frechet_distance(whole[0], whole[1], features.ddof)
    if min(len(real), len(fake)) < 2 * GROUPS:
        return value, None
    variance = sum(
        jackknife(groups, lambda rest, other=other: frechet_distance(rest, other, features.ddof))  # type: ignore[misc]
        for groups, other in zip(sets, reversed(whole), strict=True)
    )
    reach = QUANTILE * math.sqrt(variance)
    return value, (value - reach, value + reach)
