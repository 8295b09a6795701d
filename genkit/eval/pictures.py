"""Where the pictures of an evaluation come from: folders, archives, tables, arrays, and pipelines that make them.

A source knows how many pictures it has and reads any of them as 8-bit RGB. Pictures are read one at a time: never are all of them in memory
or on disk.

What is not plain RGB is converted where no choice is involved (grey, palette, CMYK: counted and reported), and refused where one is:
transparency needs a background, 16-bit and float pictures a conversion that the user decides on, animations a frame.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genkit.checks import choose, shorten
from genkit.data.images import SUFFIXES, find_pictures
from genkit.data.views import ViewDataset, open_rows

if TYPE_CHECKING:
    from PIL import Image

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
BACKGROUNDS = ("white", "black", "drop")
PLAIN = {"L": "grey", "1": "grey", "P": "palette", "CMYK": "CMYK"}


class PictureError(ValueError):
    """A picture that cannot be used, with the reason."""


@dataclass
class Picture:
    """One picture.

    Attributes:
        pixels: [h, w, 3] uint8.
        name: where it lies.
        label: its class, or "".
        conversion: what was converted ("grey", "palette", ...), or "".
    """

    pixels: Pixels
    name: str
    label: str = ""
    conversion: str = ""


def to_pixels(picture: Image.Image, background: str | None = None) -> tuple[Pixels, str]:
    """Turn a decoded picture into 8-bit RGB and say what was converted.

    Args:
        picture: of any mode.
        background: colour behind transparent parts ("white", "black"), or "drop" to ignore transparency; None refuses it.

    Raises:
        PictureError: for transparency without a background, more than 8 bits, or several frames.
    """
    from PIL import Image

    if getattr(picture, "n_frames", 1) > 1:
        raise PictureError(f"has {picture.n_frames} frames; save the frame to evaluate as a picture")  # type: ignore[attr-defined]
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        if background is None:
            raise PictureError("is transparent; choose --background white, black or drop")
        rgba = picture.convert("RGBA")
        if background != "drop":
            rgba = Image.alpha_composite(Image.new("RGBA", picture.size, background), rgba)
        return np.asarray(rgba.convert("RGB")), f"transparent ({background})"
    if picture.mode == "RGB":
        return np.asarray(picture), ""
    if picture.mode not in PLAIN:
        raise PictureError(f"has mode {picture.mode} (more than 8 bits, or no colours that can be shown); save it as 8-bit RGB")
    return np.asarray(picture.convert("RGB")), PLAIN[picture.mode]


def decode(data: bytes | Path, name: str, background: str | None) -> tuple[Pixels, str]:
    """Decode a picture file.

    Raises:
        PictureError: if it is truncated, corrupt or not usable; names it.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(data if isinstance(data, Path) else io.BytesIO(data)) as opened:
            return to_pixels(opened, background)
    except PictureError as error:
        raise PictureError(f"{name} {error}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        raise PictureError(f"{name} cannot be decoded ({error})") from error


class Source(ABC):
    """Pictures in a fixed order.

    Attributes:
        name: what the user gave.
        in_workers: whether `read` may run in worker processes.
    """

    name: str
    in_workers = True

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of pictures."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash (hex) that changes when the pictures do."""

    @abstractmethod
    def read(self, index: int) -> Picture:
        """Return a picture.

        Raises:
            PictureError: if it cannot be used.
        """

    def read_many(self, indices: Sequence[int]) -> list[Picture]:
        """Return several pictures; sources that make them do it at once."""
        return [self.read(i) for i in indices]


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


class FolderSource(Source):
    """Picture files below a folder at any depth, sorted by path; the folder a picture lies in is its label."""

    def __init__(self, path: Path, background: str | None = None) -> None:
        self.name, self.path, self.background = str(path), path, background
        self.files = find_pictures(path)
        if not self.files:
            other = sorted({file.suffix.lower() or "no suffix" for file in path.rglob("*") if file.is_file()})
            raise FileNotFoundError(
                f"{str(path)!r} holds no pictures: expected {', '.join(SUFFIXES)} at any depth, "
                f"found files with {shorten(other) or 'nothing'}."
            )

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        stats = ((file.relative_to(self.path).as_posix(), file.stat()) for file in self.files)
        return _digest([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats], self.background)

    def read(self, index: int) -> Picture:
        file = self.files[index]
        pixels, conversion = decode(file, str(file), self.background)
        return Picture(pixels, file.relative_to(self.path).as_posix(), file.parent.name if file.parent != self.path else "", conversion)


class ArchiveSource(Source):
    """Picture files in zip archives and uncompressed tar shards, in the order of their names; no unpacking."""

    def __init__(self, paths: Sequence[Path], background: str | None = None) -> None:
        self.paths, self.background, self.name = list(paths), background, ", ".join(map(str, paths))
        self.members: list[tuple[int, str, int, int]] = []  # archive, name, offset and size (tar)
        for number, path in enumerate(self.paths):
            self.members += [(number, *member) for member in sorted(_members(path))]
        if not self.members:
            raise FileNotFoundError(f"{self.name} hold no pictures: expected {', '.join(SUFFIXES)} inside.")
        self._open: dict[tuple[int, int], zipfile.ZipFile] = {}

    def __len__(self) -> int:
        return len(self.members)

    def fingerprint(self) -> str:
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
        return _digest(stats, self.members, self.background)

    def read(self, index: int) -> Picture:
        number, member, offset, size = self.members[index]
        path, key = self.paths[number], (os.getpid(), number)
        if path.suffix == ".zip":
            archive = self._open.setdefault(key, zipfile.ZipFile(path))  # a handle per process: workers must not share one
            try:
                data = archive.read(member)
            except (zipfile.BadZipFile, OSError, RuntimeError) as error:
                raise PictureError(f"{path}/{member} cannot be read ({error})") from error
        else:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        pixels, conversion = decode(data, f"{path}/{member}", self.background)
        return Picture(pixels, f"{path.name}/{member}", Path(member).parent.name, conversion)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


def _members(path: Path) -> list[tuple[str, int, int]]:
    """Return (name, offset, size) of the pictures in an archive.

    Raises:
        ValueError: if the archive is damaged or a compressed tar.
    """
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                return [(name, 0, 0) for name in archive.namelist() if name.lower().endswith(SUFFIXES)]
        with tarfile.open(path, "r:") as shard:
            return [(m.name, m.offset_data, m.size) for m in shard if m.isfile() and m.name.lower().endswith(SUFFIXES)]
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise ValueError(f"{str(path)!r} is no zip archive or uncompressed tar ({error}); unpack it or write it again.") from error


class ArraySource(Source):
    """Pictures in an array [n, h, w, 3] uint8: a `.npy`, or `arr_0` (or the only array) of an `.npz`, mapped where not compressed."""

    def __init__(self, path: Path) -> None:
        self.name, self.path = str(path), path
        self.array, self.labels = open_array(path)
        shape, dtype = self.array.shape, self.array.dtype
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
            raise ValueError(f"{str(path)!r}: pictures must be uint8 [n, h, w, 3], got {dtype} {list(shape)}.")
        if not len(self.array):
            raise ValueError(f"{str(path)!r} holds no pictures.")

    def __len__(self) -> int:
        return len(self.array)

    def fingerprint(self) -> str:
        stat = self.path.stat()
        return _digest(self.path.name, stat.st_size, stat.st_mtime_ns)

    def read(self, index: int) -> Picture:
        label = str(self.labels[index]) if self.labels is not None else ""
        return Picture(np.array(self.array[index]), f"{self.path.name}[{index}]", label)


def open_array(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """Return the pictures of a numpy file, memory-mapped if possible, and their labels (`arr_1`) if it has some."""
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False), None
        with np.load(path, allow_pickle=False) as file:
            names = list(file.files)
            name = "arr_0" if "arr_0" in names else names[0] if len(names) == 1 else None
            if name is None:
                raise ValueError(f"{str(path)!r} holds the arrays {shorten(names)}; pictures are expected under arr_0.")
            labels = file["arr_1"] if "arr_1" in names else None
            mapped = _map_member(path, f"{name}.npy")
            array = mapped if mapped is not None else file[name]
        return array, labels if labels is not None and len(labels) == len(array) else None
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ValueError(f"{str(path)!r} is no readable numpy file ({error}); it is corrupt or holds pickled objects.") from error


def _map_member(path: Path, member: str) -> np.ndarray[Any, Any] | None:
    """Map an uncompressed array inside an npz; None if it is compressed."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            header = file.tell()
    with path.open("rb") as raw:
        raw.seek(info.header_offset + 26)
        name_size, extra_size = np.frombuffer(raw.read(4), dtype="<u2").tolist()
    offset = info.header_offset + 30 + name_size + extra_size + header
    return None if fortran else np.memmap(path, dtype, "r", offset, shape)


class TableSource(Source):
    """Rows of a parquet file, a folder of them or a hub data set: the first column of pictures, and `label` if there is one."""

    def __init__(self, path: str | Path, split: str = "train", background: str | None = None) -> None:
        import datasets

        self.name, self.background = str(path), background
        rows, self._hash = open_rows(path, split)
        columns = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
        nested = [name for name, kind in rows.features.items() if isinstance(kind, dict) and {"bytes", "path"} <= kind.keys()]
        if not columns + nested:
            raise ValueError(f"{self.name!r} has no column of pictures; its columns are {shorten(list(rows.column_names))}.")
        self.column = (columns + nested)[0]
        labels = rows.features.get("label")
        self.label_names = getattr(labels, "names", None)
        self.has_label = labels is not None
        keep = [self.column, *(["label"] if self.has_label else [])]
        self.rows = rows.select_columns(keep).cast_column(self.column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        return _digest(self._hash, self.column, self.background)

    def read(self, index: int) -> Picture:
        row = self.rows[index]
        cell, name = row[self.column], f"{self.name}[{index}]"
        if cell is None:
            raise PictureError(f"{name} is empty")
        pixels, conversion = decode(cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]), name, self.background)
        label = row.get("label")
        text = "" if label is None else self.label_names[label] if self.label_names and isinstance(label, int) else str(label)
        return Picture(pixels, name, text, conversion)


class ViewSource(Source):
    """Turntable views of a parquet file with a `views` column, each a picture; the caption is the label."""

    def __init__(self, path: str | Path, size: int, views: Sequence[int] | None = None) -> None:
        self.name, self.views = str(path), ViewDataset(path, size)
        self.rows = self.views.rows_of(views)

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        every = len(self.rows) == len(self.views)
        return _digest(self.views.data_hash, "views") if every else _digest(self.views.data_hash, "views", self.rows)

    def read(self, index: int) -> Picture:
        row = self.rows[index]
        pixels = np.ascontiguousarray(self.views.images_u8[row].transpose(1, 2, 0))
        return Picture(pixels, f"{self.name}[{row}]", self.views.captions[self.views.object_of(row)])


class PipelineSource(Source):
    """Pictures that a pipeline makes: picture i belongs to seed + i and prompt i modulo the number of prompts.

    Args:
        pipe: a text- or class-to-picture pipeline.
        name: of the model.
        count: pictures to make.
        prompts: texts or class names; for class models all classes in turn if None.
        seed: of the first picture.
        options: of the pipeline's call.
        quantize: "round" or "truncate" to 8 bits.
    """

    in_workers = False

    def __init__(
        self,
        pipe: Any,
        name: str,
        count: int,
        prompts: Sequence[str] | None = None,
        seed: int = 0,
        options: dict[str, Any] | None = None,
        quantize: str = "round",
    ) -> None:
        if count < 2:
            raise ValueError(f"--num-samples must be at least 2, got {count}.")
        labels = getattr(pipe.config, "id2label", None)
        if prompts is None and not labels:
            raise ValueError(f"{name!r} makes pictures from text: give prompts with --prompts FILE, one per line.")
        self.prompts = list(prompts) if prompts is not None else [str(value) for value in dict(labels or {}).values()]
        if not self.prompts:
            raise ValueError("the list of prompts is empty.")
        self.name, self.pipe, self.count, self.seed = name, pipe, count, seed
        self.options, self.quantize = options or {}, quantize

    def __len__(self) -> int:
        return self.count

    def fingerprint(self) -> str:
        import torch

        digest = hashlib.sha256()
        for part in sorted(self.pipe.components):
            module = self.pipe.components[part]
            if isinstance(module, torch.nn.Module):
                for key, value in sorted(module.state_dict().items()):
                    digest.update(f"{part}.{key}".encode())
                    digest.update(value.detach().float().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        config = {key: value for key, value in dict(self.pipe.config).items() if not isinstance(value, tuple | list)}
        scheduler = dict(self.pipe.scheduler.config) if hasattr(self.pipe, "scheduler") else {}
        return _digest(digest.hexdigest(), str(config), str(scheduler), self.prompts, self.count, self.seed, self.options, self.quantize)

    def read(self, index: int) -> Picture:
        return self.read_many([index])[0]

    def read_many(self, indices: Sequence[int]) -> list[Picture]:
        prompts = [self.prompts[i % len(self.prompts)] for i in indices]
        images = self.pipe(prompts, generator=[self.seed + i for i in indices], output_type="pt", **self.options).images
        scaled = (images.float().clamp(-1, 1) + 1) * 127.5
        pixels = (scaled if self.quantize == "truncate" else scaled.round()).byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Picture(p, f"{self.name}, seed {self.seed + i}", prompt) for p, i, prompt in zip(pixels, indices, prompts, strict=True)]


def open_source(
    path: str | Path,
    *,
    background: str | None = None,
    split: str = "train",
    view_size: int = 64,
    views: Sequence[int] | None = None,
) -> Source:
    """Open pictures by what is at the path.

    Args:
        path: folder of pictures; `.zip`, `.tar`, `.npy`, `.npz`, `.parquet` file; folder of tar shards or parquet files; hub id.
        background: for transparent pictures, see `to_pixels`.
        split: of a hub data set or a folder of parquet files.
        view_size: turntable views are reduced to this side, in pixels.
        views: which of a turntable's views, 0 the front; all if None. Other pictures have none.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if what is there cannot be read as pictures.
    """
    found = _open(path, background, split, view_size, views)
    if views is not None and not isinstance(found, ViewSource):
        raise ValueError(f"views={list(views)} choose turntable views, but {str(path)!r} holds single pictures; leave it out.")
    return found


def _open(path: str | Path, background: str | None, split: str, view_size: int, views: Sequence[int] | None) -> Source:
    """Open pictures by what is at the path, see `open_source`."""
    if background is not None:
        choose(background, BACKGROUNDS, "background")
    local = Path(path).expanduser()
    if local.is_dir():
        if find_pictures(local):
            return FolderSource(local, background)
        archives = sorted(file for file in local.iterdir() if file.suffix in (".tar", ".zip"))
        if archives:
            return ArchiveSource(archives, background)
        if next(local.rglob("*.parquet"), None) is None:
            return FolderSource(local, background)  # which says what is missing
    elif local.suffix in (".zip", ".tar") and local.is_file():
        return ArchiveSource([local], background)
    elif local.suffix in (".npy", ".npz") and local.is_file():
        return ArraySource(local)
    elif local.is_file() and local.suffix != ".parquet":
        raise ValueError(
            f"{str(path)!r}: pictures come from a folder, .zip, .tar, .npy, .npz, .parquet or a hub id, got a {local.suffix} file."
        )
    elif not local.exists() and (local.is_absolute() or local.suffix or str(path).count("/") != 1):
        raise FileNotFoundError(f"{str(path)!r} does not exist; give a folder, archive, array, parquet file or hub id (owner/name).")
    return _open_table(path, split, background, view_size, views)


def _open_table(path: str | Path, split: str, background: str | None, view_size: int, views: Sequence[int] | None) -> Source:
    rows, _ = open_rows(path, split)
    if "views" in rows.column_names and "caption" in rows.column_names:
        return ViewSource(path, view_size, views)
    return TableSource(path, split, background)
