"""Folders of pictures, and opening data by what is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from genkit.data.images import ImageFolderDataset, open_dataset
from genkit.data.views import ViewDataset
from tests.data.toy import encode, strips, write_views


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    square = strips(1)[0][:, :8]
    for name, data in {
        "red_chairs/b.png": encode(square),
        "red_chairs/deep/a.jpg": encode(square, "JPEG"),
        "c.webp": encode(strips(1)[0]),
    }.items():
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


def test_pictures_at_any_depth_with_folder_names_as_captions(folder: Path) -> None:
    data = open_dataset(folder, 4)
    assert isinstance(data, ImageFolderDataset)
    assert [path.name for path in data.files] == ["c.webp", "b.png", "a.jpg"]
    assert data.captions == ["", "red chairs", "deep"]
    item = data[1]
    assert item["image"].shape == (3, 4, 4)
    expected = strips(1)[0][:, :8].reshape(4, 2, 4, 2, 3).astype(np.float64).mean((1, 3)).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(item["image"].numpy(), expected, atol=0.6 / 127.5)


def test_wide_pictures_lose_their_sides(folder: Path) -> None:
    item = ImageFolderDataset(folder, 8)[0]
    expected = strips(1)[0][:, 12:20].transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(item["image"].numpy() - expected).mean() < 0.3  # webp is lossy on noise; a wrong crop differs by 0.67


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "file_name,caption\nc.webp,a strip\nred_chairs/b.png,one\nred_chairs/deep/a.jpg,two\n"),
        ("metadata.jsonl", '{"file_name": "c.webp", "text": "a strip"}\n{"file_name": "red_chairs/b.png", "text": "one"}\n'
         '{"file_name": "red_chairs/deep/a.jpg", "text": "two"}\n'),
    ],
)  # fmt: skip
def test_metadata_gives_captions(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    assert ImageFolderDataset(folder, 4).captions == ["a strip", "one", "two"]


def test_bad_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="8x8 pixels, smaller than size=16"):
        ImageFolderDataset(folder, 16)[1]
    (folder / "broken.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"broken\.png cannot be decoded"):
        ImageFolderDataset(folder, 4)[0]
    (folder / "metadata.csv").write_text("file_name,caption\nc.webp,a\n")
    with pytest.raises(ValueError, match="no caption for 3 pictures"):
        ImageFolderDataset(folder, 4)
    (folder / "metadata.csv").write_text("name,caption\nc.webp,a\n")
    with pytest.raises(ValueError, match=r"entry 1: needs file_name"):
        ImageFolderDataset(folder, 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no pictures"):
        open_dataset(tmp_path / "empty", 4)


def test_hash_follows_files_and_size(folder: Path) -> None:
    first = ImageFolderDataset(folder, 4).data_hash
    assert ImageFolderDataset(folder, 4).data_hash == first
    assert ImageFolderDataset(folder, 8).data_hash != first
    (folder / "d.png").write_bytes(encode(strips(1)[0]))
    assert ImageFolderDataset(folder, 4).data_hash != first


def test_parquet_is_opened_as_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    path = write_views(tmp_path / "data" / "train.parquet", list(strips()))
    assert isinstance(open_dataset(path, 8), ViewDataset)
    assert len(open_dataset(path.parent, 8)) == 12
