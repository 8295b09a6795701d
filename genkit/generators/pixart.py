"""PixArt-alpha as a denoiser: diffusers' `PixArtTransformer2DModel`, which predicts noise at 1,000 steps, asked at any noise level.

x_0 = x - sigma eps(x / sqrt(1 + sigma^2), timestep), timestep = 999 - index of the nearest entry of a table of levels.

Sources: Chen et al. 2023 (PixArt-alpha, arXiv 2310.00426); Luo et al. 2024 (SIM, arXiv 2410.16794), whose one-step student is this network.
Letters: b batch, c channels, h w of the latent, m text tokens, d width of a text token.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from genkit.schedulers.noise_levels import linear_table, nearest_level

TEXT_TOKENS = 120
LATENT_CHANNELS = 4


@functools.lru_cache(maxsize=8)
def level_table(levels: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Return the noise levels u [M+1] of the steps, falling to u[M] = 0, fp32."""
    with torch.inference_mode(False), torch.device("cpu"):
        return linear_table(levels, beta_start, beta_end)


def timestep_of(sigma: Tensor, table: Tensor) -> Tensor:
    """Return the step of the nearest noise level, int64, 0 the least noise."""
    return len(table) - 2 - nearest_level(table, sigma)


def denoise(transformer: Any, x: Tensor, sigma: Tensor, caption: Tensor, mask: Tensor, table: Tensor | None = None) -> Tensor:
    """Return clean latents [b, c, h, w], fp32.

    Args:
        transformer: `PixArtTransformer2DModel`, or what wraps one; evaluated in the type of its input.
        x: [b, c, h, w] = clean + sigma noise.
        sigma: [b] levels.
        caption: [b, m, d] text-encoder states.
        mask: [b, m] bool, True = real token.
        table: levels of the steps; PixArt's own if None.
    """
    table = level_table() if table is None else table
    wide = sigma.float().view(-1, 1, 1, 1)
    step = timestep_of(sigma, table)
    none = {"resolution": None, "aspect_ratio": None}
    scaled = (x.float() / (1 + wide**2).sqrt()).to(caption.dtype)
    predicted = transformer(
        scaled, encoder_hidden_states=caption, timestep=step, encoder_attention_mask=mask.to(caption.dtype), added_cond_kwargs=none
    ).sample
    return x.float() - wide * predicted[:, : x.shape[1]].float()
