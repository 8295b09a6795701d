"""EDMHeunScheduler: the second-order sampler of EDM with churn, and its generalisation over discretizations, schedules and scalings.

Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al. 2022, arXiv 2206.00364), algorithms 1 and 2. diffusers'
`HeunDiscreteScheduler` has neither churn nor a free range of levels, its `EDMEulerScheduler` is of first order.

- the state is float64 where the device has it: the numbers of the reference to the last bit, whatever the network computes in
- noise levels are Python numbers, so that nothing waits for the device
- one `step` per network evaluation, as in diffusers: 2 N - 1 of them for N steps

Legend: N steps, sigma noise level in data units, s(t) scaling of the state, x = s(t) (clean + sigma(t) noise).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from genkit.checks import choose
from genkit.schedulers.noise_levels import cosine_table, vp_sigma, vp_time

EPSILON_S = 1e-3  # last time of the VP discretization
RANGES = {"edm": (0.002, 80.0), "ve": (0.02, 100.0), "iddpm": (0.002, 81.0)}
Rounding = Callable[[Tensor], Tensor]


@dataclass
class EDMHeunSchedulerOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: state to go on with, in the scheduler's type.
        pred_original_sample: the denoised pictures it was made from.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


@dataclass
class _Pending:
    """A step after its first network evaluation, or before it.

    Attributes:
        x_hat: state at t_hat, after churn.
        t_hat: time of it.
        slope: of the first evaluation, None before it.
    """

    x_hat: Tensor
    t_hat: float
    slope: Tensor | None = None


class EDMHeunScheduler(SchedulerMixin, ConfigMixin):
    """Deterministic or stochastic sampling with a denoiser D(x; sigma).

    In a loop, for each `sigma` of `timesteps`: `x = scale_model_input(sample, sigma)`, D = model(x, sigma),
    `sample = step(D, sigma, sample).prev_sample`.

    Args:
        sigma_min, sigma_max: range of noise levels; that of the discretization if None.
        rho: how levels crowd near sigma_min.
        s_churn: noise added over all steps; 0 = deterministic.
        s_min, s_max: levels between which noise is added; None is no upper bound.
        s_noise: standard deviation of that noise.
        solver: "heun" (second order) or "euler".
        alpha: place of the second evaluation within a step: 1 is Heun's, 0.5 the midpoint.
        discretization: where the levels lie: "edm", "vp", "ve" or "iddpm".
        schedule: sigma(t): "linear" (sigma = t), "vp" or "ve".
        scaling: s(t): "none" or "vp".
        use_float64: keep the state in float64; None where the device has it.

    Raises:
        ValueError: for unknown names and impossible values.

    Example:
        >>> scheduler = EDMHeunScheduler()
        >>> scheduler.set_timesteps(3)
        >>> len(scheduler.timesteps), round(float(scheduler.timesteps[0]))
        (5, 80)
    """

    order = 2

    @register_to_config
    def __init__(
        self,
        *,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        rho: float = 7.0,
        s_churn: float = 0.0,
        s_min: float = 0.0,
        s_max: float | None = None,
        s_noise: float = 1.0,
        solver: Literal["heun", "euler"] = "heun",
        alpha: float = 1.0,
        discretization: Literal["edm", "vp", "ve", "iddpm"] = "edm",
        schedule: Literal["linear", "vp", "ve"] = "linear",
        scaling: Literal["none", "vp"] = "none",
        use_float64: bool | None = None,
    ) -> None:
        choose(solver, ("heun", "euler"), "solver")
        choose(discretization, ("edm", "vp", "ve", "iddpm"), "discretization")
        choose(schedule, ("linear", "vp", "ve"), "schedule")
        choose(scaling, ("none", "vp"), "scaling")
        if rho <= 0 or s_churn < 0 or s_noise <= 0 or not 0 < alpha <= 1:
            given = f"rho={rho}, s_churn={s_churn}, s_noise={s_noise}, alpha={alpha}"
            raise ValueError(f"EDMHeunScheduler: rho and s_noise must be above 0, s_churn at least 0, alpha in (0, 1], got {given}.")
        self.timesteps = torch.zeros(0, dtype=torch.float64)
        self.times: list[float] = []
        self.num_inference_steps = 0
        self.index = 0
        self._pending: _Pending | None = None

    # ---- levels ----

    def range(self, model_range: tuple[float, float] = (0.0, math.inf)) -> tuple[float, float]:
        """Return (sigma_min, sigma_max): as configured, within those of a model.

        Raises:
            ValueError: if nothing is left.
        """
        name = self.config["discretization"]
        if name == "vp":
            ends = vp_sigma(torch.tensor([EPSILON_S, 1.0], dtype=torch.float64)).tolist()
            low, high = ends[0], ends[1]
        else:
            low, high = RANGES[name]
        low = low if self.config["sigma_min"] is None else self.config["sigma_min"]
        high = high if self.config["sigma_max"] is None else self.config["sigma_max"]
        low, high = max(low, model_range[0]), min(high, model_range[1])
        if not 0 < low < high:
            raise ValueError(f"EDMHeunScheduler: noise levels must satisfy 0 < sigma_min < sigma_max, got {low} and {high}.")
        return low, high

    def _levels(self, n: int, low: float, high: float) -> Tensor:
        """Return n falling noise levels, float64."""
        if n == 1:
            return torch.tensor([high], dtype=torch.float64)
        k, name, rho = torch.arange(n, dtype=torch.float64), self.config["discretization"], self.config["rho"]
        if name == "vp":
            return vp_sigma(1 + k / (n - 1) * (EPSILON_S - 1), *self._betas)
        if name == "ve":
            return (high**2 * (low**2 / high**2) ** (k / (n - 1))).sqrt()
        if name == "iddpm":
            table = cosine_table().double()
            table = table[(table >= low) & (table <= high)]
            return table[((len(table) - 1) / (n - 1) * k).round().long()]
        return (high ** (1 / rho) + k / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, *, preconditioner: Any | None = None
    ) -> None:
        """Choose the number of steps.

        Args:
            num_inference_steps: N.
            device: of `timesteps`.
            preconditioner: of the model, whose range and levels are kept to; None for one that knows all.

        Raises:
            ValueError: for fewer than one step.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}.")
        bounds = (0.0, math.inf) if preconditioner is None else (preconditioner.sigma_min, preconditioner.sigma_max)
        self._round: Rounding = (lambda sigma: sigma) if preconditioner is None else preconditioner.round_sigma
        low, high = self.range(bounds)
        span, top = math.log(low**2 + 1) / EPSILON_S, math.log(high**2 + 1)
        beta_d = 2 * (span - top) / (EPSILON_S - 1)
        self._betas = (beta_d, top - 0.5 * beta_d)
        self.num_inference_steps = num_inference_steps
        self.times = [*(self._time(float(sigma)) for sigma in self._round(self._levels(num_inference_steps, low, high))), 0.0]
        calls = []
        for i in range(num_inference_steps):
            t_hat = self._churned(i)[0]
            calls.append(self._sigma(t_hat))
            if self._has_second(i):
                calls.append(self._sigma(self._second_time(i, t_hat)))
        dtype = torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
        self.timesteps = torch.tensor(calls, dtype=dtype, device=device)
        self.index, self._pending = 0, None

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the state before step 0.

        Raises:
            RuntimeError: before `set_timesteps`.
        """
        if not self.times:
            raise RuntimeError("EDMHeunScheduler: call set_timesteps first.")
        return self._sigma(self.times[0]) * self._scale(self.times[0])

    @property
    def is_between(self) -> bool:
        """Whether a step waits for its second network evaluation."""
        return self._pending is not None and self._pending.slope is not None

    def go_to(self, step: int) -> None:
        """Go on before a step, 0 .. N - 1, for loops that resume."""
        self.index, self._pending = step, None

    def __len__(self) -> int:
        return len(self.timesteps)

    # ---- sigma(t), s(t) ----

    def _sigma(self, t: float) -> float:
        name = self.config["schedule"]
        if name == "linear":
            return t
        return math.sqrt(t) if name == "ve" else float(vp_sigma(torch.tensor(t, dtype=torch.float64), *self._betas))

    def _time(self, sigma: float) -> float:
        name = self.config["schedule"]
        if name == "linear":
            return sigma
        return sigma**2 if name == "ve" else float(vp_time(torch.tensor(sigma, dtype=torch.float64), *self._betas))

    def _sigma_slope(self, t: float) -> float:
        name = self.config["schedule"]
        if name == "linear":
            return 1.0
        if name == "ve":
            return 0.5 / math.sqrt(t)
        sigma = self._sigma(t)
        return 0.5 * (self._betas[1] + self._betas[0] * t) * (sigma + 1 / sigma)

    def _scale(self, t: float) -> float:
        return 1.0 if self.config["scaling"] == "none" else 1 / math.sqrt(1 + self._sigma(t) ** 2)

    def _scale_slope(self, t: float) -> float:
        return 0.0 if self.config["scaling"] == "none" else -self._sigma(t) * self._sigma_slope(t) * self._scale(t) ** 3

    def _slope(self, x: Tensor, t: float, denoised: Tensor) -> Tensor:
        """Return dx/dt."""
        if self.config["schedule"] == "linear" and self.config["scaling"] == "none":
            return (x - denoised) / t
        sigma, scale = self._sigma(t), self._scale(t)
        growth = self._sigma_slope(t) / sigma
        return (growth + self._scale_slope(t) / scale) * x - growth * scale * denoised

    # ---- one evaluation ----

    def _churned(self, step: int) -> tuple[float, float]:
        """Return the time after churn and the standard deviation of the noise that leads there, for s(t) = 1."""
        t, config = self.times[step], self.config
        sigma, s_max = self._sigma(t), math.inf if config["s_max"] is None else config["s_max"]
        gamma = min(config["s_churn"] / self.num_inference_steps, math.sqrt(2) - 1) if config["s_min"] <= sigma <= s_max else 0.0
        if gamma == 0:
            return t, 0.0
        t_hat = self._time(float(self._round(torch.tensor(sigma + gamma * sigma, dtype=torch.float64))))
        return t_hat, math.sqrt(max(self._sigma(t_hat) ** 2 - sigma**2, 0.0))

    def _has_second(self, step: int) -> bool:
        return self.config["solver"] == "heun" and step + 1 < self.num_inference_steps

    def _second_time(self, step: int, t_hat: float) -> float:
        alpha, after = self.config["alpha"], self.times[step + 1]
        return after if alpha == 1 else t_hat + alpha * (after - t_hat)

    def scale_model_input(
        self, sample: Tensor, timestep: Tensor | float | None = None, *, generator: Any = None, noise: Tensor | None = None
    ) -> Tensor:
        """Return what the model is evaluated on, adding the churn's noise before the first evaluation of a step.

        Args:
            sample: the state.
            timestep: ignored; the scheduler counts evaluations.
            generator: of the noise.
            noise: the noise itself, standard normal of the state's shape.

        Raises:
            RuntimeError: before `set_timesteps`, or after the last step.
        """
        if self.index >= self.num_inference_steps:
            what = "call set_timesteps first" if not self.num_inference_steps else "all steps are done: call set_timesteps again"
            raise RuntimeError(f"EDMHeunScheduler: {what}.")
        x = self._in_state_type(sample)
        if self._pending is not None and self._pending.slope is not None:
            scale = self._scale(self._second_time(self.index, self._pending.t_hat))
            return x if scale == 1 else x / scale
        t = self.times[self.index]
        t_hat, spread = self._churned(self.index)
        ratio = self._scale(t_hat) / self._scale(t)
        x_hat = x if ratio == 1 else x * ratio
        if self.config["s_churn"] > 0:  # drawn at every step, so that streams of random numbers line up with the reference
            drawn = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype) if noise is None else noise.to(x)
            if spread:
                x_hat = x_hat + spread * self._scale(t_hat) * self.config["s_noise"] * drawn
        self._pending = _Pending(x_hat, t_hat)
        scale = self._scale(t_hat)
        return x_hat if scale == 1 else x_hat / scale

    def step(
        self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> EDMHeunSchedulerOutput | tuple[Tensor]:
        """Use one network evaluation.

        Args:
            model_output: D, the denoised pictures.
            timestep: ignored; the scheduler counts evaluations.
            sample: the state that `scale_model_input` was given.
            generator: not used here: noise is added before the evaluation.
            return_dict: False returns a tuple.

        Raises:
            RuntimeError: without `scale_model_input` before it.
        """
        pending = self._pending
        if pending is None:
            raise RuntimeError("EDMHeunScheduler: call scale_model_input before the model; it adds the noise of the step.")
        denoised = model_output.to(pending.x_hat.dtype)
        x_hat, t_hat, alpha = pending.x_hat, pending.t_hat, self.config["alpha"]
        h = self.times[self.index + 1] - t_hat
        if pending.slope is None:
            slope = self._slope(x_hat, t_hat, denoised)
            if self._has_second(self.index):
                previous = x_hat + alpha * h * slope
                self._pending = _Pending(x_hat, t_hat, slope)
            else:
                previous = x_hat + h * slope
                self.index, self._pending = self.index + 1, None
        else:
            second = self._slope(self._in_state_type(sample), self._second_time(self.index, t_hat), denoised)
            previous = x_hat + h * ((1 - 1 / (2 * alpha)) * pending.slope + 1 / (2 * alpha) * second)
            self.index, self._pending = self.index + 1, None
        return EDMHeunSchedulerOutput(prev_sample=previous, pred_original_sample=denoised) if return_dict else (previous,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return clean pictures with noise of levels [b]."""
        return original_samples + timesteps.view(-1, *[1] * (noise.ndim - 1)).to(noise) * noise

    def _in_state_type(self, sample: Tensor) -> Tensor:
        wanted = self.config["use_float64"]
        return sample.to(torch.float64 if (sample.device.type != "mps" if wanted is None else wanted) else torch.float32)
