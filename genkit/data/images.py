"""Pictures of a user's own: a folder of picture files, or any picture data that `open_dataset` recognises."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from genkit.data.views import ViewDataset, box_reduce, to_rgb

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = ("metadata.csv", "metadata.jsonl")


def find_pictures(folder: Path) -> list[Path]:
    """Return the picture files below a folder, sorted by path; hidden files and folders are left out."""
    files = (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def read_captions(folder: Path) -> dict[str, str] | None:
    """Read captions by relative file name from metadata.csv or metadata.jsonl (`file_name`, and `caption` or `text`).

    Returns:
        None if the folder has neither file.

    Raises:
        ValueError: if the file lacks a column or is no table; names the line.
    """
    path = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if path is None:
        return None
    captions: dict[str, str] = {}
    with path.open(encoding="utf-8", newline="") as file:
        try:
            rows = list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file if line.strip()]
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON lines: {error}.") from error
    for number, row in enumerate(rows, start=1):
        name, caption = row.get("file_name"), row.get("caption", row.get("text"))
        if not name or caption is None:
            raise ValueError(f"{path}, entry {number}: needs file_name and caption (or text), got the fields {sorted(map(str, row))}.")
        captions[str(name)] = str(caption)
    return captions


def read_square(path: Path, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read a picture, crop the middle square and shrink it to size x size.

    The square is averaged over exact blocks where `size` divides its side; else resized with Lanczos. Smaller pictures are refused:
    enlarging them would teach a model blur.

    Returns:
        [3, size, size] uint8.

    Raises:
        ValueError: if the file is no picture or its shorter side is below `size`.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            picture = to_rgb(opened)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be decoded as a picture ({error}); remove or replace it.") from error
    side = min(picture.size)
    if side < size:
        raise ValueError(
            f"{path} is {picture.width}x{picture.height} pixels, smaller than size={size}; remove it or choose a smaller size."
        )
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    if side % size:
        return np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    return box_reduce(np.asarray(picture)[None], size)[0].transpose(2, 0, 1)


class ImageFolderDataset(Dataset[dict[str, Tensor]]):
    """Pictures (png, jpg, webp) below a folder, at any depth; item i is `{"image": float32 [3, size, size] in [-1, 1], "index": int64 []}`.

    Args:
        path: the folder. `metadata.csv` or `metadata.jsonl` in it gives captions; else a picture's own folder names it ("red_chairs" ->
            "red chairs"), and pictures right in `path` have the caption "".
        size: side of the pictures; the middle square is cut out and shrunk.

    Raises:
        FileNotFoundError: if there is no picture.
        ValueError: if the metadata names no caption for a picture.

    Attributes:
        files, captions: one entry per picture, sorted by path.
        data_hash: changes with names, sizes and times of the files and with `size`.
    """

    def __init__(self, path: str | Path, size: int = 64) -> None:
        folder = Path(path).expanduser()
        if size < 1:
            raise ValueError(f"ImageFolderDataset: size must be at least 1 pixel, got {size}.")
        self.files = find_pictures(folder)
        if not self.files:
            raise FileNotFoundError(f"{folder} holds no pictures; expected files ending in {', '.join(SUFFIXES)} at any depth.")
        self.size = size
        names = [file.relative_to(folder).as_posix() for file in self.files]
        written = read_captions(folder)
        if written is not None:
            lacking = [name for name in names if name not in written]
            if lacking:
                raise ValueError(f"{folder}: the metadata has no caption for {len(lacking)} pictures: {', '.join(lacking[:10])}.")
            self.captions = [written[name] for name in names]
        else:
            self.captions = ["" if file.parent == folder else file.parent.name.replace("_", " ") for file in self.files]
        stats = [(name, file.stat().st_size, file.stat().st_mtime_ns) for name, file in zip(names, self.files, strict=True)]
        self.data_hash = hashlib.sha256(repr((stats, size)).encode()).hexdigest()[:24]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"picture index {index} is outside 0..{len(self) - 1}.")
        pixels = torch.from_numpy(read_square(self.files[index], self.size).astype(np.float32))
        return {"image": pixels.div_(127.5).sub_(1.0), "index": torch.tensor(index)}


def open_dataset(path: str | Path, size: int = 64) -> ViewDataset | ImageFolderDataset:
    """Open training pictures by what is at the path.

    Args:
        path: a parquet file, a folder with parquet files or a hub id (turntable views, `ViewDataset`), or a folder of pictures.
        size: side of the pictures in pixels.

    Raises:
        FileNotFoundError: if nothing that can be read is there.
        ValueError: for a picture instead of a folder.
    """
    local = Path(path).expanduser()
    if local.suffix.lower() in SUFFIXES and not local.is_dir():
        if not local.exists():
            raise FileNotFoundError(f"there is no picture at {str(path)!r}, and no folder of pictures.")
        raise ValueError(f"{path} is a single picture; give the folder it lies in.")
    if local.is_dir() and next(local.rglob("*.parquet"), None) is None:
        return ImageFolderDataset(local, size)
    return ViewDataset(path, size)
