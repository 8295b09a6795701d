"""Clips on disk: GIF, WebP and APNG through Pillow, MP4 and other films through PyAV (extra `video`), folders of frames.

Letters: f frames, h w rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from genkit.data.images import find_pictures
from genkit.data.views import to_rgb

ANIMATED = (".gif", ".webp", ".png")
FILMS = (".mp4", ".webm", ".mov", ".mkv", ".avi")
Frames = np.ndarray[Any, np.dtype[np.uint8]]


def read_clip(path: str | Path) -> tuple[Frames, float | None]:
    """Return the frames [f, h, w, 3] uint8 of a clip and its frames per second, None where the file does not say.

    Args:
        path: animated picture, film, or folder of pictures in the order of their names; a single picture is one frame.

    Raises:
        FileNotFoundError: if nothing is there, or a folder holds no pictures.
        ValueError: if the file cannot be read, has no frames, or its frames differ in size.
        ImportError: if a film needs PyAV and it is missing.
    """
    frames, seconds = [], []
    for frame, duration in iterate_clip(path):
        frames.append(frame)
        seconds.append(duration)
    if not frames:
        raise ValueError(f"{str(path)!r} has no frames.")
    sizes = sorted({frame.shape[:2] for frame in frames})
    if len(sizes) > 1:
        raise ValueError(f"{str(path)!r}: frames differ in size (rows, columns): {sizes}; bring them to one size first.")
    known = len(frames) > 1 and sum(seconds) > 0
    return np.stack(frames), float(len(frames) / sum(seconds)) if known else None


def iterate_clip(path: str | Path) -> Iterator[tuple[Frames, Fraction | float]]:
    """Yield the frames [h, w, 3] of a clip one by one with the seconds they last, 0 where the file does not say; see `read_clip`."""
    path = Path(path).expanduser()
    if path.is_dir():
        files = find_pictures(path)
        if not files:
            known = ", ".join((*ANIMATED, *FILMS))
            raise FileNotFoundError(f"{str(path)!r} holds no pictures; give a folder of frames, or a {known} file.")
        for file in files:
            yield next(_read_animation(file))[0], 0
    elif not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist; give a clip or a folder of frames.")
    else:
        yield from _read_film(path) if path.suffix.lower() in FILMS else _read_animation(path)


def _read_animation(path: Path) -> Iterator[tuple[Frames, float]]:
    """Read a picture, animated or not; transparent parts become white.

    Raises:
        ValueError: if Pillow cannot read it.
    """
    try:
        with Image.open(path) as picture:
            for frame in ImageSequence.Iterator(picture):
                pixels = np.asarray(to_rgb(frame))
                yield pixels, float(frame.info.get("duration", 0)) / 1000  # WebP knows it once the frame is decoded
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a picture or an animation ({error}).") from error


def _read_film(path: Path) -> Iterator[tuple[Frames, Fraction | float]]:
    av = _av(path)
    try:
        with av.open(str(path)) as container:
            rate = container.streams.video[0].average_rate
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24"), 1 / rate if rate else 0
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a film ({error}).") from error


def _av(path: Path) -> Any:
    """Return PyAV.

    Raises:
        ImportError: if it is missing; names the extra.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"{path.name}: films need PyAV: pip install 'genkit-torch[video]', or use .gif, .webp or a folder of frames."
        ) from error
    return av


def write_clip(path: str | Path, frames: Frames | Sequence[Image.Image], fps: float = 8.0) -> Path:
    """Write frames as what the name says: `.gif`, `.webp`, `.png` (animated), a film, or a folder of numbered PNG files.

    Args:
        path: file, or a name without suffix for a folder.
        frames: [f, h, w, 3] uint8, or pictures.
        fps: frames per second, above 0.

    Returns:
        The path.

    Raises:
        ValueError: for no frames, an impossible rate, or an unknown suffix; for a film of odd width or height, which H.264 cannot hold.
        ImportError: if a film needs PyAV and it is missing.
    """
    path, suffix = Path(path), Path(path).suffix.lower()
    pictures = [frame if isinstance(frame, Image.Image) else Image.fromarray(np.asarray(frame)) for frame in frames]
    if not pictures:
        raise ValueError("a clip needs at least one frame, got none.")
    if not fps > 0:
        raise ValueError(f"fps must be above 0, got {fps}.")
    if suffix in ANIMATED:
        options: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {}
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0, **options)
    elif suffix in FILMS:
        _write_film(path, pictures, fps)
    elif not suffix:
        path.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(pictures):
            picture.save(path / f"{i:05d}.png")
    else:
        raise ValueError(f"clips are written as {', '.join((*ANIMATED, *FILMS))} or a folder, got the suffix {suffix!r}.")
    return path


def _write_film(path: Path, pictures: Sequence[Image.Image], fps: float) -> None:
    """Encode as H.264."""
    av = _av(path)
    width, height = pictures[0].size
    if width % 2 or height % 2:
        raise ValueError(f"{path.name}: H.264 holds even widths and heights only, got {width}x{height}; write .webp or .gif instead.")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture.convert("RGB"))))
        container.mux(stream.encode())
