"""Small data for tests: strips of renders in a parquet file as `datasets` writes it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CAPTIONS = ("chest gold", "table medium long", "chest gold")
PACKS = ("Dungeon-Remastered-1.0", "Furniture-Bits-1.0", "Dungeon-Remastered-1.0")


def encode(pixels: np.ndarray[Any, Any], form: str = "PNG") -> bytes:
    """Return the picture file of pixels [h, w, c]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def strips(num_objects: int = 3, side: int = 8, num_views: int = 4) -> np.ndarray[Any, Any]:
    """Return random strips [objects, side, views * side, 3]."""
    return np.random.default_rng(0).integers(0, 256, (num_objects, side, num_views * side, 3), dtype=np.uint8)


def write_views(path: Path, views: list[Any], **columns: list[Any]) -> Path:
    """Write a parquet file with pictures (pixels or encoded bytes) and the columns of a view data set."""
    import datasets

    count = len(views)
    encoded = [{"bytes": v if isinstance(v, bytes) else encode(v), "path": None} for v in views]
    content: dict[str, Any] = {
        "name": [f"asset_{i}" for i in range(count)],
        "pack": list(PACKS[:count]),
        "caption": list(CAPTIONS[:count]),
        "views": encoded,
        **columns,
    }
    content = {name: values for name, values in content.items() if values is not None}
    data = datasets.Dataset.from_dict(content)
    if "views" in content:
        data = data.cast_column("views", datasets.Image(decode=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    data.to_parquet(str(path))
    return path
