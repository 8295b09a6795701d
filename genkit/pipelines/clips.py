"""Clips as people hand them to a video pipeline, and as they get them back.

Letters: b clips, f frames, h w rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from genkit.checks import choose
from genkit.pipelines.outputs import to_output_type

Clip = Tensor | np.ndarray[Any, Any] | Sequence[Image.Image]
TASKS = ("generate", "predict", "backward", "interpolate", "animate", "complete")


def clip_tensor(frames: Clip) -> Tensor:
    """Return frames as [b, f, 3, h, w] in [-1, 1].

    Args:
        frames: PIL images; array [f, h, w, 3] or [b, f, h, w, 3] of bytes or in [0, 1]; tensor [f, 3, h, w] or [b, f, 3, h, w] in [-1, 1].

    Raises:
        ValueError: for no frames, other shapes, or pictures of different sizes.
        TypeError: for anything else.
    """
    if isinstance(frames, Tensor):
        tensor = frames
    elif isinstance(frames, np.ndarray):
        if frames.ndim not in (4, 5) or frames.shape[-1] != 3:
            raise ValueError(f"frames must be an array [f, h, w, 3] or [b, f, h, w, 3], got {list(frames.shape)}.")
        scale = 255 if frames.dtype == np.uint8 else 1
        tensor = torch.from_numpy(frames.astype(np.float32) / scale).movedim(-1, -3) * 2 - 1
    elif isinstance(frames, Sequence) and all(isinstance(frame, Image.Image) for frame in frames):
        sizes = sorted({frame.size for frame in frames})
        if len(sizes) != 1:
            raise ValueError(f"frames must be at least one picture, all of one size, got {len(frames)} of sizes {sizes}.")
        return clip_tensor(np.stack([np.asarray(frame.convert("RGB")) for frame in frames]))
    else:
        raise TypeError(f"frames must be PIL images, an array or a tensor, got {type(frames).__name__}.")
    if tensor.ndim not in (4, 5) or tensor.shape[-3] != 3 or not tensor.shape[-4]:
        raise ValueError(f"frames must be [f, 3, h, w] or [b, f, 3, h, w] with at least one frame, got {list(tensor.shape)}.")
    return (tensor[None] if tensor.ndim == 4 else tensor).float()


def place_frames(given: int, task: str, total: int) -> list[int]:
    """Return where given frames stand in a clip.

    Args:
        given: number of frames.
        task: "predict" (first), "backward" (last), "interpolate" (spread evenly, both ends included) or "animate" (one, the first).
        total: frames of the clip.

    Raises:
        ValueError: for other words, and for too many or too few frames.
    """
    choose(task, TASKS, "mask")
    if task == "complete":
        raise ValueError("mask='complete': give the mask itself, a bool tensor [f, h, w] in pixels, True where to make anew.")
    if task == "generate":
        raise ValueError("mask='generate' uses no frames; leave frames out, or choose another mask.")
    if task == "animate" and given != 1:
        raise ValueError(f"mask='animate' starts from one frame, got {given}; mask='predict' takes several.")
    if task == "interpolate" and given < 2:
        raise ValueError(f"mask='interpolate' needs at least 2 key frames, got {given}.")
    if given >= total:
        raise ValueError(f"mask={task!r}: {given} of {total} frames are given, nothing is left to make; give fewer, or more num_frames.")
    if task == "interpolate":
        return [round(i * (total - 1) / (given - 1)) for i in range(given)]
    return list(range(total - given, total)) if task == "backward" else list(range(given))


def pixel_mask(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a mask [b|1, f, h, w] of one given as [f, h, w] or [b, f, h, w].

    Args:
        mask: bool, True = to be made.
        shape: of the clips [b, f, 3, h, w].

    Raises:
        ValueError: for another type or shape, and where nothing is to be made.
    """
    wanted = [shape[1], *shape[3:]]
    whole = mask[None] if mask.ndim == 3 else mask
    if mask.dtype != torch.bool or whole.ndim != 4 or list(whole.shape[1:]) != wanted:
        raise ValueError(f"mask must be bool {wanted} or [b, ...] of that (True = to be made), got {mask.dtype} {list(mask.shape)}.")
    if not bool(whole.flatten(1).any(1).all()):
        raise ValueError("mask: everything is given, so there is nothing to make; True marks what is to be made.")
    return whole


def reduce_mask(mask: Tensor, factor: int) -> Tensor:
    """Return a mask [b, f, h, w] on cells of `factor` pixels: a cell with any marked pixel is marked."""
    return F.max_pool2d(mask.float(), factor) > 0 if factor > 1 else mask


def to_video(video: Tensor, output_type: str) -> Any:
    """Turn clips [b, f, 3, h, w], about [-1, 1], into lists of PIL images, an array [b, f, h, w, 3] in [0, 1], or a tensor."""
    found = to_output_type(video.flatten(0, 1), output_type)
    b, f = video.shape[:2]
    if isinstance(found, list):
        return [found[i * f : (i + 1) * f] for i in range(b)]
    return found.reshape(b, f, *found.shape[1:])
