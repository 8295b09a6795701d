"""Pictures to files: a grid, single files, names from prompts, written whole or not at all."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

GAP = 2  # white pixels between the pictures of a grid


def file_name(prompt: str) -> str:
    """Return a file name without suffix for a prompt: `a-treasure-chest`; letters of every script stay.

    Example:
        >>> file_name("A treasure chest!")
        'a-treasure-chest'
    """
    words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")
    return words[:60].strip("-") or "picture"


def free_path(folder: Path, stem: str) -> Path:
    """Return `stem.png` in a folder, or the first of `stem-2.png`, `stem-3.png`, ... that is not taken."""
    path, number = folder / f"{stem}.png", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.png", number + 1
    return path


def grid(images: Sequence[Image], columns: int, width: int | None = None) -> Image:
    """Lay pictures out in rows.

    Args:
        images: pictures of one size.
        columns: pictures in a row.
        width: of each picture in the grid, in pixels, enlarged or reduced without smoothing; None keeps its own.

    Returns:
        One picture on white.
    """
    from PIL import Image

    w, h = images[0].size
    if width is not None:
        w, h = width, round(h * width / w)
        images = [image.resize((w, h), Image.Resampling.NEAREST) for image in images]
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (w + GAP) - GAP, rows * (h + GAP) - GAP), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * (w + GAP), index // columns * (h + GAP)))
    return sheet


def save_png(image: Image, path: Path, notes: Mapping[str, str]) -> None:
    """Write a PNG beside its place and move it there when it is complete.

    Args:
        image: the picture.
        path: its file; an existing one is replaced.
        notes: text stored in the file, by keyword.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in notes.items():
        info.add_itxt(key, text)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, "PNG", pnginfo=info)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(aside, 0o666 & ~umask)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise
