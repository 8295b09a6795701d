"""Video clips for evaluation, and the Frechet video distance over them.

Clips come from an array [n, f, h, w, 3] uint8 (`.npy`, `.npz`), from a folder of folders of frames (each a clip, frames by name), or from
a folder of video files (extra `video`). Every clip gives its first frames, every `stride`-th.

Letters: n clips, f frames, h w rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.checks import shorten
from genkit.data.images import find_pictures
from genkit.eval.frechet import GaussianStatistics, frechet_distance
from genkit.eval.i3d import I3D, LEAST_FRAMES
from genkit.eval.pictures import decode, open_array
from genkit.eval.video import prepare_clips

VIDEOS = (".mp4", ".webm", ".avi", ".mov", ".mkv", ".gif")
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
            pictures = [frame for i, frame in zip(range(last), _video_frames(item), strict=False) if i % self.stride == 0]
        if len(pictures) < self.frames:
            raise ValueError(f"{item} has fewer than {last} frames.")
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _video_frames(path: Path) -> Iterator[np.ndarray[Any, Any]]:
    """Decode a video file.

    Raises:
        ImportError: if PyAV is missing.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(f"reading {path.name} needs PyAV: pip install 'genkit-torch[video]', or give frames as pictures.") from error
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


@torch.inference_mode()
def clip_statistics(clips: Clips, network: I3D, protocol: str, batch_size: int = 4) -> GaussianStatistics:
    """Return the moments of I3D's logits over clips, one batch in memory at a time.

    Raises:
        ValueError: if the clips are too short for I3D.
    """
    if clips.frames < LEAST_FRAMES:
        raise ValueError(f"the Frechet video distance needs clips of at least {LEAST_FRAMES} frames, got {clips.frames}.")
    stats: GaussianStatistics | None = None
    device = next(network.parameters()).device
    for start in range(0, len(clips), batch_size):
        batch = [clips.read(i)[None] for i in range(start, min(start + batch_size, len(clips)))]
        prepared = torch.cat([prepare_clips(clip, protocol) for clip in batch])
        logits = network(prepared.to(device)).cpu()
        stats = stats or GaussianStatistics(logits.shape[1], f"i3d, {protocol}, {clips.frames} frames")
        stats.update(logits)
    assert stats is not None
    return stats


def frechet_video_distance(real: Clips, fake: Clips, network: I3D, protocol: str = "stylegan-v", batch_size: int = 4) -> float:
    """Return the Frechet distance of I3D's logits (FVD).

    Args:
        real, fake: clips.
        network: with the published weights.
        protocol: key of `genkit.eval.video.PREPARATIONS`; "stylegan-v" also divides covariances by n.
        batch_size: clips at a time.
    """
    a, b = (clip_statistics(clips, network, protocol, batch_size) for clips in (real, fake))
    return frechet_distance(a, b, DDOF.get(protocol, 1))
