"""Pictures as shape generators take them: the object cut out, centred and scaled, then the tokens of a DINOv2 encoder.

Source: Hunyuan3D 2.0 (Tencent 2025, arXiv 2501.12202). As released, the box of an object lacks its last row and column.
Letters: b pictures, v views, h w rows and columns, s side, m tokens, d width of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from genkit.blocks.embeddings import sincos_1d
from genkit.checks import check_shape

VIEWS = ("front", "left", "back", "right")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
BORDER = 0.15
LEAST = 16  # pixels a side
PLAIN = 0.8  # share of the border that one colour fills


def object_rgba(image: Image.Image, tolerance: int = 12) -> NDArray[np.uint8]:
    """Return a picture's object as [h, w, 4] bytes: by its alpha where it has one, else what differs from the plain colour of its border.

    Args:
        image: any mode.
        tolerance: grey levels by which a background may vary.

    Raises:
        ValueError: for a picture under 16 pixels, one without a plain background, or one that shows nothing.
    """
    if min(image.size) < LEAST:
        raise ValueError(f"a picture of at least {LEAST} x {LEAST} pixels is needed, got {image.width} x {image.height}.")
    rgba = np.array(image.convert("RGBA"))
    if (rgba[..., 3] < 255).any():
        return rgba
    colours = rgba[..., :3].astype(np.int16)
    border = np.concatenate([colours[0], colours[-1], colours[:, 0], colours[:, -1]])
    background = np.median(border, axis=0)
    plain = (np.abs(border - background).max(1) <= tolerance).mean()
    if plain < PLAIN:
        raise ValueError(
            f"the picture has no plain background (its colour fills {100 * plain:.0f} % of the border, {100 * PLAIN:.0f} % are needed); "
            "cut the object out first, so that the rest is transparent."
        )
    rgba[..., 3] = np.where(np.abs(colours - background).max(2) > tolerance, 255, 0)
    if not rgba[..., 3].any():
        raise ValueError("the picture is of one colour; give one that shows an object.")
    return rgba


def area_weights(source: int, target: int) -> NDArray[np.float64]:
    """Return the matrix [target, source] that averages each target cell's stretch of the source: area resampling, both ways."""
    edges = np.arange(target + 1) * source / target
    cells = np.arange(source)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return overlap.clip(0) * target / source


def recentred(rgba: NDArray[np.uint8], border: float = BORDER) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Cut an object out by its alpha, scale it to a square with a border, on white.

    Args:
        rgba: [h, w, 4] bytes.
        border: share of the side that stays free.

    Returns:
        Picture [s, s, 3] and alpha [s, s, 1] of the square, s the longer side.

    Raises:
        ValueError: for other shapes, a picture that is transparent everywhere, or an object of one row or column.
    """
    if rgba.ndim != 3 or rgba.shape[2] != 4 or rgba.dtype != np.uint8:
        raise ValueError(f"recentred: a picture [h, w, 4] of bytes is needed, got {list(rgba.shape)} {rgba.dtype}.")
    rows, columns = (np.flatnonzero((rgba[..., 3] > 0).any(axis)) for axis in (1, 0))
    if not len(rows):
        raise ValueError("the picture is transparent everywhere; give one that shows an object.")
    top, bottom, left, right = rows[0], rows[-1], columns[0], columns[-1]
    if bottom == top or right == left:
        raise ValueError(f"the object is {right - left + 1} x {bottom - top + 1} pixels; give a larger picture of it.")
    part = rgba[top:bottom, left:right].astype(np.float64)
    side = max(rgba.shape[:2])
    factor = int(side * (1 - border)) / max(part.shape[:2])
    height, width = (max(1, int(length * factor)) for length in part.shape[:2])
    part = np.einsum("ia,jb,abc->ijc", area_weights(part.shape[0], height), area_weights(part.shape[1], width), part, optimize=True)
    canvas = np.zeros((side, side, 4))
    y, x = (side - height) // 2, (side - width) // 2
    canvas[y : y + height, x : x + width] = part.round().clip(0, 255)
    alpha = canvas[..., 3:] / 255
    return (canvas[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8), canvas[..., 3:].astype(np.uint8)


def to_condition(picture: NDArray[np.uint8], size: int) -> Tensor:
    """Return a picture or mask [s, s, c] of bytes as [1, c, size, size] in [-1, 1]: cubic for colours, nearest for a mask."""
    tensor = torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)[None]
    if picture.shape[2] == 1:
        resized = F.interpolate(tensor, size=(size, size), mode="nearest")
    else:
        resized = F.interpolate(tensor, size=(size, size), mode="bicubic", align_corners=False).round().clamp(0, 255)
    return resized / 255 * 2 - 1


def dino_pixels(images: Tensor, size: int) -> Tensor:
    """Return what the encoder sees [b, 3, size, size] of pictures [b, 3, h, w] in [-1, 1]: the centre of the shorter side, normalised."""
    sizes = check_shape(images, "dino_pixels: images", "b c h w", c=3)
    factor = size / min(sizes["h"], sizes["w"])
    shape = tuple(size if length * factor <= size else int(length * factor) for length in (sizes["h"], sizes["w"]))
    pixels = (images.float() + 1) / 2
    if shape != (sizes["h"], sizes["w"]):
        pixels = F.interpolate(pixels, size=shape, mode="bilinear", antialias=True, align_corners=False)
    top, left = (round((length - size) / 2) for length in shape)
    pixels = pixels[..., top : top + size, left : left + size]
    mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


def encode_pictures(images: Tensor, encoder: Any, size: int | None = None, use_cls_token: bool = True) -> Tensor:
    """Return condition tokens [b, m, d] of pictures [b, 3, h, w] in [-1, 1].

    Args:
        images: the pictures.
        encoder: `transformers.Dinov2Model` or one like it.
        size: of its pictures; its configuration's if None.
        use_cls_token: keep the first token.
    """
    pixels = dino_pixels(images, encoder.config.image_size if size is None else size)
    tokens: Tensor = encoder(pixels.to(encoder.device, encoder.dtype)).last_hidden_state
    return tokens if use_cls_token else tokens[:, 1:]


def encode_views(images: Tensor, views: Sequence[int], encoder: Any, size: int | None = None, num_views: int = len(VIEWS)) -> Tensor:
    """Return condition tokens [b, v m, d] of several views of each object.

    Args:
        images: [b, v, 3, h, w] in [-1, 1].
        views: index of each view, 0 .. num_views - 1 (`VIEWS`); they are put in ascending order.
        encoder, size: as in `encode_pictures`.
        num_views: rows of the table of views.

    Raises:
        ValueError: for a wrong number of indices, one twice, or one out of range.
    """
    sizes = check_shape(images, "encode_views: images", "b v c h w", c=3)
    if len(views) != sizes["v"] or len(set(views)) != len(views) or not all(0 <= view < num_views for view in views):
        raise ValueError(
            f"encode_views: {sizes['v']} different views of 0 .. {num_views - 1} ({', '.join(VIEWS)}) are needed, got {list(views)}."
        )
    order = sorted(range(len(views)), key=lambda i: views[i])
    tokens = encode_pictures(images[:, order].flatten(0, 1), encoder, size).unflatten(0, (sizes["b"], sizes["v"]))
    table = sincos_1d(num_views, tokens.shape[-1])[sorted(views)].to(tokens)
    return (tokens + table[:, None]).flatten(1, 2)
