"""Progressive flow distillation: what the losses vanish for, where phases end, who receives gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genkit.distill.adversarial import hinge_discriminator_loss, hinge_generator_loss
from genkit.distill.progressive_flow import (
    consistency_flow_loss,
    guidance_loss,
    guided_velocity,
    jump,
    phase_ends,
    phase_starts,
    pseudo_huber,
)
from genkit.schedulers.flow_matching import FlowMatchingScheduler, interpolate

TABLE = FlowMatchingScheduler(steps="consistency", phases=100).table


def test_guidance() -> None:
    with_, without = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    guided = guided_velocity(with_, without, torch.tensor([1.0, 0.0, 3.0]))
    torch.testing.assert_close(guided[:2], torch.stack([with_[0], without[1]]))
    assert guidance_loss(guided, guided).tolist() == [0, 0, 0]
    assert guidance_loss(guided + 2, guided).tolist() == pytest.approx([4, 4, 4])


@pytest.mark.parametrize("phases", [1, 5, 7, 100])
def test_phases_cover_all_times(phases: int) -> None:
    starts = phase_starts(TABLE, phases)
    ends = phase_ends(TABLE, TABLE, phases)
    assert len(starts) == phases and starts[0] == 0 and (ends > TABLE).all() and ends[-1] == 1
    inner = (TABLE[:-1, None] < starts[None, 1:]) & (starts[None, 1:] < ends[:-1, None])
    assert not inner.any()  # no phase starts between a time and its end
    if phases == 100:
        torch.testing.assert_close(ends[:-1], TABLE[1:])


def test_a_straight_field_costs_nothing() -> None:
    data, noise, index = torch.randn(6, 5, 2), torch.randn(6, 5, 2), torch.tensor([0, 19, 20, 50, 98, 99])
    times = torch.cat([TABLE, torch.ones(1)])
    now, following = times[index], times[index + 1]
    x = interpolate(data, noise, now)
    exact = lambda x, t: data - noise  # noqa: E731
    for phases in (1, 5):
        loss = consistency_flow_loss(exact, exact, x, jump(x, now, following, exact), now, following, phase_ends(TABLE, now, phases))
        assert loss.abs().max() < 1e-6
    wrong = lambda x, t: data - noise + 1  # noqa: E731
    loss = consistency_flow_loss(wrong, exact, x, jump(x, now, following, exact), now, following, torch.ones(6), c=0.0)
    torch.testing.assert_close(loss, 1 - now, atol=1e-5, rtol=1e-4)


def test_only_the_student_learns() -> None:
    student, target = nn.Linear(2, 2), nn.Linear(2, 2)
    now, following = TABLE[[3, 19]], TABLE[[4, 20]]
    x, point, end = torch.randn(2, 5, 2), torch.randn(2, 5, 2), phase_ends(TABLE, now, 5)
    loss = consistency_flow_loss(lambda x, t: student(x), lambda x, t: target(x), x, point, now, following, end)
    loss.sum().backward()
    assert student.weight.grad is not None and student.weight.grad.any()
    assert target.weight.grad is None


def test_at_the_end_of_a_phase_the_point_itself_is_the_target() -> None:
    now, following = TABLE[[19]], TABLE[[20]]
    end = phase_ends(TABLE, now, 5)
    assert torch.equal(end, following)
    point = torch.randn(1, 5, 2)
    still = lambda x, t: torch.zeros_like(x)  # noqa: E731
    nonsense = lambda x, t: torch.full_like(x, torch.nan)  # noqa: E731
    assert consistency_flow_loss(still, nonsense, point, point, now, following, end).item() == 0


def test_distances() -> None:
    r = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    assert pseudo_huber(r, 0.0).tolist() == [3.5, 0]
    small = 1e-5 * torch.ones(1, 4)
    assert pseudo_huber(small, 1e-3).item() == pytest.approx(1e-10 / 2e-3, rel=1e-2)  # quadratic near 0
    with pytest.raises(ValueError, match=r"phases must lie in 1 \.\. 100, the number of times, got 101"):
        phase_starts(TABLE, 101)


def test_hinge() -> None:
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 0.5])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 + 0.75)
    assert hinge_generator_loss(fake).item() == pytest.approx(1.25)
