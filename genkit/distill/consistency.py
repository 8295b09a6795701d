"""Consistency distillation and training: neighbouring points of one trajectory denoise to the same picture.

loss = weight(t, r) distance(D(x_t, t), sg D(x_r, r)), r < t; x_r is one Euler step of the teacher's flow from x_t (distillation), or has
the same noise as x_t (training, without a teacher).

Sources: Song et al. 2023 (arXiv 2303.01469), Song and Dhariwal 2023 (arXiv 2310.14189), Geng et al. 2024 (ECT, arXiv 2406.14548).
Letters: b batch, t later (noisier) and r earlier level in data units.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genkit.checks import choose
from genkit.distill.denoising import Denoiser, per_sample

WEIGHTINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "default": lambda t, r: 1 / (t - r),
    "c_out": lambda t, r: (t**2 + 0.25).sqrt() / (0.5 * t),  # 1 / c_out of EDM's preconditioner
    "sigma_sq": lambda t, r: 1 / t**2,
    "sqrt": lambda t, r: 1 / (t - r).sqrt(),
}


def stage_ratio(seen: int, stage_length: int, q: float = 2.0, most: float = 0.999) -> float:
    """Return how near r comes to t after some samples: 1 - q^-(stage + 1), capped; ECT's curriculum.

    Args:
        seen: samples trained on.
        stage_length: samples of a stage.
        q: base.
        most: cap.
    """
    return min(1 - q ** -(seen // stage_length + 1), most)


def earlier_level(t: Tensor, ratio: float, sigma_min: float = 0.002) -> Tensor:
    """Return r = t - t (1 - ratio) (1 + 8 sigmoid(-t)), not below sigma_min, in float64."""
    t = t.double()
    return (t - t * (1 - ratio) * (1 + 8 * torch.sigmoid(-t))).clamp_min(sigma_min)


def euler_step(x_t: Tensor, t: Tensor, r: Tensor, teacher: Denoiser) -> Tensor:
    """Follow the teacher's flow dx/dt = (x - D(x, t)) / t from level t to r in one step, without a graph."""
    with torch.no_grad():
        slope = (x_t.double() - teacher(x_t, t.float()).double()) / per_sample(t.double(), x_t)
        return (x_t.double() + per_sample(r.double() - t.double(), x_t) * slope).to(x_t.dtype)


def distance(difference: Tensor, huber_c: float | None = None, squared: bool = False) -> Tensor:
    """Return sqrt(n^2 + c^2) - c of every sample [b], n the norm of the difference; n for c = 0, n^2 if squared. float64.

    Args:
        difference: [b, ...].
        huber_c: c; None takes 0.00054 times the square root of the number of elements.
        squared: n^2 instead.
    """
    square = difference.double().flatten(1).square().sum(1)
    if squared:
        return square
    c = 0.00054 * difference[0].numel() ** 0.5 if huber_c is None else huber_c
    return (square + c**2).sqrt() - c


def consistency_loss(
    student: Denoiser,
    x_t: Tensor,
    x_r: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    target: Denoiser | None = None,
    weighting: str = "default",
    huber_c: float | None = None,
    squared: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the distance [b] and the weighted loss [b] of every sample, float64.

    Args:
        student: trained network.
        x_t, x_r: [b, ...] points of one trajectory.
        t, r: [b] their levels.
        target: network at r, without a graph; the student itself if None.
        weighting: key of `WEIGHTINGS`.
        huber_c, squared: see `distance`.

    Raises:
        ValueError: for an unknown weighting.
    """
    weight = WEIGHTINGS[choose(weighting, WEIGHTINGS, "weighting")](t.double(), r.double())
    predicted = student(x_t, t.float())
    with torch.no_grad():
        wanted = (target or student)(x_r, r.float())
    found = distance(predicted - wanted, huber_c, squared)
    return found, weight * found
