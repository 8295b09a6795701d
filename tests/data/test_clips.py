"""Data sets of clips: turntables, folders, rows, shards, arrays, moving sprites."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from genkit.data.clips import open_clips, read_sprites, windows_of
from genkit.data.moving_sprites import MovingSprites
from genkit.data.video_files import write_clip
from tests.data.toy import CAPTIONS, encode, strips, write_views

CLIP = np.random.default_rng(1).integers(0, 256, (7, 8, 10, 3), np.uint8)


def clip_bytes(folder: Path, name: str = "clip.webp") -> bytes:
    return write_clip(folder / name, CLIP).read_bytes()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def test_turntables_are_the_views_in_order(tmp_path: Path) -> None:
    path = write_views(tmp_path / "train.parquet", list(strips()))
    data = open_clips(path, 8, 4)
    assert data.is_closed and list(data.captions) == list(CAPTIONS)
    views = strips()[1].reshape(8, 4, 8, 3).transpose(1, 3, 0, 2)
    np.testing.assert_array_equal(data.read(1), views)
    item = data[1]
    assert item["frames"].shape == (4, 3, 8, 8) and float(item["frames"].min()) >= -1 and int(item["index"]) == 1
    with pytest.raises(ValueError, match=r"turntables have \[4\] views, the clips 3 frames"):
        open_clips(path, 8, 3)


def test_windows_overlap_by_half_and_reach_the_end() -> None:
    assert windows_of([9, 3, 4], 4, 1, "x") == [(0, 0), (0, 2), (0, 4), (0, 5), (2, 0)]
    assert windows_of([9], 3, 2, "x") == [(0, 0), (0, 2), (0, 4)]
    with pytest.raises(ValueError, match="no clip has 7 frames; the longest of 2 has 5"):
        windows_of([5, 2], 4, 2, "x")
    with pytest.raises(ValueError, match="stride=0"):
        windows_of([5], 4, 0, "x")


def test_folders_of_files_and_of_frames(tmp_path: Path) -> None:
    write_clip(tmp_path / "in" / "red_car", CLIP)
    write_clip(tmp_path / "in" / "blue.webp", CLIP[::-1])
    data = open_clips(tmp_path / "in", 8, 4, stride=2)
    assert list(data.captions) == ["blue", "red car"]
    np.testing.assert_array_equal(data.read(1), CLIP[:, :, 1:9][[0, 2, 4, 6]].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(data.read(0), CLIP[::-1][:, :, 1:9][[0, 2, 4, 6]].transpose(0, 3, 1, 2))
    with pytest.raises(ValueError, match="10x8 pixels are smaller than image_size=16"):
        open_clips(tmp_path / "in", 16, 4)[0]
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no clips"):
        open_clips(tmp_path / "none", 8, 4)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_rows_and_shards_of_encoded_clips(kind: str, tmp_path: Path) -> None:
    data = clip_bytes(tmp_path)
    if kind == "parquet":
        rows: dict[str, Any] = {"clip": [data, data], "caption": ["a", "b"]}
        datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "train.parquet"))
        path = tmp_path / "train.parquet"
    else:
        path = tmp_path / "shard.tar"
        with tarfile.open(path, "w") as tar:
            for name, content in (("0.webp", data), ("0.txt", b"a"), ("1.webp", data), ("1.txt", b"b")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    found = open_clips(path, 8, 7)
    assert list(found.captions) == ["a", "b"]
    np.testing.assert_array_equal(found.read(1), CLIP[:, :, 1:9].transpose(0, 3, 1, 2))


def test_rows_without_clips_are_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(ValueError, match="clips are in a column clip"):
        open_clips(tmp_path / "train.parquet", 8, 4)
    datasets.Dataset.from_dict({"clip": [b""]}).to_parquet(str(tmp_path / "empty.parquet"))
    with pytest.raises(ValueError, match="row 0: column 'clip' holds no bytes"):
        open_clips(tmp_path / "empty.parquet", 8, 4)


def test_arrays_in_colour_and_as_moving_mnist_is_published(tmp_path: Path) -> None:
    grey = CLIP[:, :, :8, :2].transpose(0, 3, 1, 2).copy()  # f n h w
    np.save(tmp_path / "grey.npy", grey)
    data = open_clips(tmp_path / "grey.npy", 8, 5)
    assert data.channels == 1 and len(data) == 2
    np.testing.assert_array_equal(data.read(1), grey[:5, 1][:, None])
    np.save(tmp_path / "colour.npy", CLIP[None])
    np.testing.assert_array_equal(open_clips(tmp_path / "colour.npy", 8, 5).read(0), CLIP[:5].transpose(0, 3, 1, 2))
    with pytest.raises(ValueError, match="at least 8 frames"):
        open_clips(tmp_path / "colour.npy", 8, 8)
    np.save(tmp_path / "float.npy", CLIP[None].astype(np.float32))
    with pytest.raises(ValueError, match="uint8"):
        open_clips(tmp_path / "float.npy", 8, 2)


def test_sprites_stay_inside_move_by_the_speed_and_bounce() -> None:
    moving = MovingSprites(np.full((1, 28, 28), 255, np.uint8), frames=60, count=1, length=3)
    for index in range(3):
        corners = moving.path(np.random.default_rng([7, index]))
        assert corners.min() >= 0 and corners.max() <= 36
        steps = np.abs(np.diff(corners, axis=0))
        assert steps.max() <= 4  # a tenth of 36, rounded
        assert np.sqrt((steps[5:15].astype(float) ** 2).sum(1)).mean() > 1.5
        assert np.ptp(corners, axis=0).max() > 18
    frames = moving.sequence(0)
    assert frames.shape == (60, 64, 64) and {int(frame.astype(int).sum()) for frame in frames} == {28 * 28 * 255}
    assert np.array_equal(frames, moving.sequence(0)) and not np.array_equal(frames, moving.sequence(1))


def test_the_brighter_pixel_shows_where_sprites_meet() -> None:
    sprites = np.stack([np.full((8, 8), 100, np.uint8), np.full((8, 8), 200, np.uint8)])
    frames = MovingSprites(sprites, frames=30, size=10, count=2, length=50).sequence(4)
    assert set(np.unique(frames)) <= {0, 100, 200}


@pytest.mark.parametrize("kind", ["idx", "idx.gz", "npy", "parquet"])
def test_sprites_come_from_what_the_user_has(kind: str, tmp_path: Path) -> None:
    digits = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    raw = np.array([0x803, 3, 28, 28], ">u4").tobytes() + digits.tobytes()
    path = tmp_path / {"idx": "t10k-images-idx3-ubyte", "idx.gz": "train-images-idx3-ubyte.gz"}.get(kind, f"d.{kind}")
    if kind == "npy":
        np.save(path, digits)
    elif kind == "parquet":
        rows = {"image": [{"bytes": encode(d), "path": None} for d in digits]}
        datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(str(path))
    else:
        path.write_bytes(gzip.compress(raw) if kind.endswith("gz") else raw)
    np.testing.assert_array_equal(read_sprites(path), digits)
    assert read_sprites(path, 14).shape == (3, 14, 14)


def test_transparent_sprites_stand_on_black(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (28, 28), (255, 255, 255, 0))
    picture.putpixel((3, 4), (255, 255, 255, 255))
    rows = {"image": [{"bytes": encode(np.asarray(picture)), "path": None}]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "s.parquet"))
    found = read_sprites(tmp_path / "s.parquet")
    assert int(found.astype(int).sum()) == 255 and found[0, 4, 3] == 255


def test_bad_sprites_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a-idx3-ubyte").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no IDX file"):
        read_sprites(tmp_path / "a-idx3-ubyte")
    np.save(tmp_path / "a.npy", np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"uint8 \[k, h, w\]"):
        read_sprites(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="at most size=8"):
        MovingSprites(np.zeros((1, 28, 28), np.uint8), size=8)
    with pytest.raises(ValueError, match="count=0"):
        MovingSprites(np.zeros((1, 28, 28), np.uint8), count=0)
