"""Preconditioners: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), for networks F that predict in one of four conventions.

Source: Karras et al. 2022 (arXiv 2206.00364), table 1. They have no weights, so one network can be put behind any of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from genkit.checks import choose
from genkit.schedulers.noise_levels import cosine_table, nearest_level, vp_sigma, vp_time


class Coefficients(NamedTuple):
    """Factors of a preconditioner, of the shape of sigma."""

    skip: Tensor
    out: Tensor
    input: Tensor
    noise: Tensor


class Preconditioner:
    """What is done around the network: `coefficients(sigma)`, the range of noise levels, and rounding to levels that exist.

    Attributes:
        sigma_min, sigma_max: range that the network knows.
        channels: output channels of the network for one channel of the picture.
    """

    sigma_min, sigma_max = 0.0, math.inf
    channels = 1

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return the factors at noise levels sigma > 0, fp32."""
        raise NotImplementedError

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """Return the nearest noise levels that the network knows."""
        return sigma


class EDMPreconditioner(Preconditioner):
    """Karras et al.: unit variance of inputs and targets for data of standard deviation `sigma_data`."""

    def __init__(self, sigma_data: float = 0.5) -> None:
        if sigma_data <= 0:
            raise ValueError(f"sigma_data must be above 0, got {sigma_data}.")
        self.sigma_data = sigma_data

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return the factors."""
        total = sigma**2 + self.sigma_data**2
        return Coefficients(self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4)


class VPPreconditioner(Preconditioner):
    """Variance preserving, predicts noise; the argument is the time of 1,000 steps."""

    def __init__(self, beta_d: float = 19.9, beta_min: float = 0.1, num_levels: int = 1000, epsilon_t: float = 1e-5) -> None:
        self.beta_d, self.beta_min, self.num_levels = beta_d, beta_min, num_levels
        ends = vp_sigma(torch.tensor([epsilon_t, 1.0], dtype=torch.float64), beta_d, beta_min)
        self.sigma_min, self.sigma_max = float(ends[0]), float(ends[1])

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return the factors."""
        noise = (self.num_levels - 1) * vp_time(sigma, self.beta_d, self.beta_min)
        return Coefficients(torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), noise)


class VEPreconditioner(Preconditioner):
    """Variance exploding, predicts the negative noise."""

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 100.0) -> None:
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return the factors."""
        return Coefficients(torch.ones_like(sigma), sigma, torch.ones_like(sigma), (0.5 * sigma).log())


class IDDPMPreconditioner(Preconditioner):
    """Improved DDPM: predicts noise (and a variance, which D does not use) at the levels of a cosine table."""

    channels = 2

    def __init__(self, num_levels: int = 1000, floor: float = 1e-3, offset: float = 8e-3) -> None:
        self.table = cosine_table(num_levels, floor, offset)
        self.num_levels = num_levels
        self.sigma_min, self.sigma_max = float(self.table[num_levels - 1]), float(self.table[0])

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return the factors; the argument counts levels from the smallest."""
        noise = (self.num_levels - 1 - nearest_level(self.table, sigma)).to(sigma.dtype)
        return Coefficients(torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), noise)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """Return the nearest entries of the table."""
        return self.table.to(sigma.device)[nearest_level(self.table, sigma)].to(sigma.dtype)


PRECONDITIONERS: dict[str, type[Preconditioner]] = {
    "edm": EDMPreconditioner,
    "vp": VPPreconditioner,
    "ve": VEPreconditioner,
    "iddpm": IDDPMPreconditioner,
}


def make_preconditioner(name: str, **options: float) -> Preconditioner:
    """Build a preconditioner by name.

    Args:
        name: key of `PRECONDITIONERS`.
        **options: of its constructor.

    Raises:
        ValueError: for an unknown name. TypeError: for unknown options.
    """
    choose(name, PRECONDITIONERS, "preconditioner")
    return PRECONDITIONERS[name](**options)
