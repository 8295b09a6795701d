"""PSNR and SSIM: closed forms and conventions."""

from __future__ import annotations

import math

import pytest
import torch

from genkit.eval.reconstruction import WINDOWS, ms_ssim_per_image, psnr_per_image, psnr_pooled, ssim_per_image


def constant(*steps: int) -> torch.Tensor:
    """Return pictures [b, 3, 8, 8] whose 8-bit value is each of the steps."""
    return (torch.tensor(steps).view(-1, 1, 1, 1).expand(-1, 3, 8, 8) + 0.25) / 127.5 - 1


def test_psnr_of_constant_differences_is_the_closed_form() -> None:
    x, y = constant(100, 100), constant(110, 101)
    expected = torch.tensor([20 * math.log10(25.5), 20 * math.log10(255)], dtype=torch.float64)
    torch.testing.assert_close(psnr_per_image(x, y), expected, rtol=1e-5, atol=1e-5)
    pooled = -10 * math.log10(((10 / 255) ** 2 + (1 / 255) ** 2) / 2)
    assert float(psnr_pooled(x, y)) == pytest.approx(pooled, rel=1e-5)
    assert float(psnr_pooled(x, y)) < float(psnr_per_image(x, y).mean())


def test_values_are_clamped_and_truncated() -> None:
    assert torch.isinf(psnr_per_image(constant(255) + 3, constant(255))).all()
    assert torch.isinf(psnr_per_image(constant(7) + 0.7 / 127.5, constant(7))).all()
    assert not torch.isinf(psnr_per_image(constant(7) + 0.8 / 127.5, constant(7))).any()


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    y = x.clone()
    y[1] += torch.randn(3, 16, 16, generator=generator)
    values = ssim_per_image(y, x)
    assert values.shape == (2,)
    assert float(values[0]) == pytest.approx(1.0)
    assert float(values[1]) < 0.8


def test_ssim_of_constants_is_the_luminance_term() -> None:
    a, b = 100 / 255, 150 / 255
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert float(ssim_per_image(constant(150), constant(100))) == pytest.approx(expected, rel=1e-4)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"h=8.*got \[1, 3, 8, 4\]"):
        psnr_per_image(torch.zeros(1, 3, 8, 4), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="at least 7x7"):
        ssim_per_image(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("window", "options"), [("skimage", {}), ("wang", {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False})]
)
def test_ssim_is_scikit_images(window: str, options: dict[str, object]) -> None:
    from skimage.metrics import structural_similarity

    x, y = torch.randint(0, 256, (2, 3, 20, 24), dtype=torch.uint8), torch.randint(0, 256, (2, 3, 20, 24), dtype=torch.uint8)
    found = ssim_per_image(x, y, window)
    for i in range(2):
        pair = (x[i].double() / 255).numpy(), (y[i].double() / 255).numpy()
        assert float(found[i]) == pytest.approx(structural_similarity(*pair, channel_axis=0, data_range=1.0, **options), rel=1e-9)


@pytest.mark.parametrize("window", sorted(WINDOWS))
def test_every_window_gives_one_for_equal_pictures(window: str) -> None:
    x = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    assert float(ssim_per_image(x, x, window)) == pytest.approx(1)
    assert float(ssim_per_image(255 - x, x, window)) < 0.9


def test_multi_scale_similarity_of_one_scale_is_the_padded_similarity() -> None:
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    y = (x.float() * 0.9).to(torch.uint8)
    torch.testing.assert_close(ms_ssim_per_image(x, y, (1.0,)), ssim_per_image(x, y, "torchmetrics"), rtol=1e-9, atol=1e-9)
    assert float(ms_ssim_per_image(x, x, (0.5, 0.5))[0]) == pytest.approx(1)
    with pytest.raises(ValueError, match="5 scales need pictures of at least 176x176 pixels, got 32x32"):
        ms_ssim_per_image(x, y)


def test_bytes_are_compared_as_they_are() -> None:
    x = torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8)
    y = x.clone()
    y[0, 0, 0, 0] += 1
    assert float(psnr_per_image(x, y)) == pytest.approx(10 * math.log10(192 * 255**2), rel=1e-9)
