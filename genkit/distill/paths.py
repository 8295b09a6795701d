"""Noise paths and prediction types: every diffusion or flow network as a denoiser D(x; sigma) with x = clean + sigma noise.

A path noises data as x_t = alpha(t) x_0 + sigma(t) n. Divided by alpha it is x_0 + s n with s = sigma / alpha, so one convention serves
all: a network is evaluated at the time t with sigma(t) / alpha(t) = s, on alpha(t) x, and what it predicts is turned into x_0.

| prediction | what it is | x_0 |
|---|---|---|
| "x0" | the clean picture | itself |
| "eps" | the noise | (x_t - sigma eps) / alpha |
| "v" | alpha n - sigma x_0 | (alpha x_t - sigma v) / (alpha^2 + sigma^2) |
| "flow" | n - x_0, the velocity of a straight path | (x_t - sigma v) / (alpha + sigma) |
| "score" | -(x_t - alpha x_0) / sigma^2 | (x_t + sigma^2 score) / alpha |

Sources: Karras et al. 2022 (arXiv 2206.00364), Salimans and Ho 2022 (arXiv 2202.00512), Lipman et al. 2023 (arXiv 2210.02747).
Letters: b batch; the other axes are those of a picture or latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genkit.checks import choose
from genkit.distill.denoising import Denoiser, per_sample
from genkit.schedulers.noise_levels import vp_time

PREDICTIONS = ("x0", "eps", "v", "flow", "score")
Network = Callable[[Tensor, Tensor], Tensor]
"""(x_t [b, ...] in the path's scale, t [b]) -> prediction [b, ...]"""


class NoisePath:
    """How data is noised, as functions of the level s = sigma / alpha [b]."""

    def time(self, level: Tensor) -> Tensor:
        """Return the network's time argument."""
        raise NotImplementedError

    def alpha(self, level: Tensor) -> Tensor:
        """Return the factor of the data."""
        raise NotImplementedError

    def sigma(self, level: Tensor) -> Tensor:
        """Return the standard deviation of the noise, s alpha."""
        return level * self.alpha(level)


@dataclass(frozen=True)
class VEPath(NoisePath):
    """x_t = x_0 + sigma n, time sigma: EDM."""

    def time(self, level: Tensor) -> Tensor:
        """Return sigma."""
        return level

    def alpha(self, level: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(level)


@dataclass(frozen=True)
class VPPath(NoisePath):
    """alpha^2 + sigma^2 = 1, time of the variance-preserving process in [0, 1], times `time_scale`."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    time_scale: float = 1.0

    def time(self, level: Tensor) -> Tensor:
        """Return t, 1 is noise."""
        return vp_time(level, self.beta_d, self.beta_min) * self.time_scale

    def alpha(self, level: Tensor) -> Tensor:
        """Return 1 / sqrt(1 + s^2)."""
        return 1 / (1 + level**2).sqrt()


@dataclass(frozen=True)
class FlowPath(NoisePath):
    """x_t = (1 - t) x_0 + t n, time t in [0, 1] times `time_scale`: flow matching, 1 is noise."""

    time_scale: float = 1.0

    def time(self, level: Tensor) -> Tensor:
        """Return t = s / (1 + s)."""
        return level / (1 + level) * self.time_scale

    def alpha(self, level: Tensor) -> Tensor:
        """Return 1 - t."""
        return 1 / (1 + level)


PATHS: dict[str, type[NoisePath]] = {"ve": VEPath, "vp": VPPath, "flow": FlowPath}


def to_clean(prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, kind: str) -> Tensor:
    """Return x_0 of a prediction, in fp32 or wider.

    Args:
        prediction: [b, ...].
        x_t: [b, ...] in the path's scale.
        alpha, sigma: [b].
        kind: one of `PREDICTIONS`.

    Raises:
        ValueError: for an unknown kind.
    """
    choose(kind, PREDICTIONS, "prediction type")
    wide = torch.promote_types(x_t.dtype, torch.float32)
    p, x = prediction.to(wide), x_t.to(wide)
    a, s = per_sample(alpha.to(wide), x), per_sample(sigma.to(wide), x)
    if kind == "x0":
        return p
    if kind == "eps":
        return (x - s * p) / a
    if kind == "v":
        return (a * x - s * p) / (a**2 + s**2)
    return (x - s * p) / (a + s) if kind == "flow" else (x + s**2 * p) / a


def from_clean(clean: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, kind: str) -> Tensor:
    """Return the prediction of a kind that stands for x_0: the inverse of `to_clean`.

    Args:
        clean: [b, ...] x_0.
        x_t: [b, ...] in the path's scale.
        alpha, sigma: [b], sigma above 0.
        kind: one of `PREDICTIONS`.

    Raises:
        ValueError: for an unknown kind.
    """
    choose(kind, PREDICTIONS, "prediction type")
    wide = torch.promote_types(x_t.dtype, torch.float32)
    x_0, x = clean.to(wide), x_t.to(wide)
    a, s = per_sample(alpha.to(wide), x), per_sample(sigma.to(wide), x)
    noise = (x - a * x_0) / s
    if kind == "x0":
        return x_0
    if kind == "eps":
        return noise
    if kind == "v":
        return a * noise - s * x_0
    return noise - x_0 if kind == "flow" else -noise / s


def as_denoiser(network: Network, path: NoisePath, kind: str) -> Denoiser:
    """Return a network of any path and prediction type as D(x; sigma), x = clean + sigma noise.

    Args:
        network: with its condition bound.
        path: how its data is noised.
        kind: what it predicts, one of `PREDICTIONS`.

    Raises:
        ValueError: for an unknown kind.

    Example:
        >>> denoiser = as_denoiser(lambda x, t: torch.zeros_like(x), FlowPath(), "flow")  # no velocity: noise n = x_0
        >>> denoiser(torch.full((1, 2), 3.0), torch.tensor([0.5]))
        tensor([[2., 2.]])
    """
    choose(kind, PREDICTIONS, "prediction type")

    def denoise(x: Tensor, level: Tensor) -> Tensor:
        alpha = path.alpha(level)
        x_t = per_sample(alpha, x) * x
        return to_clean(network(x_t, path.time(level)), x_t, alpha, path.sigma(level), kind)

    return denoise


def guided(conditional: Denoiser, unconditional: Denoiser, scale: float) -> Denoiser:
    """Return D(null) + scale (D(condition) - D(null)); scale 1 is the conditional denoiser itself."""
    if scale == 1:
        return conditional

    def denoise(x: Tensor, level: Tensor) -> Tensor:
        null = unconditional(x, level)
        return null + scale * (conditional(x, level) - null)

    return denoise
