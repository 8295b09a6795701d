"""Laws of the losses: gradients, identities, limits, closed forms."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from genkit.distill import adversarial, consistency, levels, paths
from genkit.distill.denoising import Denoiser, denoising_loss, per_sample
from genkit.distill.matching import (
    DMD,
    SIM,
    DiffInstruct,
    MatchingRule,
    SiD,
    constant,
    hand_over,
    matching_gradient,
    matching_loss,
    normaliser,
)
from genkit.distill.mean_flow import mean_flow_loss, velocity_and_derivative
from tests.distill.toy import denoiser, gaussian_denoiser

RULES: dict[str, MatchingRule] = {
    "sim": SIM(), "sim_l2": SIM("l2", normalise=True), "sim_l1": SIM("l1"), "sim_score": SIM(c=0.1, space="score", sigma_power=2.0),
    "sid": SiD(), "diff_instruct": DiffInstruct(), "dmd": DMD(),
}  # fmt: skip


def bound(seed: int) -> tuple[nn.Module, Denoiser]:
    model = denoiser(seed=seed)
    labels = torch.tensor([0, 1, 1])
    return model, lambda x, sigma: model(x, sigma, labels).sample


def draws() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 3, 8, 8, generator=generator), torch.randn(3, 3, 8, 8, generator=generator), torch.tensor([0.3, 1.0, 4.0])


@pytest.mark.parametrize("name", sorted(RULES))
def test_sequential_gradient_is_the_naive_one(name: str) -> None:
    (critic, at_critic), (teacher, at_teacher) = bound(1), bound(2)
    x_0, noise, sigma = draws()
    with constant(critic, teacher):
        leaf = x_0.clone().requires_grad_()
        losses, _ = matching_loss(RULES[name], leaf, noise, sigma, at_critic, at_teacher)
        losses.sum().backward()
        found, gradient, watched = matching_gradient(RULES[name], x_0, noise, sigma, at_critic, at_teacher)
    assert_close(found, losses.detach(), rtol=1e-5, atol=1e-5)
    assert_close(gradient, cast(Tensor, leaf.grad), rtol=1e-4, atol=1e-5)
    assert float(watched["distance"]) > 0


def test_equal_networks_give_no_gradient_at_all() -> None:
    model, at_model = bound(1)
    x_0, noise, sigma = draws()
    with constant(model):
        for name in ("sim", "sim_l2", "sid", "diff_instruct", "dmd"):
            losses, gradient, _ = matching_gradient(RULES[name], x_0, noise, sigma, at_model, at_model)
            assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=0)
            assert_close(losses * (name.startswith("si")), torch.zeros(3), rtol=0, atol=0)


def test_squared_sim_is_sid_at_alpha_one() -> None:
    x_0, critic, teacher = (torch.randn(3, 3, 8, 8) for _ in range(3))
    sigma = torch.ones(3)
    assert_close(SIM("l2", normalise=True)(x_0, critic, teacher, sigma), SiD(1.0)(x_0, critic, teacher, sigma), rtol=1e-5, atol=1e-5)


def test_huber_goes_from_normalised_to_squared() -> None:
    x_0, critic, teacher = (torch.randn(3, 3, 8, 8) for _ in range(3))
    y, sigma = critic - teacher, torch.ones(3)
    wide = SIM(c=1e4)(x_0, critic, teacher, sigma) * 2e4
    assert_close(wide, SIM("l2")(x_0, critic, teacher, sigma), rtol=1e-4, atol=1e-3)
    narrow = SIM(c=1e-6)(x_0, critic, teacher, sigma)
    unit = y / per_sample(y.flatten(1).norm(dim=1), y)
    assert_close(narrow, -(unit * (critic - x_0)).flatten(1).sum(1), rtol=1e-4, atol=1e-4)


def test_stop_gradient_rules_push_along_the_difference() -> None:
    x_0, critic, teacher = (torch.randn(3, 3, 8, 8) for _ in range(3))
    sigma, direction = torch.ones(3), critic - teacher
    for rule, wanted in ((DiffInstruct(), direction), (DMD(), direction / per_sample(normaliser(x_0, teacher) + 1e-6, x_0))):
        leaf = x_0.clone().requires_grad_()
        rule(leaf, critic, teacher, sigma).sum().backward()
        assert_close(cast(Tensor, leaf.grad), wanted, rtol=1e-5, atol=1e-6)


def test_hand_over_keeps_value_and_gradient() -> None:
    x, gradient = torch.randn(4, 2, requires_grad=True), torch.randn(4, 2)
    loss = hand_over(x, gradient, torch.tensor(7.0))
    loss.backward()
    assert float(loss.detach()) == 7.0
    assert_close(x.grad, gradient, rtol=0, atol=0)


@pytest.mark.parametrize("rule", [SIM(c=0.05), SiD(1.0), DiffInstruct(), DMD()])
def test_a_gaussian_student_reaches_its_teacher(rule: MatchingRule) -> None:
    """G(z) = m + s z against N(1, 0.5^2), the critic exact for the student's present law: the fixed point is the teacher."""
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.tensor(-0.5, requires_grad=True), torch.tensor(0.2, requires_grad=True)
    optimizer = torch.optim.Adam([mean, std], lr=0.02)
    teacher = cast(Denoiser, gaussian_denoiser(1.0, 0.5))
    law = levels.LogNormalLevels(-1.0, 1.0)
    for step in range(700):
        z, noise = (torch.randn(64, 16, generator=generator) for _ in range(2))
        critic = cast(Denoiser, gaussian_denoiser(float(mean), float(std.abs())))
        picture = mean + std * z
        _, gradient, _ = matching_gradient(rule, picture, noise, law.sigma(torch.randn(64, generator=generator)), critic, teacher)
        optimizer.zero_grad()
        hand_over(picture, gradient / 64, torch.zeros(())).backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / 700)
        optimizer.step()
    assert abs(float(mean) - 1.0) < 0.06
    assert abs(float(std.abs()) - 0.5) < 0.06


def test_denoising_loss_is_weighted_and_reaches_the_network_only() -> None:
    clean = torch.randn(2, 3, requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    sigma, noise = torch.tensor([1.0, 2.0]), torch.randn(2, 3)
    loss = denoising_loss(lambda x, s: scale * x, clean, noise, sigma, levels.edm_weight(sigma))
    loss.sum().backward()
    assert clean.grad is None
    assert scale.grad is not None
    wanted = per_sample(levels.edm_weight(sigma), clean) * (0.5 * (clean + per_sample(sigma, clean) * noise) - clean) ** 2
    assert_close(loss, wanted, rtol=1e-6, atol=1e-6)


# ---- levels and paths ----


def test_laws_of_levels_keep_to_their_ranges() -> None:
    u = torch.linspace(0, 1, 101)
    karras = levels.KarrasLevels().sigma(u)
    assert_close(karras[[0, -1]], torch.tensor([0.002, 24.4]), rtol=2e-3, atol=0)
    assert bool((karras.diff() > 0).all())
    assert_close(levels.GeometricLevels().sigma(u)[[0, -1]], torch.tensor([0.02, 100.0]), rtol=1e-5, atol=0)
    assert_close(levels.LogNormalLevels().sigma(torch.tensor([0.0])), torch.tensor([-1.2]).exp(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="unknown law of noise levels 'normal'"):
        levels.make_levels("normal")
    with pytest.raises(ValueError, match="first < last"):
        levels.make_levels("karras", first=0.9, last=0.5)


@pytest.mark.parametrize("path", sorted(paths.PATHS))
@pytest.mark.parametrize("kind", paths.PREDICTIONS)
def test_every_prediction_of_every_path_is_the_same_denoiser(path: str, kind: str) -> None:
    """The exact denoiser of a Gaussian, predicted in each way, comes back as itself."""
    exact = cast(Denoiser, gaussian_denoiser(0.3, 0.7))
    law = paths.PATHS[path]()
    x, level = torch.randn(4, 2, dtype=torch.float64), torch.tensor([0.1, 0.5, 2.0, 8.0], dtype=torch.float64)

    def network(x_t: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = law.alpha(level), law.sigma(level)
        return paths.from_clean(exact(x_t / per_sample(alpha, x_t), level), x_t, alpha, sigma, kind)

    assert_close(paths.as_denoiser(network, law, kind)(x, level), exact(x, level), rtol=1e-9, atol=1e-9)


def test_guidance_extrapolates_and_is_off_at_one() -> None:
    one, zero = (lambda x, s: torch.ones_like(x)), (lambda x, s: torch.zeros_like(x))
    assert paths.guided(one, zero, 1) is one
    assert_close(paths.guided(one, zero, 3.0)(torch.zeros(1, 2), torch.ones(1)), torch.full((1, 2), 3.0), rtol=0, atol=0)


# ---- neighbours ----


def test_consistency_curriculum_and_weights() -> None:
    assert [consistency.stage_ratio(seen, 10) for seen in (0, 10, 10**6)] == [0.5, 0.75, 0.999]
    t = torch.tensor([0.002, 1.0, 80.0])
    r = consistency.earlier_level(t, 0.75)
    assert bool((r >= 0.002).all()) and bool((r[1:] < t[1:]).all())
    assert consistency.earlier_level(t, 0.999)[1] > r[1]
    with pytest.raises(ValueError, match="unknown weighting 'snr'"):
        consistency.consistency_loss(lambda x, s: x, t[:, None], t[:, None], t, r, weighting="snr")


def test_an_exact_flow_is_consistent_along_itself() -> None:
    """An Euler step along the teacher's flow goes where the flow goes, for a small step."""
    teacher = cast(Denoiser, gaussian_denoiser(0.0, 0.5))
    t, r = torch.tensor([2.0], dtype=torch.float64), torch.tensor([1.999], dtype=torch.float64)
    x = torch.tensor([[3.0]], dtype=torch.float64)
    exact = x * ((0.25 + r**2) / (0.25 + t**2)).sqrt()
    assert_close(consistency.euler_step(x, t, r, teacher), exact, rtol=1e-6, atol=0)


def test_average_velocity_of_one_point_is_learnt_exactly() -> None:
    """Data at one point c: v = (x_t - c) / t for every time, so u = v and the loss is 0 for any r."""
    c, noise = 0.7, torch.randn(5, 2)
    t, r = torch.rand(5) * 0.8 + 0.2, torch.rand(5) * 0.1
    x_t = (1 - per_sample(t, noise)) * c + per_sample(t, noise) * noise

    def average(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return (x - c) / per_sample(t, x)

    u, derivative = velocity_and_derivative(average, x_t, r, t, noise - c)
    loss, _ = mean_flow_loss(u, derivative, noise - c, r, t)
    assert float(loss.abs().max()) < 1e-6


def test_f_divergences_and_adversarial_losses() -> None:
    logits = torch.tensor([[0.0], [2.0]])
    assert_close(adversarial.f_divergence_weight(logits, "rkl"), torch.ones(2), rtol=0, atol=0)
    assert_close(adversarial.f_divergence_weight(logits, "kl").mean(), torch.tensor(1.0), rtol=1e-6, atol=0)
    assert_close(adversarial.discriminator_loss(torch.zeros(2), torch.zeros(2)), torch.tensor(2 * 2.0).log(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="unknown f-divergence"):
        adversarial.f_divergence_weight(logits, "hellinger")


def test_impossible_rules_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"distance": "huber"}, "unknown distance"),
        ({"space": "v"}, "unknown space"),
        ({"c": -1}, "c must"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            SIM(**options)
