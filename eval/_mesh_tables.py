"""What the evaluations of meshes share: choice of meshes, cells with intervals, sheets of renders."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkit.cli._pictures import grid
from genkit.data.rendering import turntable
from genkit.data.shape_samples import meshes_of
from genkit.eval.assets import bootstrap_mean

SHEET_COLUMNS, SHEET_SIZE, SHEET_VIEW = 8, 128, 2


def spread(data: str, count: int) -> list[Any]:
    """Return so many meshes, evenly spread over a data set."""
    items = meshes_of(data)
    return [items[i][1]() for i in np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int))]


def cell(values: list[float], digits: int = 4) -> str:
    """Return the mean of values with its 95 % interval, bootstrap over shapes."""
    estimate = bootstrap_mean(torch.tensor(values, dtype=torch.float64), range(len(values)))
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def sheet(path: Path, rows: list[list[Any]], wireframe: tuple[bool, ...] | None = None) -> None:
    """Write renders of lists of meshes below each other, a column per shape.

    Args:
        path: picture to write.
        rows: lists of equal length.
        wireframe: which rows show their edges; none if None.
    """
    pictures = []
    edges = wireframe or (False,) * len(rows)
    for start in range(0, len(rows[0]), SHEET_COLUMNS):
        for row, has_edges in zip(rows, edges, strict=True):
            shown = [turntable(mesh, 16, SHEET_SIZE, wireframe=has_edges)[SHEET_VIEW] for mesh in row[start : start + SHEET_COLUMNS]]
            blank = shown[0].point(lambda _: 255)
            pictures += shown + [blank] * (SHEET_COLUMNS - len(shown))
    grid(pictures, SHEET_COLUMNS).save(path)
