"""The Gaussian diffusion of DDPM with learned variances, as exact tables: what trains VDT, and the reference for diffusers' schedulers.

diffusers keeps its tables in float32, which costs accuracy at small t, and has no variational bound. Here tables are built in float64, also
for respaced chains, gathered and cast where they are used. `float64_alphas` gives a diffusers scheduler the exact tables.

Sources: Ho et al. 2020 (arXiv 2006.11239), Song et al. 2021 (DDIM, arXiv 2010.02502), Nichol and Dhariwal 2021 (arXiv 2102.09672).
Letters: T steps of a chain, t step index, a_t accumulated product of 1 - beta, b batch; the other axes are those of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genkit.checks import choose

SCHEDULES = ("linear", "squaredcos_cap_v2")


def make_betas(schedule: str, steps: int) -> Tensor:
    """Return beta_t [T], float64: linear from 1e-4 to 0.02 (scaled by 1000 / T), or from the squared cosine, at most 0.999.

    Raises:
        ValueError: for an unknown schedule.
    """
    choose(schedule, SCHEDULES, "noise schedule")
    if schedule == "linear":
        scale = 1000 / steps
        return torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)

    def g(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return torch.tensor([min(1 - g((i + 1) / steps) / g(i / steps), 0.999) for i in range(steps)], dtype=torch.float64)


def kept_steps(respacing: str, steps: int = 1000) -> list[int]:
    """Return the steps of a chain that a respacing keeps, ascending.

    Args:
        respacing: "" for all; "n" for n of them; "a,b,c" for counts of equal sections; "ddimN" for every k-th, N of them.
        steps: of the whole chain.

    Raises:
        ValueError: if there are not so many.

    Example:
        >>> kept_steps("4", 10), kept_steps("ddim5", 10), kept_steps("2,1", 10)
        ([0, 3, 6, 9], [0, 2, 4, 6, 8], [0, 4, 5])
    """
    if not respacing:
        return list(range(steps))
    if respacing.startswith("ddim"):
        count = int(respacing.removeprefix("ddim"))
        stride = next((k for k in range(1, steps) if len(range(0, steps, k)) == count), None)
        if stride is None:
            raise ValueError(f"respacing {respacing!r}: no whole stride keeps {count} of {steps} steps.")
        return list(range(0, steps, stride))
    counts = [int(part) for part in respacing.split(",")]
    size, extra, start, kept = steps // len(counts), steps % len(counts), 0, []
    for i, count in enumerate(counts):
        own = size + (1 if i < extra else 0)
        if not 1 <= count <= own:
            raise ValueError(f"respacing {respacing!r}: a section of {own} steps cannot keep {count}.")
        gap, place = (1.0 if count == 1 else (own - 1) / (count - 1)), 0.0
        for _ in range(count):
            kept.append(start + round(place))
            place += gap
        start += own
    return kept


class Prediction(NamedTuple):
    """What one model evaluation says of the step before.

    Attributes:
        mean, log_variance: of x_{t-1}.
        clean: x_0.
    """

    mean: Tensor
    log_variance: Tensor
    clean: Tensor


class GaussianDiffusion:
    """One chain.

    Args:
        schedule: "linear" or "squaredcos_cap_v2".
        steps: of the whole chain.
        respacing: see `kept_steps`.
        predict_clean: the model predicts x_0 instead of the noise.
        variance: "learned_range", "fixed_large" or "fixed_small".

    Attributes:
        timesteps: step of the whole chain for each kept one, int64 [T]; what the model is told.
        betas, alphas_cumprod, ...: tables of the kept chain, float64 [T].
    """

    def __init__(
        self, schedule: str = "linear", steps: int = 1000, respacing: str = "", predict_clean: bool = False, variance: str = "learned_range"
    ) -> None:
        choose(variance, ("learned_range", "fixed_large", "fixed_small"), "variance")
        whole = (1 - make_betas(schedule, steps)).cumprod(0)
        kept = kept_steps(respacing, steps)
        self.timesteps = torch.tensor(kept)
        alphas = whole[self.timesteps]
        before = torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
        self.betas = 1 - alphas / before if respacing else make_betas(schedule, steps)
        self.alphas_cumprod = (1 - self.betas).cumprod(0)
        self.alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        a, previous = self.alphas_cumprod, self.alphas_cumprod_prev
        self.posterior_variance = self.betas * (1 - previous) / (1 - a)
        clipped = self.posterior_variance.clone()
        if len(clipped) > 1:
            clipped[0] = clipped[1]
        self.posterior_log_variance_clipped = clipped.log()
        self.posterior_mean_coef1 = self.betas * previous.sqrt() / (1 - a)
        self.posterior_mean_coef2 = (1 - previous) * (1 - self.betas).sqrt() / (1 - a)
        self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod = a.sqrt(), (1 - a).sqrt()
        self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod = (1 / a).sqrt(), (1 / a - 1).sqrt()
        self.log_betas = self.betas.log()
        large = torch.cat([clipped[:1] if len(clipped) == 1 else clipped[1:2], self.betas[1:]])
        self.log_fixed_large = large.log()
        self.predict_clean, self.variance = predict_clean, variance

    def __len__(self) -> int:
        return len(self.betas)

    def at(self, table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """Return entries of a table at steps [b], float32, with axes behind to multiply samples [b, ...]."""
        return table.to(torch.float32)[t.cpu()].to(like.device).view(-1, *[1] * (like.ndim - 1))

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, samples [b, ...], steps [b]."""
        return self.at(self.sqrt_alphas_cumprod, t, clean) * clean + self.at(self.sqrt_one_minus_alphas_cumprod, t, clean) * noise

    def posterior_mean(self, clean: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the mean of q(x_{t-1} | x_t, x_0)."""
        return self.at(self.posterior_mean_coef1, t, x_t) * clean + self.at(self.posterior_mean_coef2, t, x_t) * x_t

    def clean_of(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """Return x_0 of a model's output of the sample's shape."""
        if self.predict_clean:
            return output
        return self.at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t - self.at(self.sqrt_recipm1_alphas_cumprod, t, x_t) * output

    def noise_of(self, x_t: Tensor, t: Tensor, clean: Tensor) -> Tensor:
        """Return the noise that x_0 stands for."""
        return (self.at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t - clean) / self.at(self.sqrt_recipm1_alphas_cumprod, t, x_t)

    def predict(self, x_t: Tensor, t: Tensor, output: Tensor, logits: Tensor | None = None, clip: bool = False) -> Prediction:
        """Return what a model's output says of x_{t-1}.

        Args:
            x_t: [b, ...].
            t: [b] indices of the kept chain.
            output: [b, ...] predicted noise, or x_0.
            logits: [b, ...] variance logits, for "learned_range".
            clip: keep x_0 in [-1, 1].

        Raises:
            ValueError: if the logits are missing.
        """
        clean = self.clean_of(x_t, t, output)
        clean = clean.clamp(-1, 1) if clip else clean
        if self.variance == "learned_range":
            if logits is None:
                raise ValueError("variance 'learned_range' needs the model's variance logits; choose a fixed variance without.")
            share = (logits + 1) / 2
            low, high = (self.at(table, t, x_t) for table in (self.posterior_log_variance_clipped, self.log_betas))
            log_variance = share * high + (1 - share) * low
        else:
            table = self.log_fixed_large if self.variance == "fixed_large" else self.posterior_log_variance_clipped
            log_variance = self.at(table, t, x_t).expand_as(x_t)
        return Prediction(self.posterior_mean(clean, x_t, t), log_variance, clean)

    def ancestral_step(
        self, x_t: Tensor, t: Tensor, output: Tensor, logits: Tensor | None, noise: Tensor, clip: bool = False
    ) -> tuple[Tensor, Prediction]:
        """Return x_{t-1} drawn with given noise (none at t = 0), and the prediction."""
        found = self.predict(x_t, t, output, logits, clip)
        is_last = (t != 0).to(x_t).view(-1, *[1] * (x_t.ndim - 1))
        return found.mean + is_last * (0.5 * found.log_variance).exp() * noise, found

    def ddim_step(
        self, x_t: Tensor, t: Tensor, output: Tensor, eta: float = 0.0, noise: Tensor | None = None, clip: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return x_{t-1} by DDIM, and x_0; the noise is recomputed from the clipped x_0."""
        clean = self.clean_of(x_t, t, output)
        clean = clean.clamp(-1, 1) if clip else clean
        eps = self.noise_of(x_t, t, clean)
        a, previous = self.at(self.alphas_cumprod, t, x_t), self.at(self.alphas_cumprod_prev, t, x_t)
        spread = eta * ((1 - previous) / (1 - a)).sqrt() * (1 - a / previous).sqrt()
        mean = clean * previous.sqrt() + (1 - previous - spread**2).sqrt() * eps
        if eta == 0 or noise is None:
            return mean, clean
        return mean + (t != 0).to(x_t).view(-1, *[1] * (x_t.ndim - 1)) * spread * noise, clean

    def bound_terms(self, clean: Tensor, x_t: Tensor, t: Tensor, output: Tensor, logits: Tensor) -> Tensor:
        """Return the terms of the variational bound [b], in bits per element: KL for t > 0, likelihood at t = 0. x_0 is not clipped."""
        found = self.predict(x_t, t, output, logits)
        true = self.posterior_mean(clean, x_t, t)
        low = self.at(self.posterior_log_variance_clipped, t, x_t)
        kl = normal_kl(true, low, found.mean, found.log_variance).flatten(1).mean(1)
        likelihood = -discretized_log_likelihood(clean, found.mean, 0.5 * found.log_variance).flatten(1).mean(1)
        return torch.where(t.to(kl.device) == 0, likelihood, kl) / math.log(2)


def normal_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """Return KL of two normal distributions, elementwise, in nats."""
    gap = (mean - other_mean) ** 2 * (-other_log_variance).exp()
    return 0.5 * (-1.0 + other_log_variance - log_variance + (log_variance - other_log_variance).exp() + gap)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return the log probability of 8-bit pixels x in [-1, 1] under normal distributions, elementwise, in nats.

    Bins reach 1/255 to both sides, the outermost to infinity; the distribution function is the tanh approximation.
    """
    centred, inverse = x - mean, (-log_scale).exp()
    upper, lower = _normal_cdf(inverse * (centred + 1 / 255)), _normal_cdf(inverse * (centred - 1 / 255))
    floor = 1e-12
    inside = (upper - lower).clamp_min(floor).log()
    low, high = upper.clamp_min(floor).log(), (1 - lower).clamp_min(floor).log()
    return torch.where(x < -0.999, low, torch.where(x > 0.999, high, inside))


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def float64_alphas(scheduler: Any, betas: Tensor | Sequence[float] | None = None) -> Any:
    """Give one of diffusers' schedulers its accumulated products in float64; return it.

    Its own are float32, where 1 - a_t loses digits at small t.

    Args:
        scheduler: with `betas` and `alphas_cumprod`.
        betas: exact ones; those of the linear schedule of its configuration if None.
    """
    config = scheduler.config
    if betas is None:
        betas = torch.linspace(config["beta_start"], config["beta_end"], config["num_train_timesteps"], dtype=torch.float64)
    scheduler.alphas_cumprod = (1 - torch.as_tensor(betas, dtype=torch.float64)).cumprod(0)
    if hasattr(scheduler, "one"):
        scheduler.one = torch.ones((), dtype=torch.float64)
    return scheduler
