"""How well an image tokenizer keeps pictures, and which of its codes it uses: numbers, and a page that shows them.

Letters: n pictures measured, m pictures shown, k codes, h w rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from genkit.eval.page import escape, image, page, section
from genkit.eval.reconstruction import psnr_per_image, ssim_per_image, to_unit

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]
SHOWN, WORST, BARS, STRONG = 24, 8, 256, 64  # pictures in order, pictures at their worst, bars of the histogram, an error that is black


@dataclass
class Reconstructions:
    """Pictures through a tokenizer and back.

    Attributes:
        numbers: of the pictures, rows of the originals.
        psnr, ssim: [n] float64, in that order.
        grid: (h, w) of the codes of a picture.
        size: (h, w) of a picture in pixels.
        originals, samples: by number, uint8 [h, w, 3], of the pictures shown.
    """

    numbers: list[int]
    psnr: Tensor
    ssim: Tensor
    grid: tuple[int, int]
    size: tuple[int, int]
    originals: dict[int, Pixels]
    samples: dict[int, Pixels]

    @property
    def worst(self) -> list[int]:
        """The pictures with the lowest PSNR that are shown, lowest first."""
        order = self.psnr.argsort().tolist()
        return [self.numbers[i] for i in order if self.numbers[i] in self.originals][:WORST]


@torch.no_grad()
def reconstruct_all(
    reconstruct: Reconstruct,
    data: Dataset[dict[str, Tensor]],
    numbers: list[int],
    count: Callable[[Tensor], None],
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Reconstructions:
    """Pass pictures through a tokenizer.

    Args:
        reconstruct: pictures [b, 3, h, w] in [-1, 1] -> (reconstructions [b, 3, h, w], codes [b, h, w]).
        data: items with an `image` [3, h, w] in [-1, 1], all of one size.
        numbers: of the pictures; at least one.
        count: called with the codes of every batch, such as `CodebookStats.update`.
        batch_size: pictures at a time.
        progress: called with pictures done and in all, after each batch.

    Raises:
        ValueError: for no pictures.
    """
    if not numbers:
        raise ValueError("reconstruct_all: there are no pictures to reconstruct.")
    spread = np.unique(np.linspace(0, len(numbers) - 1, min(len(numbers), SHOWN)).astype(int)).tolist()
    psnr, ssim = [], []
    originals: dict[int, Pixels] = {}
    made: dict[int, Pixels] = {}
    ordered, lowest = [numbers[i] for i in spread], list[tuple[float, int]]()
    grid, size = (0, 0), (0, 0)
    for start in range(0, len(numbers), batch_size):
        chosen = numbers[start : start + batch_size]
        pictures = torch.stack([data[number]["image"] for number in chosen])
        samples, codes = reconstruct(pictures)
        samples = samples.float().clamp(-1, 1).to(pictures.device)
        count(codes)
        psnr.append(psnr_per_image(samples, pictures))
        ssim.append(ssim_per_image(samples, pictures))
        grid, size = (codes.shape[-2], codes.shape[-1]), (pictures.shape[-2], pictures.shape[-1])
        lowest = sorted([*lowest, *zip(psnr[-1].tolist(), chosen, strict=True)])[:WORST]
        wanted = {*ordered, *(number for _, number in lowest)}
        for i, number in enumerate(chosen):
            originals[number], made[number] = _pixels(pictures[i]), _pixels(samples[i])
        for number in originals.keys() - wanted:
            del originals[number], made[number]
        if progress is not None:
            progress(start + len(chosen), len(numbers))
    return Reconstructions(list(numbers), torch.cat(psnr), torch.cat(ssim), grid, size, originals, made)


def _pixels(picture: Tensor) -> Pixels:
    """Return a picture [3, h, w] in [-1, 1] as it is measured: [h, w, 3] uint8."""
    pixels: Pixels = (to_unit(picture[None])[0] * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return pixels


def error_map(sample: Pixels, original: Pixels) -> Pixels:
    """Return the mean error of the channels [h, w, 3] as colours: white none, red half of `STRONG` steps of 255, black those and more.

    Args:
        sample, original: [h, w, 3] uint8.
    """
    error = np.abs(sample.astype(np.float64) - original).mean(-1, keepdims=True) / STRONG
    falling = np.clip(1 - np.array([0, 2, 2]) * error, 0, 1)  # white to red
    red = np.clip(np.array([2 - 2 * error.squeeze(-1)]), 0, 1)[0]  # red to black
    falling[..., 0] = np.minimum(falling[..., 0], red)
    return (falling * 255).round().astype(np.uint8)


def write_page(found: Reconstructions, figures: Mapping[str, str], counts: Tensor, title: str) -> str:
    """Return a page: figures, pictures in order and the worst ones, each with reconstruction and error, and how often codes are used.

    Args:
        found: the reconstructions.
        figures: what to say first, by name.
        counts: how often each code was used, int64 [k].
        title: of the page.
    """
    rows = "".join(f"<tr><td>{escape(name)}</td><td class='n'>{escape(value)}</td></tr>" for name, value in figures.items())
    worst = found.worst
    ordered = [number for number in found.numbers if number in found.originals and number not in worst]
    scale = f"Original, reconstruction, error: white none, red {STRONG // 2} of 255 steps, black {STRONG} and more."
    parts = [f"<h1>{escape(title)}</h1><table>{rows}</table>", section("Pictures", f"<p>{scale}</p>{_triples(found, ordered)}")]
    return page(title, [*parts, section("The worst of all", _triples(found, worst)), section("Codes", histogram(counts))])


def _triples(found: Reconstructions, numbers: list[int]) -> str:
    """Return original, reconstruction and error of pictures."""
    parts = []
    for number in numbers:
        original, sample = found.originals[number], found.samples[number]
        shown = (("original", original), ("reconstruction", sample), ("error", error_map(sample, original)))
        pictures = "".join(image(pixels, f"{number}: {name}") for name, pixels in shown)
        parts.append(f"<div class='pair'>{pictures}<br>{number}: {found.psnr[found.numbers.index(number)]:.1f} dB</div>")
    return "".join(parts)


def histogram(counts: Tensor) -> str:
    """Return an SVG of how often codes are used, the most used first; one bar stands for several codes where there are many.

    Args:
        counts: int64 [k].
    """
    total, k = max(int(counts.sum()), 1), len(counts)
    each = math.ceil(k / BARS)
    shares = torch.nn.functional.pad(counts.double().sort(descending=True).values / total, (0, -k % each)).view(-1, each).mean(1)
    used = shares[shares > 0]
    width, height, margin = 720, 220, 48
    low = min(-1, math.floor(math.log10(float(used.min())))) if len(used) else -1
    inner, tall = (width - margin) / len(shares), height - 32
    bars = "".join(
        f"<rect x='{margin + i * inner:.2f}' y='{8 + tall * math.log10(share) / low:.1f}' width='{max(inner - 0.5, 0.5):.2f}' "
        f"height='{tall * (1 - math.log10(share) / low):.1f}' fill='#36c'/>"
        for i, share in enumerate(shares.tolist())
        if share
    )
    ticks = "".join(
        f"<text x='4' y='{8 + tall * power / low + 4:.0f}'>{10.0**power:g}</text>"
        f"<path d='M{margin},{8 + tall * power / low:.1f}H{width}' stroke='#ddd'/>"
        for power in range(low, 1)
    )
    unit = "each bar is a code" if each == 1 else f"each bar is the mean of {each} codes"
    text = f"<text x='{margin}' y='{height - 4}'>codes from the most to the least used; {unit}; share of all tokens, logarithmic</text>"
    return f"<svg width='{width}' height='{height}' font-size='11' role='img'>{ticks}{bars}{text}</svg>"
