"""Signs that a student collapses, and a clear stop.

A student that collapses makes ever more equal pictures, or pictures that its teacher denoises to something else entirely; its loss shows
neither (SiD's is even negative at times). So two figures are watched against their own first values: the standard deviation of a pixel
over the batch, and mean |x_0 - D_q|, how far the teacher moves the student's pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class CollapseError(RuntimeError):
    """A student collapsed; the message gives the figures and what to change."""


@dataclass
class AlarmConfig:
    """When to stop.

    Args:
        settle: steps whose mean is the reference.
        least_std: stop below this share of the reference's standard deviation.
        most_distance: stop above this multiple of the reference's distance.
        patience: consecutive steps of it.
    """

    settle: int = 50
    least_std: float = 0.25
    most_distance: float = 4.0
    patience: int = 100

    def __post_init__(self) -> None:
        if self.settle < 1 or self.patience < 1 or not 0 <= self.least_std < 1 or self.most_distance <= 1:
            raise ValueError(f"alarms: settle, patience >= 1, 0 <= least_std < 1, most_distance > 1, got {self}.")


class CollapseAlarm(nn.Module):
    """Watches one student; its counts are buffers, so that they are part of a checkpoint.

    Args:
        config: thresholds.
    """

    def __init__(self, config: AlarmConfig) -> None:
        super().__init__()
        self.config = config
        for name in ("count", "std", "distance", "streak"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def watch(self, step: int, std: Tensor, distance: Tensor) -> None:
        """Note the figures of a step.

        Args:
            step: finished steps.
            std: 0-d, standard deviation of a pixel over the batch, mean over pixels; nan for a batch of one, which is not watched.
            distance: 0-d, mean |x_0 - D_q|.

        Raises:
            CollapseError: after `patience` steps beyond a threshold, or at a figure that is not finite.
        """
        s, d = float(std), float(distance)
        if not math.isfinite(d):
            raise CollapseError(
                f"Distillation stopped at step {step}: the teacher's answer to the student's pictures is not finite "
                f"(mean |x_0 - D_q| = {d}). Lower the student's learning rate or check the teacher."
            )
        count, streak = (self.get_buffer(name) for name in ("count", "streak"))
        if count < self.config.settle:
            for name, value in (("std", s), ("distance", d)):
                buffer = self.get_buffer(name)
                buffer += (value - buffer) / (count + 1)
            count += 1
            return
        first_std, first_distance = (float(self.get_buffer(name)) for name in ("std", "distance"))
        is_flat = math.isfinite(s) and s < self.config.least_std * first_std
        is_far = d > self.config.most_distance * first_distance
        streak.copy_(streak + 1 if is_flat or is_far else torch.zeros_like(streak))
        if streak >= self.config.patience:
            raise CollapseError(
                f"Distillation stopped at step {step}: the student collapsed. Over {int(streak)} steps its pictures vary by {s:.3g} (first "
                f"{first_std:.3g}), and the teacher moves them by {d:.3g} (first {first_distance:.3g}). Go back to an earlier checkpoint "
                "with a lower student learning rate, more critic updates or a later student_start (thresholds: task_config.alarms)."
            )
