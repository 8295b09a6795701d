"""Residual quantization: levels, tables, noise, gradients."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from genkit.tokenizers.quantizers.residual import ResidualVQ


def quantizer(**options: object) -> ResidualVQ:
    torch.manual_seed(0)
    return ResidualVQ(11, 6, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_shared", [True, False])
def test_each_level_takes_the_code_nearest_to_what_is_left(is_shared: bool) -> None:
    model, z = quantizer(is_shared=is_shared), torch.randn(4, 5, 6)
    assert model.codebook().shape == ((1 if is_shared else 3) * 11, 6)
    out, left = model(z), z
    for level in range(3):
        distances = torch.cdist(left, model.table(level).detach())
        assert torch.equal(out.indices[..., level], distances.argmin(-1))
        left = left - model.table(level)[out.indices[..., level]].detach()
    assert_close(out.quantized, z - left, atol=1e-6, rtol=1e-5)
    assert_close(model.lookup(out.indices), out.quantized, atol=1e-6, rtol=1e-5)


def test_a_missing_level_adds_nothing() -> None:
    model = quantizer()
    assert_close(model.lookup(torch.tensor([4, -1, -1])), model.table(0)[4])
    assert_close(model.lookup(torch.tensor([-1, -1, -1])), torch.zeros(6))
    with pytest.raises(ValueError, match="levels=3"):
        model.lookup(torch.zeros(2, 4, dtype=torch.long))


def test_gradients_reach_the_latents_once_per_level_and_the_codes_that_were_chosen() -> None:
    model, z = quantizer(), torch.randn(4, 6, requires_grad=True)
    out = model(z)
    (grad,) = torch.autograd.grad(out.quantized.sum(), z, retain_graph=True)
    assert_close(grad, torch.full_like(z, 3.0))
    out.loss.backward()
    assert model.embedding.grad is not None
    moved = set(model.embedding.grad[0].abs().sum(1).nonzero().flatten().tolist())
    assert moved == set(out.indices.flatten().tolist())
    levels = sum(out.terms[f"commitment_{i}"] for i in range(3))
    assert_close(out.terms["commitment"], torch.as_tensor(levels))


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


def test_types_and_sizes() -> None:
    out = quantizer()(torch.randn(2, 3, 6, dtype=torch.bfloat16))
    assert out.quantized.dtype == torch.bfloat16 and out.indices.shape == (2, 3, 3) and out.loss.dtype == torch.float32
    with pytest.raises(ValueError, match="d=6"):
        quantizer()(torch.randn(2, 5))
    with pytest.raises(ValueError, match="num_levels"):
        quantizer(num_levels=0)
    model = quantizer(is_shared=False)
    model.set_codes(torch.arange(66.0).view(11, 6))
    assert_close(model.table(2), torch.arange(66.0).view(11, 6))
