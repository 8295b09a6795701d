"""Clips on disk: round trips, rates, transparency, films, broken files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genkit.data.video_files import read_clip, write_clip

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), np.uint8)


@pytest.mark.parametrize("name", ["clip.webp", "clip.png", "clip.gif"])
def test_animations_come_back(tmp_path: Path, name: str) -> None:
    few = FRAMES // 128 * 255 if name.endswith("gif") else FRAMES  # a GIF holds 256 colours
    frames, fps = read_clip(write_clip(tmp_path / name, few, fps=10))
    assert np.array_equal(frames, few)
    assert fps == pytest.approx(10)


def test_folders_come_back_in_order(tmp_path: Path) -> None:
    many = np.concatenate([FRAMES] * 3)
    frames, fps = read_clip(write_clip(tmp_path / "frames", [Image.fromarray(frame) for frame in many]))
    assert np.array_equal(frames, many) and fps is None


def test_a_picture_is_one_frame_and_transparency_is_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 3), (10, 20, 30, 0)).save(tmp_path / "one.png")
    frames, fps = read_clip(tmp_path / "one.png")
    assert frames.shape == (1, 3, 4, 3) and (frames == 255).all() and fps is None


@pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="needs PyAV")
def test_films_come_back_almost(tmp_path: Path) -> None:
    smooth = np.broadcast_to(np.linspace(0, 200, 32)[None, None, :, None], (5, 32, 32, 3)).astype(np.uint8)
    frames, fps = read_clip(write_clip(tmp_path / "clip.mp4", smooth, fps=12))
    assert frames.shape == (5, 32, 32, 3) and fps == pytest.approx(12)
    assert np.abs(frames.astype(float) - smooth).mean() < 4
    with pytest.raises(ValueError, match="33x32"):
        write_clip(tmp_path / "odd.mp4", np.zeros((2, 32, 33, 3), np.uint8))


@pytest.mark.skipif(importlib.util.find_spec("av") is not None, reason="PyAV is here")
def test_films_without_pyav_name_the_extra(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"genkit.*\[video\]"):
        write_clip(tmp_path / "clip.mp4", FRAMES)


def test_bad_clips_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.gif").write_bytes(b"GIF89a nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"broken\.gif.*cannot be read"):
        read_clip(tmp_path / "broken.gif")
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        read_clip(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_clip(tmp_path / "none.gif")
    write_clip(tmp_path / "mixed", FRAMES)
    Image.new("RGB", (3, 3)).save(tmp_path / "mixed" / "z.png")
    with pytest.raises(ValueError, match="differ in size"):
        read_clip(tmp_path / "mixed")
    for fps in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="above 0"):
            write_clip(tmp_path / "x.gif", FRAMES, fps=fps)
    with pytest.raises(ValueError, match="at least one frame"):
        write_clip(tmp_path / "x.gif", [])
    with pytest.raises(ValueError, match="suffix"):
        write_clip(tmp_path / "x.txt", FRAMES)
