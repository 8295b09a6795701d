"""Turntable views stored as strips of square renders in a parquet data set (columns `views`, `caption`, `name`, `pack`)."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from genkit.data.files import atomic_write, file_hash
from genkit.paths import cache_dir

if TYPE_CHECKING:
    import datasets
    from numpy.typing import NDArray
    from PIL import Image

COLUMNS = ("views", "caption", "name", "pack")
_LAYOUT = "views-v1"  # part of the cache key: change it when the bytes of the cache change their meaning


def parquet_files(path: Path, split: str) -> list[Path]:
    """Return the parquet files of a split: the file itself, or in a folder those whose name starts with the split.

    Raises:
        FileNotFoundError: if there is none; lists the files that are there.
    """
    if path.is_file():
        return [path]
    found = sorted(path.rglob("*.parquet"))
    files = [file for file in found if file.stem.split("-")[0] == split]
    if not files:
        listed = ", ".join(str(file.relative_to(path)) for file in found[:10]) or "none"
        raise FileNotFoundError(f"{path} has no parquet file named {split}.parquet or {split}-*.parquet; parquet files there: {listed}.")
    return files


def open_rows(path: str | Path, split: str = "train", cache: Path | None = None) -> tuple[datasets.Dataset, str]:
    """Open a parquet file, a folder of them or a hub id.

    Args:
        path: what to open.
        split: which split of a folder or hub data set; a single file is taken as it is.
        cache: where `datasets` keeps its copy; its own default if None.

    Returns:
        The rows, and a hash that changes when the data changes.
    """
    import datasets

    local = Path(path).expanduser()
    copy = str(cache / "datasets") if cache is not None else None
    if local.exists():
        files = parquet_files(local, split)
        rows = datasets.load_dataset("parquet", data_files={"data": [str(file) for file in files]}, split="data", cache_dir=copy)
        return rows, file_hash(files)
    if local.is_absolute() or local.suffix == ".parquet" or str(path).count("/") > 1:
        raise FileNotFoundError(
            f"data path {str(path)!r} does not exist; give a parquet file, a folder of parquet files or a hub id owner/name."
        )
    rows = datasets.load_dataset(str(path), split=split, cache_dir=copy)
    return rows, hashlib.sha256(f"{path}:{split}:{rows._fingerprint}".encode()).hexdigest()[:32]


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture to RGB; transparent parts become white."""
    from PIL import Image

    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def box_reduce(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Shrink square pictures by averaging exact blocks of pixels, rounded to the nearest integer (halves up).

    Args:
        pixels: [n, s, s, 3] with s a multiple of `size`.
        size: side of the result.

    Returns:
        [n, size, size, 3].
    """
    side = pixels.shape[1]
    if side % size:
        raise ValueError(
            f"views of {side}x{side} pixels cannot be averaged down to size={size}: it must divide {side}; choose another size."
        )
    step = side // size
    if step == 1:
        return pixels
    blocks = pixels.reshape(len(pixels), size, step, size, step, 3).sum(axis=(2, 4), dtype=np.uint32)
    return ((blocks + step * step // 2) // (step * step)).astype(np.uint8)


def split_strip(encoded: dict[str, Any] | None, row: int, size: int) -> NDArray[np.uint8]:
    """Decode a strip of square renders and cut and shrink it.

    Args:
        encoded: `{"bytes", "path"}` as `datasets` stores an undecoded picture.
        row: row of the data set, for messages.
        size: side of the result.

    Returns:
        [num_views, 3, size, size] uint8.

    Raises:
        ValueError: if the picture is missing or broken, its width is no multiple of its height, or `size` does not divide its height.
    """
    from PIL import Image

    data = encoded.get("bytes") if encoded else None
    source = encoded.get("path") if encoded else None
    if data is None and not source:
        raise ValueError(f"row {row}: column 'views' is empty; every row needs a picture, remove the row or render it.")
    try:
        picture = to_rgb(Image.open(str(source) if data is None else io.BytesIO(data)))
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"row {row}: column 'views' holds a picture that cannot be decoded ({error}); write it again as PNG or WebP."
        ) from error
    width, height = picture.size
    if width % height:
        raise ValueError(
            f"row {row}: column 'views' must be square renders side by side (width a multiple of height), got {width}x{height} pixels."
        )
    pixels = np.asarray(picture).reshape(height, width // height, height, 3).transpose(1, 0, 2, 3)
    try:
        return box_reduce(pixels, size).transpose(0, 3, 1, 2)
    except ValueError as error:
        raise ValueError(f"row {row}: {error}") from error


class ViewDataset(Dataset[dict[str, Tensor]]):
    """All views of all objects as one list of pictures; view v of n is seen from azimuth 360 v / n degrees.

    Pictures are decoded once into a memory-mapped uint8 file, so that items cost microseconds and processes share memory.
    Item i is `{"image": float32 [3, size, size] in [-1, 1], "index": int64 []}`.

    Args:
        path: parquet file, folder of parquet files or hub id, with the columns `views`, `caption`, `name`, `pack`.
        size: side of the pictures in pixels; must divide the side of the stored renders (area average).
        split: split of a folder or hub data set.
        cache: folder of the decoded pictures; `genkit.paths.cache_dir()` if None.

    Raises:
        ValueError: if a column is missing, a picture is broken, or the size does not divide the renders.

    Attributes:
        captions, names, packs: one entry per object.
        num_views: number of views of all objects together (= `len`); `num_objects` counts the objects.
        data_hash: changes with the data and the size.
        rows: the underlying `datasets.Dataset`, one row per object (may have `vertices`, `faces`, `face_colors`).
    """

    def __init__(self, path: str | Path, size: int = 64, split: str = "train", cache: str | Path | None = None) -> None:
        import datasets

        if size < 1:
            raise ValueError(f"ViewDataset: size must be at least 1 pixel, got {size}.")
        folder = Path(cache).expanduser() if cache is not None else None
        rows, content = open_rows(path, split, folder)
        missing = [name for name in COLUMNS if name not in rows.column_names]
        if missing:
            raise ValueError(
                f"ViewDataset: {path} lacks the columns {missing}; it has {rows.column_names}. Each row needs a strip of renders ('views') "
                "and the texts 'caption', 'name' and 'pack'."
            )
        if not len(rows):
            raise ValueError(f"ViewDataset: {path} has no rows.")
        self.rows = rows.cast_column("views", datasets.Image(decode=False))
        self.size = size
        self.captions: list[str] = list(rows["caption"])
        self.names: list[str] = list(rows["name"])
        self.packs: list[str] = list(rows["pack"])
        self.data_hash = hashlib.sha256(f"{_LAYOUT}:{content}:{size}".encode()).hexdigest()[:24]
        folder = folder or cache_dir()
        self._pixels: NDArray[np.uint8] | None = None
        self.cache_file = folder / f"views-{self.data_hash}.npy"
        counts_file = folder / f"views-{self.data_hash}.counts.npy"
        if not (self.cache_file.is_file() and counts_file.is_file()):
            self._decode(self.cache_file, counts_file)
        counts = np.load(counts_file)
        self._object = np.repeat(np.arange(len(counts)), counts)
        self._first = np.concatenate([[0], np.cumsum(counts)])

    def _decode(self, target: Path, counts_target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        strips = [split_strip(row["views"], i, self.size) for i, row in enumerate(self.rows.select_columns(["views"]))]
        for path, array in ((counts_target, np.array([len(s) for s in strips], dtype=np.int64)), (target, np.concatenate(strips))):
            with atomic_write(path) as file:
                np.save(file, array)

    @property
    def images_u8(self) -> NDArray[np.uint8]:
        """All pictures, memory-mapped, read-only, uint8 [num_views, 3, size, size]."""
        if self._pixels is None:
            self._pixels = np.load(self.cache_file, mmap_mode="r")
        return self._pixels

    @property
    def num_objects(self) -> int:
        """Number of objects (rows)."""
        return len(self._first) - 1

    @property
    def num_views(self) -> int:
        """Number of views of all objects together."""
        return len(self._object)

    def __len__(self) -> int:
        return self.num_views

    def object_of(self, index: int) -> int:
        """Return the object (row) that view `index` shows."""
        return int(self._object[index])

    def view_of(self, index: int) -> int:
        """Return which of its object's views `index` is, counted from 0 (azimuth 0)."""
        return int(index - self._first[self._object[index]])

    def azimuth_of(self, index: int) -> float:
        """Return the azimuth of view `index` in degrees; 0 looks at the front, 90 at the side that faces +x."""
        first, last = self._first[self._object[index]], self._first[self._object[index] + 1]
        return 360.0 * (index - first) / (last - first)

    def views_of(self, object_index: int) -> range:
        """Return the view indices of an object, in order of azimuth."""
        return range(int(self._first[object_index]), int(self._first[object_index + 1]))

    def picture(self, object_index: int, view: int) -> Image.Image:
        """Return view `view` of an object, 0 the front.

        Raises:
            IndexError: if there is no such object or view.
        """
        from PIL import Image

        if not 0 <= object_index < self.num_objects or not 0 <= view < len(self.views_of(object_index)):
            raise IndexError(f"there is no view {view} of object {object_index}; there are {self.num_objects} objects.")
        return Image.fromarray(self.images_u8[self.views_of(object_index)[view]].transpose(1, 2, 0))

    def rows_of(self, views: Sequence[int] | None) -> list[int]:
        """Return the indices of the pictures that show one of some views, 0 the front; all if None.

        Raises:
            ValueError: if there is no such view.
        """
        if views is None:
            return list(range(len(self)))
        most = max(len(self.views_of(thing)) for thing in range(self.num_objects))
        if not views or any(not 0 <= view < most for view in views):
            raise ValueError(f"views must be numbers from 0 to {most - 1}, at least one, got {list(views)}.")
        chosen = set(views)
        return [row for row in range(len(self)) if self.view_of(row) in chosen]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"view index {index} is outside 0..{len(self) - 1}.")
        pixels = torch.from_numpy(self.images_u8[index].astype(np.float32))
        return {"image": pixels.div_(127.5).sub_(1.0), "index": torch.tensor(index)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # a worker process maps the file again instead of receiving its contents
