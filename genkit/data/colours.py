"""Names of colours people use, and how much of an object has each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

COLOURS = (
    "black", "dark grey", "grey", "light grey", "white",
    "red", "orange", "brown", "beige", "yellow", "green", "teal", "blue", "purple", "pink",
)  # fmt: skip


def name_colours(rgb: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Name sRGB colours by hue, saturation and value.

    Greys are told by a low chroma; brown is dark or dull orange, beige pale orange; the bounds are hue degrees of common usage.

    Args:
        rgb: [n, 3].

    Returns:
        [n] positions in `COLOURS`.
    """
    values = rgb.astype(np.float64) / 255
    high, low = values.max(1), values.min(1)
    chroma = high - low
    red, green, blue = values.T
    with np.errstate(divide="ignore", invalid="ignore"):
        hue = np.select([high == red, high == green], [(green - blue) / chroma % 6, (blue - red) / chroma + 2], (red - green) / chroma + 4)
        saturation = np.where(high > 0, chroma / high, 0.0)
    hue = np.nan_to_num(hue) * 60
    is_warm = (hue >= 8) & (hue < 45)
    rules = (
        ((saturation < 0.18) | (chroma < 0.06) | (~is_warm & (hue >= 45) & (saturation < 0.32) & (chroma < 0.15)), None),
        (is_warm & (saturation < 0.48) & (high >= 0.68), "beige"),
        (is_warm & (((saturation < 0.66) & (high < 0.8)) | (high < 0.66)), "brown"),
        (((hue < 12) | (hue >= 330)) & (saturation < 0.6) & (high > 0.85), "pink"),
        ((hue < 12) | (hue >= 325), "red"),
        (hue < 38, "orange"),
        (hue < 56, "yellow"),
        (hue < 162, "green"),
        (hue < 190, "teal"),
        (hue < 255, "blue"),
        (hue < 300, "purple"),
        (hue < 325, "pink"),
    )
    greys = np.digitize(high, (0.16, 0.36, 0.62, 0.85))
    named = [np.full(len(rgb), COLOURS.index(name)) if name else greys for _, name in rules]
    return np.select([rule for rule, _ in rules], named, COLOURS.index("grey")).astype(np.int64)


def colour_shares(rgb: NDArray[np.uint8], weights: NDArray[np.float64]) -> dict[str, float]:
    """Return the share of the weight that each colour name has, the largest first; colours that do not occur are left out.

    Args:
        rgb: [n, 3].
        weights: [n], not negative, for example face areas.
    """
    total = float(weights.sum())
    if not len(rgb) or total <= 0:
        return {}
    sums = np.bincount(name_colours(rgb), weights=weights, minlength=len(COLOURS)) / total
    return {COLOURS[i]: float(sums[i]) for i in np.argsort(-sums, kind="stable") if sums[i] > 0}


def face_areas(vertices: NDArray[np.floating], faces: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return the areas [f] of triangles, half the length of the cross product of two edges; vertices [v, 3], faces [f, 3]."""
    corners = vertices.astype(np.float64)[faces]
    return np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2


def picture_colours(pictures: NDArray[np.uint8]) -> dict[str, float]:
    """Return the colour shares of the pixels that differ from a white background; pictures [n, 3, h, w]."""
    pixels = pictures.transpose(0, 2, 3, 1).reshape(-1, 3)
    pixels = pixels[(pixels < 250).any(axis=1)]
    return colour_shares(pixels, np.ones(len(pixels)))
