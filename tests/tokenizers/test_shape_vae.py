"""Laws of the shape VAE, its layout, and farthest points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from genkit import convert
from genkit.convert import flashvdm
from genkit.tokenizers.point_sampling import farthest_points
from genkit.tokenizers.shape_vae import ShapeVAE, fourier_features

SMALL: dict[str, Any] = {
    "num_latents": 8, "embed_dim": 4, "width": 16, "heads": 4, "num_encoder_layers": 1, "num_decoder_layers": 2,
    "pc_size": 48, "pc_sharpedge_size": 16, "downsample_ratio": 3,
}  # fmt: skip
SLIM: dict[str, Any] = {"head_downsample": 2, "head_mlp_ratio": 1.0, "head_ln_post": False}


def build(**options: Any) -> ShapeVAE:
    torch.manual_seed(0)
    model = ShapeVAE(**{**SMALL, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def surface(b: int = 2) -> torch.Tensor:
    return torch.rand(b, 64, 7, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 214_212_865),
        ({"num_encoder_layers": 8}, 327_746_177),
        ({"head_downsample": 2, "head_mlp_ratio": 1.0, "head_ln_post": False}, 203_690_497),
    ],
)
def test_published_sizes_have_the_published_parameter_counts(options: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        model = ShapeVAE(**options)
    assert sum(p.numel() for p in model.parameters()) == count


def test_a_stack_string_replaces_the_decoder_and_keeps_latents_a_set(tmp_path: Path) -> None:
    model = build(stack="latent(m=3) + mlp(ratio=2), linear + mlp")
    latents, points = torch.randn(1, 8, 4), torch.rand(1, 5, 3)
    with torch.no_grad():
        logits = model.query(points, model.decode(latents))
        assert_close(model.query(points, model.decode(latents.flip(1))), logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again: Any = ShapeVAE.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.query(points, again.decode(latents)), logits)
    for stack, message in (("conv + mlp, attention + mlp", "set_op"), ("attention + mlp", "num_decoder_layers=2, got 1 blocks")):
        with pytest.raises(ValueError, match=message):
            build(stack=stack)


def test_a_shape_does_not_depend_on_its_batch_and_points_are_alone() -> None:
    model, points = build(), torch.rand(2, 9, 3) * 2 - 1
    with torch.no_grad():
        logits, posterior = model(surface(), points)
        alone, _ = model(surface()[1:], points[1:])
        assert_close(alone[0], logits[1], rtol=1e-4, atol=1e-5)
        tokens = model.decode(posterior.mean)
        assert_close(model.query(points[:, 3:5], tokens), logits[:, 3:5], rtol=1e-4, atol=1e-5)


def test_the_order_of_the_other_points_does_not_matter() -> None:
    model, points = build(downsample_ratio=6), surface(1)
    order = torch.cat([torch.tensor([0]), 1 + torch.randperm(35), torch.arange(36, 48), torch.tensor([48]), 49 + torch.randperm(11),
                       torch.arange(60, 64)])  # fmt: skip
    with torch.no_grad():
        assert_close(model.encode(points[:, order]).mean, model.encode(points).mean, rtol=1e-4, atol=1e-5)


def test_latent_tokens_are_a_set() -> None:
    model, latents, points = build(), torch.randn(1, 8, 4), torch.rand(1, 5, 3)
    with torch.no_grad():
        a, b = (model.query(points, model.decode(x)) for x in (latents, latents[:, torch.randperm(8)]))
    assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_posterior_is_a_normal_distribution() -> None:
    posterior = build().encode(surface())
    assert_close(posterior.sample(torch.zeros_like(posterior.mean)), posterior.mean)
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    standard = torch.distributions.Normal(torch.zeros_like(posterior.mean), torch.ones_like(posterior.mean))
    assert_close(posterior.kl(), torch.distributions.kl_divergence(normal, standard).flatten(1).mean(1), rtol=1e-4, atol=1e-5)


def test_every_parameter_learns_checkpointing_and_half_precision(tmp_path: Path) -> None:
    model = build(num_encoder_layers=2).train()
    points, noise = torch.rand(2, 9, 3), torch.randn(2, 8, 4)
    logits, posterior = model(surface(), points, noise)
    (logits.square().mean() + posterior.kl().mean()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and float(g.abs().max()) > 0 for g in gradients.values())
    model.zero_grad()
    model.enable_gradient_checkpointing()
    logits, posterior = model(surface(), points, noise)
    (logits.square().mean() + posterior.kl().mean()).backward()
    for name, p in model.named_parameters():
        assert_close(p.grad, gradients[name], rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = ShapeVAE.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    with torch.no_grad():
        half, _ = again(surface(), points)
        assert_close(half.float(), model.eval()(surface(), points)[0], rtol=0, atol=0.3)


@pytest.mark.parametrize("options", [{}, SLIM, {"num_encoder_layers": None}, {"qkv_bias": True}])
def test_round_trip_through_the_official_layout(options: dict[str, Any], tmp_path: Path) -> None:
    model = build(**options)
    state = flashvdm.to_official(model)
    save_file(state, tmp_path / "model.fp16.safetensors")
    system, path = convert.recognise(tmp_path / "model.fp16.safetensors")  # type: ignore[misc]
    names = ("heads", "num_latents", "pc_size", "pc_sharpedge_size", "downsample_ratio")
    again = convert.load(system, path, **{name: model.config[name] for name in names})
    assert system == "flashvdm" and again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_the_vae_of_a_whole_generator_and_a_decoder_alone() -> None:
    model = build()
    state = {f"vae.{key}": value for key, value in flashvdm.to_official(model).items()}
    again, report = flashvdm.from_official(state | {"model.latent_in.weight": torch.zeros(1)}, heads=4, num_latents=8, encoder=False)
    assert again.encoder is None and report.dropped
    latents = torch.randn(1, 8, 4)
    assert torch.equal(again.decode(latents), model.decode(latents))
    with pytest.raises(ValueError, match="decoder only"):
        again.encode(surface())


def test_fourier_features_go_coordinate_by_coordinate() -> None:
    x = torch.tensor([0.1, 0.2, 0.3])
    found = fourier_features(x, 2)
    angles = torch.tensor([0.1, 0.2, 0.2, 0.4, 0.3, 0.6])
    assert_close(found, torch.cat([x, angles.sin(), angles.cos()]))
    assert_close(fourier_features(x, 2, include_pi=True)[3:9], (angles * torch.pi).sin())


def test_farthest_points_are_far() -> None:
    points = torch.rand(3, 50, 3, generator=torch.Generator().manual_seed(0))
    picked = farthest_points(points, 20, torch.tensor([4, 0, 49]))
    assert picked[:, 0].tolist() == [4, 0, 49]
    for cloud, index in zip(points, picked, strict=True):
        assert len(index.unique()) == 20
        gaps = [float(torch.cdist(cloud[index[i : i + 1]], cloud[index[:i]]).min()) for i in range(1, 20)]
        assert gaps == sorted(gaps, reverse=True)
    with pytest.raises(ValueError, match="1 .. 50"):
        farthest_points(points, 51, torch.zeros(3, dtype=torch.long))


def test_impossible_sizes_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="be whole"):
        ShapeVAE(**{**SMALL, "pc_size": 47})
    with pytest.raises(ValueError, match="heads must divide width"):
        ShapeVAE(**{**SMALL, "width": 18})
    with pytest.raises(ValueError, match="downsample=3"):
        ShapeVAE(**{**SMALL, "head_downsample": 3})
    with pytest.raises(ValueError, match="surface"):
        build().encode(surface()[:, :-1])
    with pytest.raises(ValueError, match="points"):
        build().query(torch.zeros(1, 3, 2), torch.zeros(1, 8, 16))
