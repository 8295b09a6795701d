"""Noise levels of diffusion models as standard deviations in data units: sigma(t) of the variance-preserving process, the cosine and
linear tables of discrete models.

Sources: Song et al. 2021 (arXiv 2011.13456), Nichol and Dhariwal 2021 (arXiv 2102.09672), Karras et al. 2022 (arXiv 2206.00364), table 1.

Letters: M levels of a table, beta rates of the process.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BETA_D, BETA_MIN = 19.9, 0.1


def vp_sigma(t: Tensor, beta_d: float | Tensor = BETA_D, beta_min: float | Tensor = BETA_MIN) -> Tensor:
    """Return sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1), the noise level at time t in [0, 1] (1 is noise)."""
    return (0.5 * beta_d * t**2 + beta_min * t).exp().sub(1).sqrt()


def vp_time(sigma: Tensor, beta_d: float | Tensor = BETA_D, beta_min: float | Tensor = BETA_MIN) -> Tensor:
    """Return the time at which the noise level is sigma: the inverse of `vp_sigma`."""
    return ((beta_min**2 + 2 * beta_d * (1 + sigma**2).log()).sqrt() - beta_min) / beta_d


def _accumulated(ratios: list[Tensor], floor: float) -> Tensor:
    """Return u [M+1] from ratios of alpha-bar, M of them from index M down: u[M] = 0, u[j-1]^2 + 1 = (u[j]^2 + 1) / ratio, in fp32."""
    levels = [torch.zeros(())]
    for ratio in ratios:
        levels.append(((levels[-1] ** 2 + 1) / ratio.clamp(min=floor) - 1).sqrt())
    return torch.stack(levels[::-1])


def cosine_table(levels: int = 1000, floor: float = 1e-3, offset: float = 8e-3) -> Tensor:
    """Return the noise levels u [M+1] of improved DDPM's cosine schedule, falling to u[M] = 0.

    alpha-bar(j) = sin^2(pi j / (2 M (1 + offset))); ratios of neighbours are at least `floor`.
    """

    def alpha_bar(j: int) -> Tensor:
        return (0.5 * math.pi * torch.tensor(float(j)) / levels / (1 + offset)).sin() ** 2

    return _accumulated([alpha_bar(j - 1) / alpha_bar(j) for j in range(levels, 0, -1)], floor)


def linear_table(levels: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, floor: float = 1e-3) -> Tensor:
    """Return the noise levels u [M+1] of rates beta(j) = beta_end + (beta_start - beta_end) j / M, falling to u[M] = 0.

    Not the square root of (1 - alpha-bar) / alpha-bar of the usual linear rates: that differs by up to 0.5 %.
    """
    rates = [beta_end + (beta_start - beta_end) * torch.tensor(float(j)) / levels for j in range(levels, 0, -1)]
    return _accumulated([1 - rate for rate in rates], floor)


def nearest_level(table: Tensor, sigma: Tensor) -> Tensor:
    """Return the index of the entry of a table [M+1] nearest to each noise level, int64, the first of equals."""
    return (sigma.to(table.dtype)[..., None] - table.to(sigma.device)).abs().argmin(-1)
