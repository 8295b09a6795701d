"""Clips to learn from: turntables of a parquet set, columns and shards of encoded clips, folders, arrays, and moving sprites.

Item i of every data set here is {"frames": float32 [f, c, h, w] in [-1, 1], "index": int64 []}; nothing is drawn at random while reading,
so that a resumed training sees the same clips.

Letters: n clips, f frames, c channels, h w rows and columns.
"""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from genkit.data.moving_sprites import MovingSprites
from genkit.data.video_files import ANIMATED, FILMS, iterate_clip
from genkit.data.views import ViewDataset, box_reduce, open_rows, to_rgb

if TYPE_CHECKING:
    from numpy.typing import NDArray

CLIP_FILES = (*ANIMATED, *FILMS)
COLUMNS = ("clip", "video", "gif", "webp", "mp4", "webm")


class ClipDataset(Dataset[dict[str, Tensor]]):
    """What the data sets of clips share.

    Attributes:
        captions: one per clip, "" where there is none.
        channels: c.
        is_closed: frames form a closed turn, so that a clip may begin at any of them.
        frames: of an item.
    """

    captions: Sequence[str]
    channels = 3
    is_closed = False
    frames: int

    def read(self, index: int) -> NDArray[np.uint8]:
        """Return a clip [f, c, h, w]."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"clip index {index} is outside 0..{len(self) - 1}.")
        pixels = torch.from_numpy(self.read(index).astype(np.float32))
        return {"frames": pixels.div_(127.5).sub_(1.0), "index": torch.tensor(index)}


class TurntableClips(ClipDataset):
    """The views of every object in order, a closed turn.

    Args:
        views: the views.
        frames: f, the number of views of every object.

    Raises:
        ValueError: if an object has another number of views.
    """

    is_closed = True

    def __init__(self, views: ViewDataset, frames: int) -> None:
        counts = {len(views.views_of(thing)) for thing in range(views.num_objects)}
        if counts != {frames}:
            raise ValueError(f"turntables have {sorted(counts)} views, the clips {frames} frames; set num_frames to the number of views.")
        self.views, self.frames, self.captions = views, frames, views.captions

    def read(self, index: int) -> NDArray[np.uint8]:
        """Return all views of an object."""
        rows = self.views.views_of(index)
        return np.asarray(self.views.images_u8[rows.start : rows.stop])


class FileClips(ClipDataset):
    """Windows over clip files, or over folders of frames.

    Args:
        path: folder of clip files (GIF, WebP, APNG, films) or of folders of frames; the name is the caption ("red_car" -> "red car").
        size: side of the frames: the middle square is cut out and shrunk.
        frames: f of a window.
        stride: step between frames.

    Raises:
        FileNotFoundError: if there is no clip.
        ValueError: if no clip is long enough.
    """

    def __init__(self, path: str | Path, size: int, frames: int, stride: int = 1) -> None:
        folder = Path(path).expanduser()
        items = sorted(item for item in folder.iterdir() if item.is_dir() or item.suffix.lower() in CLIP_FILES)
        if not items:
            raise FileNotFoundError(f"{str(path)!r} holds no clips; expected {', '.join(CLIP_FILES)} files or folders of frames.")
        self.size, self.frames, self.stride = size, frames, stride
        lengths = [sum(1 for _ in iterate_clip(item)) for item in items]
        self.windows = windows_of(lengths, frames, stride, str(path))
        self.items = items
        self.captions = [items[item].stem.replace("_", " ") for item, _ in self.windows]

    def read(self, index: int) -> NDArray[np.uint8]:
        """Return the frames of a window."""
        item, start = self.windows[index]
        stop = start + (self.frames - 1) * self.stride + 1
        found = [frame for frame, _ in islice(iterate_clip(self.items[item]), start, stop, self.stride)]
        return square_frames(np.stack(found), self.size, str(self.items[item]))


class EncodedClips(ClipDataset):
    """Windows over clips that are stored as bytes of files in parquet rows or in tar shards (as WebDataset writes them).

    Args:
        rows: with one column of `COLUMNS` that holds bytes, or {"bytes", "path"}; a column `caption` or `txt` gives captions.
        size, frames, stride: see `FileClips`.
        source: of the rows, for messages.

    Raises:
        ValueError: if there is no such column, or no clip is long enough.
    """

    def __init__(self, rows: Any, size: int, frames: int, stride: int, source: str) -> None:
        column = next((name for name in COLUMNS if name in rows.column_names), None)
        if column is None:
            raise ValueError(f"{source}: clips are in a column {', '.join(COLUMNS)}; it has {rows.column_names}.")
        self.rows, self.column, self.size, self.frames, self.stride, self.source = rows, column, size, frames, stride, source
        lengths = [sum(1 for _ in self._frames(i)) for i in range(len(rows))]
        self.windows = windows_of(lengths, frames, stride, source)
        text = next((name for name in ("caption", "txt") if name in rows.column_names), None)
        captions = list(rows[text]) if text else [""] * len(rows)
        self.captions = [captions[row] for row, _ in self.windows]

    def _frames(self, row: int) -> Any:
        """Yield the frames of a row, through a file aside: films are read by seeking."""
        value = self.rows[row][self.column]
        data = value["bytes"] if isinstance(value, dict) else value
        if not isinstance(data, bytes) or not data:
            raise ValueError(f"{self.source}, row {row}: column {self.column!r} holds no bytes; write the clip's file into it.")
        with tempfile.NamedTemporaryFile(suffix=suffix_of(data)) as file:
            file.write(data)
            file.flush()
            yield from iterate_clip(file.name)

    def read(self, index: int) -> NDArray[np.uint8]:
        """Return the frames of a window."""
        row, start = self.windows[index]
        found = [frame for frame, _ in islice(self._frames(row), start, start + (self.frames - 1) * self.stride + 1, self.stride)]
        return square_frames(np.stack(found), self.size, f"{self.source}, row {row}")


class ArrayClips(ClipDataset):
    """Clips of an array file.

    Args:
        path: `.npy` of uint8: [n, f, h, w, 3], or [f, n, h, w] in grey, as the test set of Moving MNIST is published.
        frames: f; the first ones are taken.

    Raises:
        ValueError: for other arrays.
    """

    def __init__(self, path: str | Path, frames: int) -> None:
        self.array = np.load(path, mmap_mode="r", allow_pickle=False)
        grey = self.array.ndim == 4
        length = self.array.shape[0 if grey else 1] if self.array.ndim > 3 else 0
        if self.array.dtype != np.uint8 or self.array.ndim not in (4, 5) or (not grey and self.array.shape[4] != 3) or length < frames:
            got = f"{self.array.dtype} {list(self.array.shape)}"
            raise ValueError(f"{str(path)!r} must be uint8 [n, f, h, w, 3] or [f, n, h, w] with at least {frames} frames, got {got}.")
        self.channels, self.frames = (1 if grey else 3), frames
        self.captions = [""] * self.array.shape[1 if grey else 0]

    def read(self, index: int) -> NDArray[np.uint8]:
        """Return the first frames of a clip."""
        if self.channels == 1:
            return np.asarray(self.array[: self.frames, index])[:, None]
        return np.asarray(self.array[index, : self.frames]).transpose(0, 3, 1, 2)


class SpriteClips(ClipDataset):
    """Sprites that bounce, by the protocol of Moving MNIST; see `MovingSprites`."""

    channels = 1

    def __init__(self, sprites: MovingSprites) -> None:
        self.sprites, self.frames = sprites, sprites.frames
        self.captions = _Same("", len(sprites))

    def read(self, index: int) -> NDArray[np.uint8]:
        """Return a sequence."""
        return self.sprites.sequence(index)[:, None]


class _Same(Sequence[str]):
    """One text as often as asked, in no memory."""

    def __init__(self, text: str, count: int) -> None:
        self.text, self.length = text, count

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        return self.text


def windows_of(lengths: Sequence[int], frames: int, stride: int, source: str) -> list[tuple[int, int]]:
    """Return (clip, first frame) of windows that overlap by half, the last one at the clip's end; clips that are too short give none.

    Raises:
        ValueError: if none is long enough, or sizes are impossible.
    """
    if frames < 1 or stride < 1:
        raise ValueError(f"clips need at least 1 frame and a stride of at least 1, got num_frames={frames} and stride={stride}.")
    need = (frames - 1) * stride + 1
    found = []
    for clip, length in enumerate(lengths):
        if length >= need:
            starts = {*range(0, length - need + 1, max(need // 2, 1)), length - need}
            found += [(clip, start) for start in sorted(starts)]
    if not found:
        raise ValueError(f"{source}: no clip has {need} frames; the longest of {len(lengths)} has {max(lengths, default=0)}.")
    return found


def square_frames(frames: NDArray[np.uint8], size: int, source: str) -> NDArray[np.uint8]:
    """Cut the middle square out of frames [f, h, w, 3] and shrink it to [f, 3, size, size].

    Raises:
        ValueError: if the frames are smaller.
    """
    from PIL import Image

    h, w = frames.shape[1:3]
    side = min(h, w)
    if side < size:
        raise ValueError(f"{source}: frames of {w}x{h} pixels are smaller than image_size={size}; choose a smaller size.")
    top, left = (h - side) // 2, (w - side) // 2
    square = frames[:, top : top + side, left : left + side]
    if side % size:
        resized = [np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.LANCZOS)) for frame in square]
        return np.stack(resized).transpose(0, 3, 1, 2)
    return box_reduce(square, size).transpose(0, 3, 1, 2)


def suffix_of(data: bytes) -> str:
    """Return the suffix of a clip's format by its first bytes."""
    if data[:4] == b"GIF8":
        return ".gif"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    return ".png" if data[:4] == b"\x89PNG" else ".webm" if data[:4] == b"\x1aE\xdf\xa3" else ".mp4"


def open_clips(path: str | Path, size: int, frames: int, stride: int = 1, split: str = "train") -> ClipDataset:
    """Open clips by what is at the path.

    Args:
        path: parquet file, folder of such or hub id (turntable strips in a column `views`, or clips as bytes); `.tar` shard or folder of
            them; folder of clip files or of folders of frames; `.npy` array.
        size: side of the frames in pixels; arrays keep theirs.
        frames: f.
        stride: step between frames; turntables and arrays have none.
        split: of a folder or hub data set.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: for clips that do not fit; names what is there.
    """
    import datasets

    local = Path(path).expanduser()
    if local.suffix == ".npy":
        if not local.is_file():
            raise FileNotFoundError(f"{str(path)!r} does not exist.")
        return ArrayClips(local, frames)
    shards = [local] if local.suffix == ".tar" else sorted(local.glob("*.tar")) if local.is_dir() else []
    if shards:
        rows = datasets.load_dataset("webdataset", data_files={"data": [str(shard) for shard in shards]}, split="data")
        for name in set(COLUMNS) & set(rows.column_names):
            if not isinstance(rows.features[name], datasets.Value):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        return EncodedClips(rows, size, frames, stride, str(path))
    if local.is_dir() and next(local.rglob("*.parquet"), None) is None:
        return FileClips(local, size, frames, stride)
    rows, _ = open_rows(path, split)
    if "views" in rows.column_names:
        return TurntableClips(ViewDataset(path, size, split), frames)
    return EncodedClips(rows, size, frames, stride, str(path))


def read_sprites(path: str | Path, side: int = 28) -> NDArray[np.uint8]:
    """Return sprites [k, side, side], bright on black, from digits that the user has.

    Args:
        path: IDX file as MNIST and Fashion-MNIST publish them (`...-idx3-ubyte`, also `.gz`), `.npy` [k, h, w], or a parquet file, folder
            of such or hub id with a column of pictures.
        side: sprites of another size are resized; coloured ones become grey, transparent parts black.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if it holds no pictures.
    """
    from PIL import Image

    local = Path(path).expanduser()
    if local.suffix == ".npy" or "idx3-ubyte" in local.name:
        array = np.load(local, allow_pickle=False) if local.suffix == ".npy" else read_idx(local)
        if array.ndim != 3 or array.dtype != np.uint8:
            raise ValueError(f"{str(path)!r} must be uint8 [k, h, w], got {array.dtype} {list(array.shape)}.")
        pictures = [Image.fromarray(picture) for picture in array]
    else:
        import datasets

        rows, _ = open_rows(path)
        names = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)] or ["image"]
        if names[0] not in rows.column_names:
            raise ValueError(f"{str(path)!r} has no column of pictures; it has {rows.column_names}.")
        listed = rows.select_columns(names[:1]).cast_column(names[0], datasets.Image())[names[0]]
        pictures = [on_black(picture) for picture in listed]
    sized = [p if p.size == (side, side) else p.resize((side, side), Image.Resampling.LANCZOS) for p in pictures]
    return np.stack([np.asarray(picture) for picture in sized])


def on_black(picture: Any) -> Any:
    """Return a picture in grey; what is transparent becomes black."""
    from PIL import Image

    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        whole = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", whole.size, "black"), whole).convert("L")
    return to_rgb(picture).convert("L")


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of uint8 pictures [k, h, w], plain or gzip.

    Raises:
        ValueError: if it is none.
    """
    raw = path.read_bytes()
    data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    header = np.frombuffer(data[:16].ljust(16, b"\0"), ">u4")
    if header[0] != 0x803 or len(data) != 16 + int(header[1]) * int(header[2]) * int(header[3]):
        raise ValueError(f"{str(path)!r} is no IDX file of pictures (magic number 0x00000803, three sizes, bytes).")
    return np.frombuffer(data, np.uint8, offset=16).reshape([int(n) for n in header[1:]])
