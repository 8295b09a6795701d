"""Originals against reconstructions, file by file: PSNR, SSIM, MS-SSIM, LPIPS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from genkit.checks import shorten
from genkit.eval.lpips import LPIPS
from genkit.eval.metrics import NORMAL
from genkit.eval.pictures import FolderSource, Source
from genkit.eval.reconstruction import (
    GAUSS,
    MS_WEIGHTS,
    WINDOWS,
    ms_ssim_per_image,
    psnr_per_image,
    squared_errors,
    ssim_per_image,
)


def match_names(originals: Source, reconstructions: Source) -> None:
    """Check that two sources hold the same pictures in the same order: equally many, and files with equal names up to the suffix.

    Raises:
        ValueError: naming pictures that only one side has.
    """
    if len(originals) != len(reconstructions):
        counts = f"{originals.name!r} has {len(originals)} pictures and {reconstructions.name!r} {len(reconstructions)}"
        raise ValueError(f"{counts}; they must be pairs.")
    folders = [source for source in (originals, reconstructions) if isinstance(source, FolderSource)]
    names = [[str(file.relative_to(source.path).with_suffix("")) for file in source.files] for source in folders]
    if len(names) == 2 and names[0] != names[1]:
        alone = sorted(set(names[0]) ^ set(names[1]))
        raise ValueError(f"{originals.name!r} and {reconstructions.name!r} hold different files: {shorten(alone)}; pairs need equal names.")


def reconstruction_metrics(lpips: LPIPS | None = None) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return the metrics of pairs by name; each maps 8-bit pictures [b, 3, h, w] twice to [b].

    Args:
        lpips: adds "lpips".
    """
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr_per_image}
    for window in WINDOWS:
        found[f"ssim-{window}"] = lambda x, y, window=window: ssim_per_image(x, y, window)  # type: ignore[misc]
    found["ms-ssim"] = ms_ssim_per_image
    if lpips is not None:
        found["lpips"] = lambda x, y: lpips(x.float() / 127.5 - 1, y.float() / 127.5 - 1).double()
    return found


def compare(originals: Source, reconstructions: Source, lpips: LPIPS | None = None) -> dict[str, dict[str, Any]]:
    """Measure pairs of pictures one by one.

    Args:
        originals, reconstructions: equally many pictures in the same order.
        lpips: the distance, if its weights are at hand.

    Returns:
        Metric -> value, ci (95 %), count and, where pictures were left out, the reason. `psnr-pooled` averages the error first.

    Raises:
        ValueError: if the sources are no pairs, or a pair differs in size.
        PictureError: if a picture cannot be used.
    """
    match_names(originals, reconstructions)
    metrics = reconstruction_metrics(lpips)
    values: dict[str, list[Tensor]] = {}
    skipped: dict[str, str] = {}
    errors = []
    for index in range(len(originals)):
        pair = [torch.from_numpy(source.read(index).pixels.copy()).permute(2, 0, 1)[None] for source in (reconstructions, originals)]
        if pair[0].shape != pair[1].shape:
            sizes = f"{list(pair[1].shape[2:])} and {list(pair[0].shape[2:])}"
            raise ValueError(f"pair {index} ({originals.read(index).name}): sizes differ, {sizes}.")
        side = min(pair[0].shape[-2:])
        errors.append(squared_errors(*pair))
        for name, metric in metrics.items():
            least = _least_side(name)
            if side < least:
                skipped[name] = f"needs pictures of at least {least}x{least}"
                continue
            values.setdefault(name, []).append(metric(*pair))
    found = {name: summary(torch.cat(parts), skipped.get(name)) for name, parts in values.items()}
    pooled = float(-10 * torch.cat(errors).mean().log10())
    return {"psnr": found.pop("psnr"), "psnr-pooled": {"value": pooled, "ci": None, "count": len(originals)}, **found}


def _least_side(name: str) -> int:
    """Return the smallest side that a metric can measure."""
    if name == "ms-ssim":
        return len(GAUSS) * 2 ** (len(MS_WEIGHTS) - 1)
    return len(WINDOWS[name.removeprefix("ssim-")].weights) if name.startswith("ssim-") else 1


def summary(values: Tensor, note: str | None = None) -> dict[str, Any]:
    """Return mean, 95 % interval and count of values [n]; infinite ones (PSNR of equal pictures) are counted and left out of the mean."""
    finite = values[torch.isfinite(values)]
    found: dict[str, Any] = {"value": float(finite.mean()) if len(finite) else float("inf"), "ci": None, "count": len(values)}
    if len(finite) > 1:
        reach = NORMAL * float(finite.std()) / len(finite) ** 0.5
        found["ci"] = [found["value"] - reach, found["value"] + reach]
    if len(finite) < len(values):
        found["equal"] = len(values) - len(finite)
    return found | ({"note": note} if note else {})
