"""The EDM sampler: Algorithm 2 to the last bit, its order, churn, and its place in diffusers' loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from genkit.schedulers.edm_heun import EDMHeunScheduler

STD = 0.5


def exact(x: Tensor, sigma: float) -> Tensor:
    """Denoise Gaussian data of standard deviation STD."""
    return x * STD**2 / (STD**2 + sigma**2)


def sample(scheduler: EDMHeunScheduler, latents: Tensor, steps: int) -> tuple[Tensor, int]:
    """Run a loop as diffusers' pipelines do; return the end and the number of evaluations."""
    scheduler.set_timesteps(steps)
    x, generator = latents.double() * scheduler.init_noise_sigma, torch.Generator().manual_seed(1)
    for sigma in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, sigma, generator=generator)
        x = scheduler.step(exact(scaled, float(sigma)), sigma, x, return_dict=False)[0]
    return x, len(scheduler.timesteps)


def reference(latents: Tensor, n: int, churn: float, s_min: float, s_max: float, s_noise: float) -> Tensor:
    """Write Algorithm 2 out, in float64."""
    i = torch.arange(n, dtype=torch.float64)
    t = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    t, x, generator = torch.cat([t, torch.zeros(1, dtype=torch.float64)]), latents.double() * t[0], torch.Generator().manual_seed(1)
    for k in range(n):
        gamma = min(churn / n, np.sqrt(2) - 1) if s_min <= t[k] <= s_max else 0
        t_hat = t[k] + gamma * t[k]
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64) if churn else torch.zeros_like(x)
        x_hat = x + (t_hat**2 - t[k] ** 2).sqrt() * s_noise * noise
        d = (x_hat - exact(x_hat, float(t_hat))) / t_hat
        x = x_hat + (t[k + 1] - t_hat) * d
        if k < n - 1:
            second = (x - exact(x, float(t[k + 1]))) / t[k + 1]
            x = x_hat + (t[k + 1] - t_hat) * (0.5 * d + 0.5 * second)
    return x


@pytest.mark.parametrize("churn", [0.0, 3.0])
def test_the_loop_is_algorithm_2_to_the_last_bit(churn: float) -> None:
    latents = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler = EDMHeunScheduler(s_churn=churn, s_min=0.05, s_max=50, s_noise=1.003)
    found, calls = sample(scheduler, latents, 9)
    assert calls == 17
    assert torch.equal(found, reference(latents, 9, churn, 0.05, 50, 1.003))


def test_error_falls_with_the_square_of_the_steps() -> None:
    latents = torch.ones(1, 1, 1, 1)
    true = 80 * STD / math.sqrt(80**2 + STD**2)
    errors = [abs(float(sample(EDMHeunScheduler(), latents, n)[0]) - true) for n in (20, 40, 80)]
    assert 3 < errors[0] / errors[1] < 5.5 and 3 < errors[1] / errors[2] < 5.5
    euler = [abs(float(sample(EDMHeunScheduler(solver="euler"), latents, n)[0]) - true) for n in (40, 80)]
    assert 1.7 < euler[0] / euler[1] < 2.4 and euler[1] > errors[2]


@pytest.mark.parametrize("schedule", ["linear", "vp", "ve"])
@pytest.mark.parametrize("scaling", ["none", "vp"])
def test_every_schedule_and_scaling_ends_at_the_same_picture(schedule: str, scaling: str) -> None:
    latents = torch.full((1, 1, 1, 1), 0.7)
    scheduler = EDMHeunScheduler(schedule=schedule, scaling=scaling)
    assert_close(float(sample(scheduler, latents, 200)[0]), 0.7 * STD, rtol=5e-3, atol=0)


@pytest.mark.parametrize("discretization", ["edm", "vp", "ve", "iddpm"])
def test_levels_fall_from_end_to_end(discretization: str) -> None:
    scheduler = EDMHeunScheduler(discretization=discretization, solver="euler")
    scheduler.set_timesteps(12)
    levels = scheduler.timesteps.tolist()
    low, high = scheduler.range()
    assert levels == sorted(levels, reverse=True) and levels[0] <= high * 1.001 and levels[-1] >= low * 0.99


def test_ranges_of_a_model_are_kept_to() -> None:
    scheduler = EDMHeunScheduler()
    assert scheduler.range((0.02, 10.0)) == (0.02, 10.0)
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max, got 100"):
        EDMHeunScheduler(sigma_min=100.0).range()


def test_one_step_and_resuming() -> None:
    latents = torch.randn(1, 1, 2, 2)
    assert_close(sample(EDMHeunScheduler(), latents, 1)[0], exact(latents.double() * 80, 80.0), rtol=1e-9, atol=1e-9)
    scheduler = EDMHeunScheduler()
    whole = sample(scheduler, latents, 5)[0]
    scheduler.set_timesteps(5)
    x, saved = latents.double() * 80, torch.empty(0)
    for i, sigma in enumerate(scheduler.timesteps):
        if i == 4:
            saved = x.clone()
        x = scheduler.step(exact(scheduler.scale_model_input(x, sigma), float(sigma)), sigma, x, return_dict=False)[0]
    scheduler.go_to(2)
    for sigma in scheduler.timesteps[4:]:
        denoised = exact(scheduler.scale_model_input(saved, sigma), float(sigma))
        saved = scheduler.step(denoised, sigma, saved, return_dict=False)[0]
    assert torch.equal(saved, whole) and torch.equal(x, whole)


def test_save_load(tmp_path: Path) -> None:
    scheduler = EDMHeunScheduler(s_churn=4, rho=5.0)
    scheduler.save_pretrained(tmp_path)
    again = EDMHeunScheduler.from_pretrained(tmp_path)
    assert again.config["s_churn"] == 4 and again.config["rho"] == 5.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "rk4"}, "unknown solver"),
        ({"rho": 0}, "rho and s_noise"),
        ({"alpha": 0}, "alpha in"),
        ({"schedule": "cosine"}, "schedule"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EDMHeunScheduler(**options)


def test_wrong_order_of_calls_is_told() -> None:
    scheduler = EDMHeunScheduler()
    with pytest.raises(RuntimeError, match="call set_timesteps first"):
        scheduler.scale_model_input(torch.zeros(1))
    scheduler.set_timesteps(1)
    with pytest.raises(RuntimeError, match="call scale_model_input"):
        scheduler.step(torch.zeros(1), 80.0, torch.zeros(1))
    sample(scheduler, torch.zeros(1), 1)
    with pytest.raises(RuntimeError, match="all steps are done"):
        scheduler.scale_model_input(torch.zeros(1))
    with pytest.raises(ValueError, match="at least 1"):
        scheduler.set_timesteps(0)
