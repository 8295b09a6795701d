"""Laws of the noise levels that losses are averaged over: each turns standard draws into standard deviations in data units.

Sources: Karras et al. 2022 (arXiv 2206.00364), Song et al. 2021 (arXiv 2011.13456), Zhou et al. 2024 (SiD, arXiv 2404.04057).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from genkit.checks import choose
from genkit.schedulers.noise_levels import vp_sigma


class Levels:
    """A law of levels.

    Attributes:
        draws: what `sigma` takes, standard normal or uniform draws in [0, 1).
    """

    draws: ClassVar[Literal["normal", "uniform"]] = "uniform"

    def sigma(self, draws: Tensor) -> Tensor:
        """Return levels of the shape of the draws."""
        raise NotImplementedError


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"noise levels: {name} must be above 0 and finite, got {value}.")


@dataclass(frozen=True)
class LogNormalLevels(Levels):
    """ln sigma ~ N(mean, std^2): EDM's law, for teachers and critics."""

    draws: ClassVar[Literal["normal", "uniform"]] = "normal"
    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _positive(std=self.std)

    def sigma(self, draws: Tensor) -> Tensor:
        """Return exp(mean + std * draw)."""
        return (draws * self.std + self.mean).exp()


@dataclass(frozen=True)
class VPLevels(Levels):
    """Uniform time of the variance-preserving process, from 1 down to epsilon_t."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5

    def sigma(self, draws: Tensor) -> Tensor:
        """Return the noise level at time 1 + u (epsilon_t - 1)."""
        return vp_sigma(1 + draws * (self.epsilon_t - 1), self.beta_d, self.beta_min)


@dataclass(frozen=True)
class GeometricLevels(Levels):
    """ln sigma uniform: the variance-exploding law."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def __post_init__(self) -> None:
        _positive(sigma_min=self.sigma_min, sigma_max=self.sigma_max)

    def sigma(self, draws: Tensor) -> Tensor:
        """Return sigma_min (sigma_max / sigma_min)^u."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** draws


@dataclass(frozen=True)
class KarrasLevels(Levels):
    """Uniform place t in [first, last] of EDM's sampling schedule, 0 at sigma_min and 1 at sigma_max; SiD and SIM: [0, 0.8]."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    first: float = 0.0
    last: float = 0.8

    def __post_init__(self) -> None:
        _positive(sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)
        if not 0 <= self.first < self.last <= 1:
            raise ValueError(f"noise levels: 0 <= first < last <= 1, got first={self.first}, last={self.last}.")

    def sigma(self, draws: Tensor) -> Tensor:
        """Return (sigma_max^(1/rho) + (1 - t) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        place = self.first + draws * (self.last - self.first)
        return (high + (1 - place) * (low - high)) ** self.rho


LEVELS: dict[str, type[Levels]] = {
    "lognormal": LogNormalLevels,
    "vp": VPLevels,
    "geometric": GeometricLevels,
    "karras": KarrasLevels,
}


def make_levels(name: str, **options: Any) -> Levels:
    """Build a law by name.

    Args:
        name: key of `LEVELS`.
        **options: of its constructor.

    Raises:
        ValueError: for an unknown name or impossible values. TypeError: for unknown options.
    """
    choose(name, LEVELS, "law of noise levels")
    return LEVELS[name](**options)


def edm_weight(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Return (sigma^2 + sigma_data^2) / (sigma sigma_data)^2: unit loss of an EDM network at every level, before it has learnt."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def inverse_square_weight(sigma: Tensor) -> Tensor:
    """Return 1 / sigma^2: the loss on noise instead of pictures."""
    return 1 / sigma**2


WEIGHTS = {"edm": edm_weight, "inverse_square": inverse_square_weight, "one": torch.ones_like}
