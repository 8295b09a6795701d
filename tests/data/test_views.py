"""View data sets: decoding, cache, bad input."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genkit.data.files import atomic_write
from genkit.data.views import ViewDataset, box_reduce
from tests.data.toy import CAPTIONS, encode, strips, write_views


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    return write_views(tmp_path / "train.parquet", list(strips()))


def test_views_as_pictures(tmp_path: Path) -> None:
    data = ViewDataset(write_views(tmp_path / "a.parquet", [np.full((8, 16, 3), 10 * i, np.uint8) for i in range(2)]), 8)
    picture = data.picture(1, 1)
    assert picture.size == (8, 8) and picture.getpixel((0, 0)) == (10, 10, 10)
    for place in ((2, 0), (0, 2), (-1, 0)):
        with pytest.raises(IndexError, match="there are 2 objects"):
            data.picture(*place)


def test_views_are_the_squares_of_the_strip_in_order(parquet: Path, tmp_path: Path) -> None:
    data = ViewDataset(parquet, 8, cache=tmp_path / "cache")
    assert (len(data), data.num_objects, data.images_u8.shape) == (12, 3, (12, 3, 8, 8))
    for index in range(12):
        row, view = divmod(index, 4)
        expected = strips()[row, :, view * 8 : view * 8 + 8].transpose(2, 0, 1)
        np.testing.assert_array_equal(data.images_u8[index], expected)
        assert (data.object_of(index), data.view_of(index), data.azimuth_of(index)) == (row, view, 90.0 * view)
        assert index in data.views_of(row)
    assert tuple(data.captions) == CAPTIONS


def test_item_is_in_minus_one_to_one(parquet: Path, tmp_path: Path) -> None:
    data = ViewDataset(parquet, 8, cache=tmp_path)
    item = data[5]
    expected = torch.from_numpy(np.array(data.images_u8[5])).float() / 127.5 - 1
    torch.testing.assert_close(item["image"], expected, rtol=0, atol=1e-6)
    assert item["index"].dtype == torch.int64
    assert int(item["index"]) == 5
    with pytest.raises(IndexError, match="0..11"):
        data[12]


def test_reduced_views_are_exact_area_averages() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (3, 12, 12, 3), dtype=np.uint8)
    mean = pixels.reshape(3, 4, 3, 4, 3, 3).astype(np.float64).mean((2, 4))
    np.testing.assert_array_equal(box_reduce(pixels, 4), np.floor(mean + 0.5))


def test_cache_is_read_again_and_keyed_by_data_and_size(parquet: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = ViewDataset(parquet, 8, cache=cache)
    written = first.cache_file.stat().st_mtime_ns
    assert ViewDataset(parquet, 8, cache=cache).cache_file.stat().st_mtime_ns == written
    assert ViewDataset(parquet, 4, cache=cache).data_hash != first.data_hash
    other = write_views(tmp_path / "other.parquet", list(255 - strips()))
    assert ViewDataset(other, 8, cache=cache).data_hash != first.data_hash
    assert not list(cache.rglob("*.part"))


def test_folder_takes_the_split_by_name(parquet: Path, tmp_path: Path) -> None:
    write_views(tmp_path / "test.parquet", list(strips(2)))
    assert len(ViewDataset(tmp_path, 8, cache=tmp_path / "cache")) == 12
    assert len(ViewDataset(tmp_path, 8, split="test", cache=tmp_path / "cache")) == 8
    with pytest.raises(FileNotFoundError, match=r"validation\.parquet.*train\.parquet"):
        ViewDataset(tmp_path, 8, split="validation", cache=tmp_path / "cache")


def test_pickled_dataset_is_small_and_reads_the_same(parquet: Path, tmp_path: Path) -> None:
    data = ViewDataset(parquet, 8, cache=tmp_path)
    data[0]
    copy = pickle.loads(pickle.dumps(data))
    assert copy._pixels is None
    torch.testing.assert_close(copy[3]["image"], data[3]["image"], rtol=0, atol=0)


def test_transparency_becomes_white(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    data = ViewDataset(write_views(tmp_path / "train.parquet", [pixels]), 8, cache=tmp_path)
    assert int(data.images_u8.min()) == 255


@pytest.mark.parametrize(
    ("views", "size", "match"),
    [
        ([encode(strips()[0]), b"no picture"], 8, "row 1: .*cannot be decoded"),
        ([strips()[0][:, :30]], 8, "row 0: .*30x8"),
        ([strips()[0]], 3, "row 0: .*size=3"),
        ([strips()[0]], 16, "size=16"),
        ([strips()[0]], 0, "at least 1"),
    ],
)
def test_unusable_pictures_are_named(tmp_path: Path, views: list[Any], size: int, match: str) -> None:
    path = write_views(tmp_path / "train.parquet", views)
    with pytest.raises(ValueError, match=match):
        ViewDataset(path, size, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("views-*"))


def test_missing_column_is_named(tmp_path: Path) -> None:
    path = write_views(tmp_path / "train.parquet", list(strips()), caption=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lacks the columns \['caption'\]"):
        ViewDataset(path, 8, cache=tmp_path)


def test_missing_file_is_told_before_the_hub_is_asked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ViewDataset(tmp_path / "none.parquet", 8)


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
