"""A tiny teacher that the distillation tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from genkit.generators.edm import EDMUNet2DModel
from genkit.pipelines.edm import EDMPipeline
from genkit.schedulers.edm_heun import EDMHeunScheduler

UNET = {"name": "song", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.1}
NAMES = {0: "blue", 1: "red"}


def denoiser(label_dim: int = 2, seed: int = 0) -> EDMUNet2DModel:
    """Return a network of 8x8 pictures whose every layer acts (a new one has outputs near 0)."""
    torch.manual_seed(seed)
    model = EDMUNet2DModel(sample_size=8, label_dim=label_dim, unet_config=UNET)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model.eval()


def teacher(label_dim: int = 2, seed: int = 0) -> Any:
    """Return an `EDMPipeline` around it."""
    pipe = EDMPipeline(denoiser(label_dim, seed), EDMHeunScheduler(), id2label=dict(NAMES) if label_dim else None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(folder: Path, count: int = 12) -> Path:
    """Write pictures of two classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        label = folder / NAMES[i % 2]
        label.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(label / f"{i}.png")
    return folder


def gaussian_denoiser(mean: float, std: float) -> object:
    """Return the exact denoiser of data ~ N(mean, std^2)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.view(-1, *[1] * (x.ndim - 1))
        return (x * std**2 + mean * s**2) / (std**2 + s**2)

    return denoise
