"""MeanFlow: a network u(x_t, r, t) learns the average velocity between two times, and so makes a picture in one step.

x_t = (1 - t) x + t e, v = e - x; the average velocity obeys u = v - (t - r) du/dt, whose right side, without gradient, is the target:
target = sg(v - w (t - r) du/dt), du/dt = the derivative of u along (v, 0, 1), in forward mode.

Source: Geng et al. 2025 (arXiv 2505.13447), algorithm 1; the weight on the raw tangent is the form of NVIDIA's FastGen.
Letters: b batch, t later (noisier) and r earlier time in [0, 1], 1 is noise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genkit.distill.denoising import per_sample

MeanVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t [b, ...], r [b], t [b]) -> average velocity [b, ...]"""


def velocity_and_derivative(network: MeanVelocity, x_t: Tensor, r: Tensor, t: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
    """Return u(x_t, r, t) and its derivative along the trajectory, tangent (v, 0, 1), in forward mode.

    Args:
        network: the student.
        x_t: [b, ...].
        r, t: [b].
        velocity: [b, ...] v.
    """
    found = torch.func.jvp(network, (x_t, r, t), (velocity, torch.zeros_like(r), torch.ones_like(t)))
    return found[0], found[1]


def mean_flow_loss(
    u: Tensor,
    derivative: Tensor,
    velocity: Tensor,
    r: Tensor,
    t: Tensor,
    *,
    power: float = 1.0,
    c: float = 1e-3,
    warmup: float = 1.0,
    on_tangent: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the loss [b] and its adaptive weight [b] of every sample, float64.

    Args:
        u: [b, ...] prediction.
        derivative: [b, ...] du/dt, constant.
        velocity: [b, ...] v.
        r, t: [b].
        power, c: weight (e + c)^-power of the squared error e, without gradient.
        warmup: factor of the derivative, rising from 0 to 1.
        on_tangent: weigh g = target - u, divided by the root of the number of elements, by (|g| + c)^-1 power, and regress on u + weight g.
    """
    u, v = u.double(), velocity.double()
    gap = per_sample(t.double() - r.double(), u)
    target = (v - warmup * gap * derivative.double()).detach()
    if not on_tangent:
        error = (u - target).square().flatten(1).sum(1)
        weight = (error.detach() + c) ** -power
        return weight * error, weight
    tangent = (target - u).detach() / u[0].numel() ** 0.5
    weight = (tangent.flatten(1).norm(dim=1) + c) ** -power
    wanted = (u + per_sample(weight, u) * tangent).detach()
    return (u - wanted).square().flatten(1).sum(1), weight
