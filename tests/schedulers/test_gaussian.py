"""Tables of the Gaussian diffusion, its steps, and diffusers' schedulers beside them."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.testing import assert_close

from genkit.schedulers.gaussian import GaussianDiffusion, discretized_log_likelihood, float64_alphas, kept_steps, make_betas, normal_kl
from genkit.tasks._vdt_loss import compose, masked_loss


def test_respacing_keeps_the_ends_and_the_products() -> None:
    chain, whole = GaussianDiffusion(respacing="10"), GaussianDiffusion()
    assert chain.timesteps[0] == 0 and chain.timesteps[-1] == 999 and len(chain) == 10
    assert_close(chain.alphas_cumprod, whole.alphas_cumprod[chain.timesteps], rtol=1e-12, atol=0)
    same = GaussianDiffusion(respacing="1000")
    assert_close(same.betas, whole.betas, rtol=1e-9, atol=0)
    assert kept_steps("ddim50")[1] == 20 and len(kept_steps("10,15,20")) == 45
    with pytest.raises(ValueError, match="no whole stride keeps 600"):
        kept_steps("ddim600")
    with pytest.raises(ValueError, match="cannot keep 600"):
        kept_steps("600,1")


def test_schedules_start_clean_and_end_in_noise() -> None:
    for schedule in ("linear", "squaredcos_cap_v2"):
        a = (1 - make_betas(schedule, 1000)).cumprod(0)
        assert float(a[0]) > 0.999 and float(a[-1]) < 1e-4
    with pytest.raises(ValueError, match="unknown noise schedule"):
        make_betas("cosine", 10)


def test_the_posterior_of_the_truth_is_consistent() -> None:
    """Mean coefficients reproduce x_{t-1} in expectation: E[x_t-1] = sqrt(a_{t-1}) x_0."""
    chain = GaussianDiffusion()
    mean = chain.posterior_mean_coef1 + chain.posterior_mean_coef2 * chain.sqrt_alphas_cumprod
    assert_close(mean[1:], chain.sqrt_alphas_cumprod[:-1], rtol=1e-9, atol=1e-12)


def test_bound_terms_vanish_for_the_true_posterior() -> None:
    chain = GaussianDiffusion()
    clean, noise, t = torch.rand(3, 2, 4) * 2 - 1, torch.randn(3, 2, 4), torch.tensor([1, 400, 999])
    x_t = chain.add_noise(clean, noise, t)
    assert_close(chain.bound_terms(clean, x_t, t, noise, -torch.ones_like(clean)), torch.zeros(3), rtol=0, atol=1e-4)


def test_likelihood_of_bins_sums_to_one() -> None:
    levels = torch.arange(256) / 127.5 - 1
    total = discretized_log_likelihood(levels, torch.full((256,), 0.1), torch.full((256,), math.log(0.3))).exp().sum()
    assert_close(total, torch.tensor(1.0), rtol=2e-3, atol=0)
    zero = torch.zeros(2)
    assert_close(normal_kl(zero, zero, zero, zero), zero, rtol=0, atol=0)


@pytest.mark.parametrize("steps", [8, 50])
def test_diffusers_with_float64_tables_takes_the_same_steps(steps: int) -> None:
    chain = GaussianDiffusion(respacing=str(steps))
    own = DDPMScheduler(1000, 1e-4, 0.02, "linear", variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")
    scheduler = float64_alphas(own)
    scheduler.set_timesteps(timesteps=chain.timesteps.flip(0).tolist())
    generator = torch.Generator().manual_seed(0)
    x = theirs = torch.randn(1, 2, 3, generator=generator)
    for i, step in zip(reversed(range(steps)), scheduler.timesteps, strict=True):
        eps, logits = 0.5 * x.sin(), x.cos()
        t = torch.full((1,), i)
        x = chain.predict(x, t, eps, logits).mean
        output = torch.cat([0.5 * theirs.sin(), theirs.cos()], dim=1)
        given = torch.Generator().manual_seed(9)
        noise = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(9))
        spread = (0.5 * chain.predict(theirs, t, output[:, :2], output[:, 2:]).log_variance).exp() * noise * (i > 0)
        theirs = scheduler.step(output, step, theirs, generator=given).prev_sample - spread
    assert_close(theirs.float(), x, rtol=1e-4, atol=1e-4)


def test_ddim_is_diffusers_leading_spacing() -> None:
    chain = GaussianDiffusion(respacing="ddim10")
    scheduler = DDIMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == chain.timesteps.flip(0).tolist()
    x = theirs = torch.randn(1, 2, 3)
    for i, step in zip(reversed(range(10)), scheduler.timesteps, strict=True):
        x, _ = chain.ddim_step(x, torch.full((1,), i), x.sin())
        theirs = scheduler.step(theirs.sin(), step, theirs).prev_sample
    assert_close(theirs, x, rtol=1e-4, atol=1e-4)


def test_masked_loss_counts_what_is_to_be_made() -> None:
    chain = GaussianDiffusion(variance="fixed_small")
    clean, noise, t = torch.rand(2, 3, 1, 4, 4), torch.randn(2, 3, 1, 4, 4), torch.tensor([5, 500])
    mask = torch.zeros(1, 3, 4, 4, dtype=torch.bool)
    mask[:, 1] = True
    seen = {}

    def model(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        seen["x"] = x
        return torch.zeros_like(x, requires_grad=True)

    found = masked_loss(chain, model, clean, noise, t, mask)
    assert_close(found["mse"], (noise[:, 1] ** 2).flatten(1).mean(1) / 3, rtol=1e-5, atol=1e-6)
    assert_close(masked_loss(chain, model, clean, noise, t, mask, per_masked=True)["loss"], 3 * found["loss"], rtol=1e-5, atol=1e-6)
    assert "vb" not in found
    assert_close(seen["x"][:, [0, 2]], clean[:, [0, 2]], rtol=0, atol=0)
    assert_close(compose(clean, noise, mask)[:, 1], noise[:, 1], rtol=0, atol=0)
