"""Flow-matching schedulers: where the times lie, and that straight flows arrive."""

from __future__ import annotations

import math

import pytest
import torch

from genkit.schedulers.flow_matching import FlowMatchingScheduler, interpolate, logit_normal_times

SETTINGS = [
    {}, {"shift": 3.0}, {"use_dynamic_shifting": True}, {"steps": "consistency", "phases": 100}, {"steps": "consistency"},
]  # fmt: skip


@pytest.mark.parametrize("config", SETTINGS)
@pytest.mark.parametrize("count", [1, 2, 7, 50])
def test_a_straight_flow_arrives(config: dict[str, object], count: int) -> None:
    scheduler = FlowMatchingScheduler(**config)
    scheduler.set_timesteps(count, mu=0.8)
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 5, 3, generator=generator), torch.randn(2, 5, 3, generator=generator)
    x = noise
    assert scheduler.sigmas[0] == 0 and scheduler.sigmas[-1] == 1 and (scheduler.sigmas.diff() >= 0).all()
    for i in range(count):
        step = scheduler.step(data - noise, i, x)
        x = step.prev_sample
        torch.testing.assert_close(step.pred_original_sample, data, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x, data, atol=1e-5, rtol=1e-5)


def test_only_the_uniform_grid_has_an_empty_step() -> None:
    uniform, consistency = FlowMatchingScheduler(), FlowMatchingScheduler(steps="consistency")
    for scheduler in (uniform, consistency):
        scheduler.set_timesteps(5)
    assert [uniform.interval(i) for i in range(5)] == [0.25, 0.25, 0.25, 0.25, 0]
    assert all(consistency.interval(i) > 0 for i in range(5))


def test_shifts() -> None:
    scheduler = FlowMatchingScheduler(shift=3.0)
    scheduler.set_timesteps(3)
    assert scheduler.sigmas.tolist() == pytest.approx([0, 0.75, 1, 1])
    scheduler = FlowMatchingScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(3, mu=math.log(3))
    assert scheduler.sigmas.tolist() == pytest.approx([0, 0.75, 1, 1])
    assert FlowMatchingScheduler.from_config(scheduler.config).config["use_dynamic_shifting"]


def test_steps_keep_the_samples_type() -> None:
    scheduler = FlowMatchingScheduler()
    scheduler.set_timesteps(3)
    assert (
        scheduler.step(torch.ones(1, 2, dtype=torch.bfloat16), 0, torch.zeros(1, 2, dtype=torch.bfloat16)).prev_sample.dtype
        == torch.bfloat16
    )


def test_paths_and_times() -> None:
    data, noise = torch.full((3, 2), 2.0), torch.zeros(3, 2)
    assert interpolate(data, noise, torch.tensor([0.0, 0.5, 1.0]))[:, 0].tolist() == [0, 1, 2]
    z = torch.linspace(-3, 3, 9, dtype=torch.float64)
    assert torch.equal(logit_normal_times(z), torch.sigmoid(z))
    shifted = logit_normal_times(z, shift_scale=9.0)
    torch.testing.assert_close(shifted / (1 - shifted), 3 * torch.exp(z))  # the odds are multiplied by sqrt(shift_scale)


def test_errors() -> None:
    with pytest.raises(ValueError, match="Known: uniform, consistency|uniform"):
        FlowMatchingScheduler(steps="uniforn")
    with pytest.raises(ValueError, match="phases must divide num_train_timesteps=1000, got 7"):
        FlowMatchingScheduler(steps="consistency", phases=7)
    with pytest.raises(ValueError, match="shift must be above 0, got -1"):
        FlowMatchingScheduler(shift=-1)
    scheduler = FlowMatchingScheduler(steps="consistency", phases=10)
    with pytest.raises(ValueError, match="at most 10 steps"):
        scheduler.set_timesteps(11)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        scheduler.set_timesteps(0)
    with pytest.raises(ValueError, match="needs mu"):
        FlowMatchingScheduler(use_dynamic_shifting=True).set_timesteps(3)
    scheduler.set_timesteps(2)
    with pytest.raises(IndexError, match="step 2 is not one of 2"):
        scheduler.step(torch.zeros(1), 2, torch.zeros(1))
