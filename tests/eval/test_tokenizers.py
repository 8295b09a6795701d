"""Reports of tokenizers: what is kept, what is shown, how codes are counted."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from genkit.eval.reconstruction import psnr_per_image, ssim_per_image
from genkit.eval.tokenizers import SHOWN, STRONG, WORST, error_map, histogram, reconstruct_all, write_page
from genkit.tokenizers.quantizers.stats import CodebookStats


class Pictures(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Noise of growing strength: later pictures are worse reconstructed."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(count, 3, 16, 16, generator=generator) * torch.linspace(0.1, 1, count).view(-1, 1, 1, 1)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index]}


def blurred(x: Tensor) -> tuple[Tensor, Tensor]:
    codes = (x.mean(1)[:, ::4, ::4] * 4).long().clamp(0, 3)
    return torch.nn.functional.avg_pool2d(x, 4).repeat_interleave(4, 2).repeat_interleave(4, 3), codes


def test_figures_are_those_of_all_pictures_at_once_and_the_worst_are_kept() -> None:
    data, stats = Pictures(60), CodebookStats(4)
    found = reconstruct_all(blurred, data, list(range(60)), stats.update, batch_size=7)
    samples, codes = blurred(data.images)
    assert_close(found.psnr, psnr_per_image(samples, data.images))
    assert_close(found.ssim, ssim_per_image(samples, data.images))
    assert torch.equal(stats.counts, torch.bincount(codes.flatten(), minlength=4))
    assert found.grid == (4, 4) and found.size == (16, 16)
    assert found.worst == found.psnr.argsort()[:WORST].tolist()
    assert SHOWN <= len(found.originals) <= SHOWN + WORST and found.originals.keys() == found.samples.keys()
    assert found.originals[0].shape == (16, 16, 3)


def test_page_shows_each_kept_picture_three_times() -> None:
    stats = CodebookStats(4)
    found = reconstruct_all(blurred, Pictures(3), [0, 2], stats.update)
    text = write_page(found, {"PSNR": "20 dB <at worst>"}, stats.counts, "a tokenizer")
    assert text.count("data:image/png;base64,") == 2 * 3
    assert "20 dB &lt;at worst&gt;" in text and "<h1>a tokenizer</h1>" in text


def test_error_map_goes_from_white_through_red_to_black() -> None:
    original = np.zeros((1, 4, 3), np.uint8)
    sample = original + np.array([0, STRONG // 2, STRONG, 200], np.uint8)[None, :, None]
    assert error_map(sample, original)[0].tolist() == [[255] * 3, [255, 0, 0], [0] * 3, [0] * 3]


@pytest.mark.parametrize("counts", [[0, 0], [5, 0], [900, 90, 9, 1], [3] * 1000, [0] * 65_535 + [7]])
def test_histogram_has_a_bar_for_all_that_is_used_inside_the_frame(counts: list[int]) -> None:
    text = histogram(torch.tensor(counts))
    bars = [tuple(map(float, bar)) for bar in re.findall(r"<rect x='([\d.]+)' y='([\d.]+)' width='[\d.]+' height='([\d.]+)'", text)]
    assert len(bars) == min(sum(c > 0 for c in counts), 250)
    assert all(8 <= y <= 196 and abs(y + height - 196) < 0.2 and x < 720 for x, y, height in bars)
    assert [height for _, _, height in bars] == sorted((height for _, _, height in bars), reverse=True)


def test_no_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="no pictures"):
        reconstruct_all(blurred, Pictures(1), [], lambda codes: None)
