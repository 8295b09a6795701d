"""What pipelines return: pictures with their seeds, the state of a running loop, memory estimates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from genkit.checks import choose

OUTPUT_TYPES = ("pil", "np", "pt")


@dataclass
class ImageOutput(BaseOutput):
    """Pictures.

    Args:
        images: list of PIL images; or [b, h, w, 3] in [0, 1] (np); or [b, 3, h, w] in [-1, 1] (pt).
        seeds: seed of each picture; give them as `generator` to get the same pictures again.
        tokens: [b, h, w] int64 codes of the pictures, where the system has codes.
    """

    images: list[Image.Image] | np.ndarray[Any, Any] | Tensor
    seeds: list[int]
    tokens: Tensor | None = None


@dataclass
class StepState:
    """A loop after one of its steps. The loop goes on from `sample`: change it, and the change counts.

    Args:
        index: steps done minus one.
        num_steps: steps in all.
        timestep: the scheduler's timestep of this step.
        sample: what is being made.
        seeds: seed of each sample.
    """

    index: int
    num_steps: int
    timestep: float
    sample: Tensor
    seeds: list[int]


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of a call, in bytes.

    Args:
        weights: all components.
        sampling: largest step of the loop, beyond the weights.
        decoding: largest chunk of the decoder with all pictures, beyond the weights.
    """

    weights: int
    sampling: int
    decoding: int

    @property
    def peak(self) -> int:
        """Weights and the larger of the two stages."""
        return self.weights + max(self.sampling, self.decoding)

    def __str__(self) -> str:
        parts = [f"{name} {getattr(self, name) / 1e6:,.0f}" for name in ("weights", "sampling", "decoding")]
        return f"{self.peak / 1e6:,.0f} MB: {', '.join(parts)}"


def to_output_type(images: Tensor, output_type: str) -> list[Image.Image] | np.ndarray[Any, Any] | Tensor:
    """Turn pictures into what the caller asked for.

    Args:
        images: [b, 3, h, w], about [-1, 1].
        output_type: 'pil', 'np' ([b, h, w, 3] fp32 in [0, 1]) or 'pt' ([b, 3, h, w] fp32 in [-1, 1]).

    Returns:
        The pictures, clamped to their range.

    Raises:
        ValueError: for an unknown type.
    """
    choose(output_type, OUTPUT_TYPES, "output type")
    images = images.detach().float().clamp(-1, 1)
    if output_type == "pt":
        return images
    array: np.ndarray[Any, Any] = (images / 2 + 0.5).cpu().permute(0, 2, 3, 1).numpy()  # b c h w -> b h w c
    if output_type == "np":
        return array
    return [Image.fromarray(picture) for picture in np.round(array * 255).astype(np.uint8)]
