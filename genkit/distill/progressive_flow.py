"""Progressive flow distillation: a guided flow into few steps, in three stages that share these losses.

1. guidance distillation: the student takes the guidance scale as input and learns the guided velocity
2. consistency flow distillation: from neighbouring times of one trajectory the student jumps to the same end of its phase; first several
   phases, then one; the target network is an average of the student
3. the same with an adversarial term on features of the frozen first stage

Velocities lead from noise (time 0) to data (time 1). Source: Lai et al. 2025 (FlashVDM, arXiv 2503.16302), section 3.3; constants that the
paper does not give are ours.

Letters: b samples, p phases, s table of times with 1 behind it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genkit.distill.denoising import per_sample

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x [b, ...], time [b]) -> velocity; condition and guidance scale bound."""

HUBER = 1e-3


def guided_velocity(with_condition: Tensor, without: Tensor, scale: Tensor) -> Tensor:
    """Return without + scale (with - without) for velocities [b, ...] and scales [b]."""
    return without + per_sample(scale, without) * (with_condition - without)


def guidance_loss(student: Tensor, guided: Tensor) -> Tensor:
    """Return the squared error of every sample [b], mean over its elements, fp32; the guided velocity is a constant."""
    return (student.float() - guided.detach().float()).square().flatten(1).mean(1)


def phase_starts(table: Tensor, phases: int) -> Tensor:
    """Return the times at which phases start, [p].

    Args:
        table: s, ascending from 0, without the 1 behind it.
        phases: p.

    Raises:
        ValueError: for more phases than times.
    """
    if not 1 <= phases <= len(table):
        raise ValueError(f"phases must lie in 1 .. {len(table)}, the number of times, got {phases}.")
    return table[torch.linspace(0, len(table), phases + 1, dtype=torch.float64)[:-1].floor().long()]


def phase_ends(table: Tensor, times: Tensor, phases: int) -> Tensor:
    """Return the end of the phase that each time [b] lies in: the next start above it, or 1."""
    starts = torch.cat([phase_starts(table, phases), table.new_ones(1)])
    return starts[torch.searchsorted(starts, times, right=True).clamp(max=phases)]


def jump(x: Tensor, time: Tensor, end: Tensor, velocity: Velocity) -> Tensor:
    """Return x + (end - time) v(x, time): one straight step from times [b] to others."""
    return x + per_sample(end - time, x) * velocity(x, time)


def pseudo_huber(difference: Tensor, c: float = HUBER) -> Tensor:
    """Return sqrt(r^2 + c^2) - c of every element, mean of each sample [b], fp32."""
    return ((difference.float().square() + c**2).sqrt() - c).flatten(1).mean(1)


def consistency_flow_loss(
    student: Velocity, target: Velocity, x: Tensor, following: Tensor, time: Tensor, next_time: Tensor, end: Tensor, c: float = HUBER
) -> Tensor:
    """Return the loss of every sample [b]: the student's jump from x against the target's from the following point.

    Args:
        student: in training.
        target: an average of it; without gradient.
        x: [b, ...] at `time`.
        following: [b, ...] at `next_time`, a step of the solver further.
        time, next_time, end: [b]; where `next_time` is the end, the following point itself is the target.
        c: width of the pseudo-Huber distance.
    """
    with torch.no_grad():
        arrived = per_sample(next_time == end, x)
        wanted = torch.where(arrived, following, jump(following, next_time, end, target))
    return pseudo_huber(jump(x, time, end, student) - wanted, c)
