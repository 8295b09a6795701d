"""Metrics of video prediction against scikit-image, and the predictions that need no model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch.testing import assert_close

from genkit.eval.prediction import METRICS, blend, prediction_metrics, restoration_metrics


def test_metrics_follow_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(2, 3, 1, 12, 10, generator=generator) * 2 - 1
    predicted = truth + 0.6 * torch.randn(truth.shape, generator=generator)  # leaves [-1, 1] here and there
    found = prediction_metrics(predicted, truth)
    assert tuple(found) == METRICS and all(values.shape == (2, 3) for values in found.values())
    x, y = ((clips.double() + 1) / 2 for clips in (predicted, truth))
    assert_close(found["mse"][1, 2], (x - y)[1, 2].square().sum())
    assert_close(found["mae"][1, 2], (x - y)[1, 2].abs().sum())
    a, b = (clips.clamp(0, 1)[1, 2, 0].numpy() for clips in (x, y))
    assert float(found["psnr"][1, 2]) == pytest.approx(10 * np.log10(1 / np.mean((a - b) ** 2)))
    assert float(found["ssim"][1, 2]) == pytest.approx(structural_similarity(a, b, data_range=1.0), abs=1e-9)
    assert float(found["ssim-openstl"][1, 2]) == pytest.approx(structural_similarity(a, b, data_range=2.0), abs=1e-9)
    assert bool((found["ssim-openstl"] > found["ssim"]).all())


def test_restored_clips_are_judged_where_something_was_made() -> None:
    generator = torch.Generator().manual_seed(1)
    truth = torch.rand(3, 1, 8, 8, generator=generator) * 2 - 1
    made, mask = truth.clone(), torch.zeros(3, 8, 8, dtype=torch.bool)
    mask[1:, :4] = True
    made[1, :, :4] += 0.1 * torch.randn(1, 4, 8, generator=generator)
    found = restoration_metrics(made, truth, mask)
    error = ((made.clamp(-1, 1) - truth) / 2)[1:, :, :4].square().mean()
    assert_close(found["psnr"], (-10 * error.log10()).double(), rtol=1e-5, atol=0)
    assert_close(found["ssim"], prediction_metrics(made[None, 1:], truth[None, 1:])["ssim"].mean())
    assert float(restoration_metrics(truth, truth, mask)["psnr"]) == pytest.approx(58.92, abs=0.01)
    with pytest.raises(ValueError, match="nothing was made"):
        restoration_metrics(made, truth, torch.zeros_like(mask))


def test_blending_fills_from_both_sides_and_holding_from_before() -> None:
    clips = torch.tensor([0.0, 9.0, 9.0, 3.0, 9.0]).view(1, 5, 1, 1, 1)
    mask = torch.tensor([False, True, True, False, True]).view(1, 5, 1, 1)
    assert_close(blend(clips, mask).flatten(), torch.tensor([0.0, 1.0, 2.0, 3.0, 3.0]))
    assert_close(blend(clips, mask, hold=True).flatten(), torch.tensor([0.0, 0.0, 0.0, 3.0, 3.0]))
    late = torch.tensor([True, True, False, False, False]).view(1, 5, 1, 1)
    assert_close(blend(clips, late).flatten()[:2], torch.tensor([9.0, 9.0]))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="given in no frame"):
        blend(torch.zeros(1, 2, 1, 1, 1), torch.ones(1, 2, 1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="7x7"):
        prediction_metrics(torch.zeros(1, 1, 1, 6, 9), torch.zeros(1, 1, 1, 6, 9))
    with pytest.raises(ValueError, match="predicted"):
        prediction_metrics(torch.zeros(1, 2, 1, 9, 9), torch.zeros(1, 1, 1, 9, 9))
