"""Flow-matching schedulers of shape generators: time runs from 0 (noise) to 1 (data), x_t = t data + (1 - t) noise.

- `steps="uniform"`: Euler over a shifted uniform grid. As published its last interval is empty (the grid ends at 1 already), so N calls
  do what N - 1 do; `interval` says where a call can be left out.
- `steps="consistency"`: the few times of a model distilled in phases (Hunyuan3D-2 turbo, FlashVDM); every call counts.

Sources: Esser et al. 2024 (arXiv 2403.03206) for shifts, Wang et al. 2024 (phased consistency models, arXiv 2405.18407), Lai et al. 2025
(FlashVDM, arXiv 2503.16302). diffusers' schedulers run the same flows from 1 to 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from genkit.checks import choose

GRIDS = ("uniform", "consistency")


@dataclass
class FlowStepOutput(BaseOutput):
    """One step.

    Attributes:
        prev_sample: at the next time.
        pred_original_sample: where the velocity leads at time 1.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class FlowMatchingScheduler(SchedulerMixin, ConfigMixin):
    """Euler steps along a velocity towards the data.

    Args:
        num_train_timesteps: T; timesteps are T times the time.
        shift: s of t' = s t / (1 + (s - 1) t); 1 = none.
        use_dynamic_shifting: shift by mu of `set_timesteps` instead.
        steps: one of `GRIDS`.
        phases: entries of the consistency grid.

    Raises:
        ValueError: for an unknown grid, or phases that do not divide T.

    Example:
        >>> scheduler = FlowMatchingScheduler(steps="consistency", phases=100)
        >>> scheduler.set_timesteps(4)
        >>> [round(float(t), 4) for t in scheduler.sigmas]
        [0.0, 0.2492, 0.4995, 0.7497, 1.0]
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        steps: Literal["uniform", "consistency"] = "uniform",
        phases: int = 50,
    ) -> None:
        choose(steps, GRIDS, "grid of times")
        if steps == "consistency" and (phases < 1 or num_train_timesteps % phases):
            raise ValueError(f"FlowMatchingScheduler: phases must divide num_train_timesteps={num_train_timesteps}, got {phases}.")
        if not shift > 0:
            raise ValueError(f"FlowMatchingScheduler: shift must be above 0, got {shift}.")
        self.table = self._consistency_table() if steps == "consistency" else self._uniform_table()
        self.sigmas, self.timesteps = self.table, self.table * num_train_timesteps
        self.num_inference_steps: int | None = None

    def _uniform_table(self) -> Tensor:
        total = self.config["num_train_timesteps"]
        times = torch.linspace(1, total, total, dtype=torch.float64) / total
        return (times if self.config["use_dynamic_shifting"] else self._shifted(times)).float()

    def _consistency_table(self) -> Tensor:
        total, phases = self.config["num_train_timesteps"], self.config["phases"]
        index = torch.tensor([0] + [k * (total // phases) - 1 for k in range(1, phases)])
        return torch.linspace(0, 1, total, dtype=torch.float64)[index].float()

    def _shifted(self, times: Tensor) -> Tensor:
        s = self.config["shift"]
        return s * times / (1 + (s - 1) * times)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the times of a run.

        Args:
            num_inference_steps: N; a consistency grid has at most as many as phases.
            device: of the tables.
            sigmas: times before the shift, 0 to 1; N evenly spread ones if None, as the released pipeline passes them. Of a consistency
                grid only their number counts.
            mu: of a dynamic shift: t' = e^mu / (e^mu + 1 / t - 1).

        Raises:
            ValueError: for no number, too many steps, or a missing mu.
        """
        given = None if sigmas is None else torch.as_tensor(sigmas, dtype=torch.float64)
        count = num_inference_steps if given is None else len(given)
        if count is None or count < 1:
            raise ValueError(f"FlowMatchingScheduler: num_inference_steps must be at least 1, got {num_inference_steps}.")
        if self.config["steps"] == "consistency":
            phases = self.config["phases"]
            if count > phases:
                raise ValueError(f"FlowMatchingScheduler: at most {phases} steps (phases) with a consistency grid, got {count}.")
            times = self.table[torch.linspace(0, phases, count + 1, dtype=torch.float64)[:-1].floor().long()]
        else:
            times = torch.linspace(0, 1, count, dtype=torch.float64) if given is None else given
            times = self._at(times, mu).float()
        total = self.config["num_train_timesteps"]
        self.num_inference_steps = count
        self.timesteps = (times * total).to(device)
        self.sigmas = torch.cat([times, times.new_ones(1)]).to(device)

    def _at(self, times: Tensor, mu: float | None) -> Tensor:
        """Return shifted times."""
        if not self.config["use_dynamic_shifting"]:
            return self._shifted(times)
        if mu is None:
            raise ValueError("FlowMatchingScheduler: dynamic shifting needs mu in set_timesteps.")
        return math.exp(mu) / (math.exp(mu) + (1 / times - 1))

    def interval(self, index: int) -> float:
        """Return the length of a step; 0 where a call of the network changes nothing."""
        return float(self.sigmas[index + 1] - self.sigmas[index])

    def step(self, model_output: Tensor, index: int, sample: Tensor) -> FlowStepOutput:
        """Go one step along a velocity.

        Args:
            model_output: [b, ...] velocity towards the data.
            index: number of the step.
            sample: [b, ...].

        Raises:
            IndexError: for a step that `set_timesteps` did not make.
        """
        if not 0 <= index < len(self.sigmas) - 1:
            raise IndexError(f"FlowMatchingScheduler: step {index} is not one of {len(self.sigmas) - 1}; call set_timesteps first.")
        x, velocity, now = sample.float(), model_output.float(), self.sigmas[index]
        prev = x + (self.sigmas[index + 1] - now) * velocity
        return FlowStepOutput(prev_sample=prev.to(sample.dtype), pred_original_sample=(x + (1 - now) * velocity).to(sample.dtype))


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return x_t = t data + (1 - t) noise for data and noise [b, ...] and times [b]."""
    t = t.reshape(-1, *[1] * (data.ndim - 1)).to(data.dtype)
    return t * data + (1 - t) * noise


def logit_normal_times(normal: Tensor, mean: float = 0.0, std: float = 1.0, shift_scale: float = 1.0) -> Tensor:
    """Return times of standard normal draws: t = sigmoid(mean + std z), then a t / (1 + (a - 1) t) with a = sqrt(shift_scale)."""
    t, a = torch.sigmoid(mean + std * normal), math.sqrt(shift_scale)
    return a * t / (1 + (a - 1) * t)
