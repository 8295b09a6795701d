"""Laws of the EDM networks and preconditioners."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from genkit.blocks.attend import attend
from genkit.generators.edm import SIZES, EDMUNet2DModel
from genkit.generators.edm_layers import Resample, ResampleConv2d
from genkit.generators.preconditioning import PRECONDITIONERS, make_preconditioner
from genkit.schedulers.noise_levels import cosine_table, linear_table, nearest_level, vp_sigma, vp_time

SONG: dict[str, Any] = {"name": "song", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
NCSN: dict[str, Any] = {**SONG, "embedding_type": "fourier", "encoder_type": "residual", "resample_filter": [1, 3, 3, 1]}
SKIP: dict[str, Any] = {**SONG, "encoder_type": "skip", "decoder_type": "skip"}
ADM: dict[str, Any] = {"name": "adm", "model_channels": 64, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4]}
UNETS = {"song": SONG, "ncsn": NCSN, "skip": SKIP, "adm": ADM}
ALL = {**UNETS, "layout": {**SONG, "label_map": 4}}


def build(name: str = "song", **options: Any) -> EDMUNet2DModel:
    """A conditional network whose every layer acts."""
    torch.manual_seed(0)
    model = EDMUNet2DModel(**({"sample_size": 8, "label_dim": 3, "augment_dim": 2, "unet_config": ALL[name]} | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model.eval()


def inputs(b: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 2, 1])[:b]
    return {"sample": torch.randn(b, 3, 8, 8, generator=generator), "sigma": torch.tensor([0.1, 1.0, 20.0])[:b], "class_labels": labels}


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("cifar10_vp", {}, 55_733_891), ("cifar10_vp", {"label_dim": 10}, 55_735_299), ("cifar10_ve", {}, 56_397_827),
        ("cifar10_ve", {"label_dim": 10}, 56_400_643), ("ffhq64_vp", {}, 61_805_571), ("ffhq64_ve", {}, 62_761_091),
        ("imagenet64_adm", {}, 295_899_267),
    ],
)  # fmt: skip
def test_published_sizes_have_the_published_parameter_counts(name: str, options: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        model = EDMUNet2DModel(**(SIZES[name] | options))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", sorted(ALL))
def test_samples_do_not_see_each_other_and_null_is_a_row_of_zeros(name: str) -> None:
    model, given = build(name), inputs()
    with torch.no_grad():
        whole = model(**given).sample
        for i in range(3):
            alone = model(**{key: value[i : i + 1] for key, value in given.items()}).sample
            assert_close(alone[0], whole[i], rtol=1e-4, atol=1e-4)
        none = model(given["sample"], given["sigma"]).sample
        zeros = model(given["sample"], given["sigma"], torch.zeros(3, 3), torch.zeros(3, 2)).sample
    assert_close(none, zeros, rtol=0, atol=0)
    assert not torch.allclose(none, whole)


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_parameter_learns_and_checkpointing_changes_nothing(name: str) -> None:
    model, given = build(name).train().requires_grad_(True), inputs()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(**given, augment_labels=torch.ones(3, 2)).sample.square().mean().backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for n, p in model.named_parameters() if "attn" not in n)
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(ALL))
def test_save_load_and_half_precision(name: str, tmp_path: Path) -> None:
    model, given = build(name), inputs()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(**given).sample
        assert_close(EDMUNet2DModel.from_pretrained(tmp_path)(**given).sample, wanted, rtol=0, atol=0)
        half = build(name).to(torch.bfloat16)(**given).sample
    assert half.dtype == torch.float32
    assert float((half - wanted).norm() / wanted.norm()) < 0.05


def test_patches_are_an_orthogonal_change() -> None:
    model = build(patch_size=2, unet_config={**SONG, "attn_resolutions": [2]})
    given = inputs()
    with torch.no_grad():
        assert model(**given).sample.shape == (3, 3, 8, 8)
        denoised = model(given["sample"], 1e-4, given["class_labels"]).sample
    assert_close(denoised, given["sample"], rtol=1e-3, atol=1e-3)


def test_compiles_without_breaks() -> None:
    model, given = build(), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_close(compiled(**given).sample, model(**given).sample, rtol=1e-5, atol=1e-5)


def test_forward_mode_and_second_derivatives_go_through_the_network() -> None:
    model, given = build(), inputs()
    x, sigma, labels = given["sample"].double(), given["sigma"].double(), given["class_labels"]
    direction = torch.randn_like(x)

    def f(x: Tensor) -> Tensor:
        return model(x, sigma, labels).sample

    tangent = torch.func.jvp(f, (x,), (direction,))[1]
    step = 1e-2
    numeric = (f(x + step * direction) - f(x - step * direction)) / (2 * step)
    assert float((tangent - numeric).norm() / numeric.norm()) < 1e-2
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda q, k, v: attend(q, k, v), (q, k, v))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_size": 9}, "image_size must be a multiple of 2"),
        ({"unet_config": {**SONG, "model_channels": 6}}, "do not divide into"),
        ({"unet_config": {**ADM, "model_channels": 32}}, "heads of 64 channels"),
        ({"unet_config": {"name": "unet"}}, "unknown U-Net 'unet'"),
        ({"preconditioner_config": {"name": "emd"}}, "unknown preconditioner 'emd'.*'edm'"),
        ({"preconditioner_config": {"name": "edm", "sigma_data": 0}}, "sigma_data must be above 0"),
        ({"patch_size": 3}, "patch_size must divide"),
        ({"label_dim": 0, "unet_config": ALL["layout"]}, "label_map needs labels"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_wrong_conditions_are_refused() -> None:
    model, given = build(), inputs()
    with pytest.raises(ValueError, match=r"class ids must lie in 0 .. 2, got \[0, 3, 1\]"):
        model(given["sample"], 1.0, torch.tensor([0, 3, 1]))
    with pytest.raises(ValueError, match="class_labels"):
        model(given["sample"], 1.0, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="unconditional"):
        build(label_dim=0)(given["sample"], 1.0, torch.tensor([0, 0, 0]))


# ---- layers ----


def test_box_resampling_needs_no_convolution() -> None:
    x = torch.randn(2, 3, 6, 6)
    for resampling in ("up", "down"):
        fast, slow = Resample(resampling), Resample(resampling)
        slow.is_box = False
        assert_close(fast(x), slow(x), rtol=1e-6, atol=1e-6)
    conv = ResampleConv2d(3, 5, 1, "up")
    wanted = F.conv2d(F.interpolate(x, scale_factor=2.0), conv.weight, conv.bias)
    assert_close(conv(x), wanted, rtol=1e-5, atol=1e-5)


# ---- preconditioners and levels ----


@pytest.mark.parametrize("name", sorted(PRECONDITIONERS))
def test_a_denoiser_keeps_a_clean_picture_and_is_finite_at_every_level(name: str) -> None:
    own = make_preconditioner(name)
    sigma = torch.logspace(-3, 3, 13)
    c = own.coefficients(sigma)
    assert all(bool(torch.isfinite(part).all()) for part in c)
    small = own.coefficients(torch.tensor([max(own.sigma_min, 1e-3)]))
    assert abs(float(small.skip) - 1) < 0.05 and abs(float(small.out)) < 0.05


def test_edm_scales_inputs_and_targets_to_unit_variance() -> None:
    sigma, data = torch.tensor([0.01, 0.5, 10.0]), 0.5
    c = make_preconditioner("edm").coefficients(sigma)
    assert_close(c.input**2 * (sigma**2 + data**2), torch.ones(3), rtol=1e-5, atol=0)
    residual = ((1 - c.skip) ** 2 * data**2 + (c.skip * sigma) ** 2) / c.out**2
    assert_close(residual, torch.ones(3), rtol=1e-4, atol=0)


def test_tables_and_the_vp_process() -> None:
    t = torch.linspace(1e-3, 1, 7, dtype=torch.float64)
    assert_close(vp_time(vp_sigma(t)), t, rtol=1e-9, atol=1e-9)
    assert math.isclose(float(vp_sigma(torch.tensor(1.0))), 152.2, rel_tol=1e-3)
    for table in (cosine_table(), linear_table()):
        assert len(table) == 1001 and float(table[-1]) == 0 and bool((table.diff() < 0).all())
    table = linear_table()
    steps = [int(999 - nearest_level(table, torch.tensor(sigma))) for sigma in (2.5, 1.0, 10.0, 100.0)]
    assert steps == [440, 258, 674, 954]
