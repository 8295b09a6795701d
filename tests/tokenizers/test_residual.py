"""Residual quantization: levels, tables, noise, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from genkit.tokenizers.quantizers import ResidualQuantizer, build_quantizer


def quantizer(**options: Any) -> ResidualQuantizer:
    torch.manual_seed(0)
    model = build_quantizer({"name": "vq", "codebook_size": 11, "dim": 6, "num_levels": 3, "beta": 1.0, **options})
    assert isinstance(model, ResidualQuantizer)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("name", ["vq", "simvq", "ema_vq"])
def test_each_level_takes_the_code_nearest_to_what_is_left(is_shared: bool, name: str) -> None:
    model, z = quantizer(name=name, is_shared=is_shared).eval(), torch.randn(4, 5, 6)
    assert model.codebook().shape == ((1 if is_shared else 3) * 11, 6)
    out, left = model(z), z
    for level in range(3):
        codes = model.level(level).codebook().detach()
        assert torch.equal(out.indices[..., level], torch.cdist(left, codes).argmin(-1))
        left = left - codes[out.indices[..., level]]
    assert_close(out.quantized, z - left, atol=1e-6, rtol=1e-5)
    assert_close(model.lookup(out.indices), out.quantized, atol=1e-6, rtol=1e-5)


def test_a_missing_level_adds_nothing() -> None:
    model = quantizer()
    assert_close(model.lookup(torch.tensor([4, -1, -1])), model.codebook()[4])
    assert_close(model.lookup(torch.tensor([-1, -1, -1])), torch.zeros(6))
    with pytest.raises(ValueError, match="levels=3"):
        model.lookup(torch.zeros(2, 4, dtype=torch.long))


def test_gradients_reach_the_latents_once_per_level_and_the_codes_that_were_chosen() -> None:
    model, z = quantizer(), torch.randn(4, 6, requires_grad=True)
    out = model(z)
    (grad,) = torch.autograd.grad(out.quantized.sum(), z, retain_graph=True)
    assert_close(grad, torch.full_like(z, 3.0))
    out.loss.backward()
    moved = set(next(model.parameters()).grad.abs().sum(1).nonzero().flatten().tolist())  # type: ignore[union-attr]
    assert moved == set(out.indices.flatten().tolist())
    assert_close(out.terms["commitment"], torch.as_tensor(sum(out.terms[f"commitment_{i}"] for i in range(3))))


def test_the_released_path_of_vit_vqgan_gives_the_latents_no_commitment() -> None:
    model, z = quantizer(path="vit_vqgan"), torch.randn(4, 6, requires_grad=True)
    out = model(z)
    assert torch.autograd.grad(out.loss, z, allow_unused=True, retain_graph=True)[0] is None
    (grad,) = torch.autograd.grad(out.quantized.sum(), z)
    assert_close(grad, torch.ones_like(z))
    assert_close(out.quantized, quantizer()(z).quantized, atol=1e-6, rtol=1e-5)
    assert_close(out.loss, quantizer()(z).loss / 3)
    with pytest.raises(ValueError, match="unknown path"):
        quantizer(path="other")


def test_noise_of_low_temperature_changes_nothing_and_of_high_much() -> None:
    model, z = quantizer(), torch.randn(50, 6)
    gumbel = -torch.log(-torch.log(torch.rand(3, 50, 11)))
    plain = model(z).indices
    assert torch.equal(model(z, gumbel, 1e-4).indices, plain)
    assert (model(z, gumbel, 10.0).indices != plain).float().mean() > 0.5
    for wrong in (gumbel[:2], gumbel[:, :3]):
        with pytest.raises(ValueError, match="gumbel must be"):
            model(z, wrong)
    with pytest.raises(ValueError, match="temperature above 0"):
        model(z, gumbel, 0.0)


def test_fitted_levels_leave_less_over() -> None:
    latents = torch.randn(300, 6, generator=torch.Generator().manual_seed(1)) * 0.1 + 2
    model = quantizer(is_shared=False)
    before = (model(latents).quantized - latents).square().mean()
    model.fit(latents, torch.Generator().manual_seed(2))
    after = (model(latents).quantized - latents).square().mean()
    assert after < 0.1 * before


def test_types_and_sizes() -> None:
    out = quantizer()(torch.randn(2, 3, 6, dtype=torch.bfloat16))
    assert out.quantized.dtype == torch.bfloat16 and out.indices.shape == (2, 3, 3) and out.loss.dtype == torch.float32
    with pytest.raises(ValueError, match="d=6"):
        quantizer()(torch.randn(2, 5))
    with pytest.raises(ValueError, match="num_levels"):
        quantizer(num_levels=0)
