"""What the evaluations of meshes share: choice of meshes, cells with intervals, sheets of renders."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from genkit.cli._pictures import grid
from genkit.data.rendering import turntable
from genkit.data.shape_samples import meshes_of
from genkit.eval.assets import bootstrap_mean

SHEET_COLUMNS, SHEET_SIZE, SHEET_VIEWS, SHEET_VIEW = 8, 128, 16, 2


def named_options(option: str, text: str) -> tuple[str, dict[str, Any]]:
    """Return name and options of "flash" or "flash:head=slim,selection=mass".

    Raises:
        SystemExit: for options without a value.
    """
    name, _, rest = text.partition(":")
    pairs = [part.partition("=") for part in rest.split(",") if part]
    if any(not equals for _, equals, _ in pairs):
        raise SystemExit(f"{option} {text}: options are written name:option=value,option=value.")
    return name, {key: yaml.safe_load(value) for key, _, value in pairs}


def spread(data: str, count: int) -> list[Any]:
    """Return so many meshes, evenly spread over a data set."""
    items = meshes_of(data)
    return [items[i][1]() for i in np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int))]


def cell(values: list[float], digits: int = 4) -> str:
    """Return the mean of values with its 95 % interval, bootstrap over shapes; nothing for no values."""
    if not values:
        return ""
    estimate = bootstrap_mean(torch.tensor(values, dtype=torch.float64), range(len(values)))
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def sheet(path: Path, rows: list[list[Any]], wireframe: tuple[bool, ...] | None = None, pictures: list[Image.Image] | None = None) -> None:
    """Write renders of lists of meshes below each other, a column per shape.

    Args:
        path: picture to write.
        rows: lists of equal length; None leaves a place white.
        wireframe: which rows show their edges; none if None.
        pictures: of a row above the first.
    """
    blank, shown = Image.new("RGB", (SHEET_SIZE, SHEET_SIZE), "white"), []
    edges = wireframe or (False,) * len(rows)
    for start in range(0, len(rows[0]), SHEET_COLUMNS):
        columns = slice(start, start + SHEET_COLUMNS)
        lines = [] if pictures is None else [[picture.resize(blank.size, Image.Resampling.NEAREST) for picture in pictures[columns]]]
        lines += [
            [blank if mesh is None else view_of(mesh, has_edges) for mesh in row[columns]]
            for row, has_edges in zip(rows, edges, strict=True)
        ]
        for line in lines:
            shown += line + [blank] * (SHEET_COLUMNS - len(line))
    grid(shown, SHEET_COLUMNS).save(path)


def view_of(mesh: Any, wireframe: bool) -> Image.Image:
    """Draw a mesh from where the data's view `SHEET_VIEW` is seen."""
    return turntable(mesh, SHEET_VIEWS, SHEET_SIZE, wireframe=wireframe)[SHEET_VIEW]
