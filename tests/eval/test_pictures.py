"""Sources of pictures: every format, conversions that are reported, pictures that are refused."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from genkit.eval.pictures import ArchiveSource, ArraySource, FolderSource, PictureError, PipelineSource, Source, open_source, to_pixels
from tests.data.toy import strips, write_views

RNG = np.random.default_rng(0)


def pixels(h: int = 6, w: int = 5) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return RNG.integers(0, 256, (h, w, 3), dtype=np.uint8)


def png(array: np.ndarray[Any, Any], mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def stack() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.stack([pixels() for _ in range(5)])


@pytest.fixture
def folder(tmp_path: Path, stack: np.ndarray[Any, Any]) -> Path:
    root = tmp_path / "pictures"
    for i, array in enumerate(stack):
        path = root / ("cats" if i < 3 else "dogs/small") / f"{i}.{'PNG' if i % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(array))
    return root


def check(source: Source, stack: np.ndarray[Any, Any]) -> None:
    assert len(source) == len(stack)
    for i, picture in enumerate(source.read_many(range(len(stack)))):
        np.testing.assert_array_equal(picture.pixels, stack[i])
    assert len(source.fingerprint()) == 24


def test_folder_is_read_at_any_depth_and_names_classes(folder: Path, stack: np.ndarray[Any, Any]) -> None:
    source = open_source(folder)
    check(source, stack)
    assert [source.read(i).label for i in range(5)] == ["cats", "cats", "cats", "small", "small"]
    before = source.fingerprint()
    (folder / "cats" / "0.png").write_bytes(png(pixels(9, 9)))
    assert open_source(folder).fingerprint() != before


def test_zip_and_tar_are_read_without_unpacking(tmp_path: Path, folder: Path, stack: np.ndarray[Any, Any]) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive, tarfile.open(tmp_path / "a.tar", "w") as shard:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder))
            shard.add(file, str(file.relative_to(folder)))
    for name in ("a.zip", "a.tar"):
        source = open_source(tmp_path / name)
        check(source, stack)
        assert source.read(4).label == "small"
        again = pickle.loads(pickle.dumps(source))  # as worker processes get it
        np.testing.assert_array_equal(again.read(1).pixels, stack[1])
    shards = tmp_path / "shards"
    shards.mkdir()
    for i in range(2):
        (shards / f"{i}.tar").write_bytes((tmp_path / "a.tar").read_bytes())
    assert len(open_source(shards)) == 10


def test_compressed_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as shard:
        shard.addfile(tarfile.TarInfo("x.png"))
    with pytest.raises(ValueError, match="no zip archive or uncompressed tar"):
        open_source(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", ["npy", "stored", "compressed"])
def test_arrays_are_mapped_where_they_can_be(tmp_path: Path, stack: np.ndarray[Any, Any], kind: str) -> None:
    path = tmp_path / ("a.npy" if kind == "npy" else "a.npz")
    if kind == "npy":
        np.save(path, stack)
    else:
        (np.savez if kind == "stored" else np.savez_compressed)(path, stack, np.arange(5))
    source = open_source(path)
    assert isinstance(source, ArraySource)
    check(source, stack)
    assert isinstance(source.array, np.memmap) == (kind != "compressed")
    assert source.read(2).label == ("" if kind == "npy" else "2")


def test_arrays_of_another_kind_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "float.npy", np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"must be uint8 \[n, h, w, 3\], got float64 \[2, 4, 4, 3\]"):
        open_source(tmp_path / "float.npy")
    np.savez(tmp_path / "two.npz", a=np.zeros(2), b=np.zeros(2))
    with pytest.raises(ValueError, match="holds the arrays a, b"):
        open_source(tmp_path / "two.npz")
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="object"):
        open_source(tmp_path / "object.npy")


def test_parquet_rows_with_labels(tmp_path: Path, stack: np.ndarray[Any, Any]) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": png(array), "path": None} for array in stack], "label": [0, 1, 0, 1, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    source = open_source(tmp_path / "a.parquet")
    check(source, stack)
    assert source.read(1).label == "dog"


def test_some_views_of_turntables(tmp_path: Path) -> None:
    drawn = strips(num_views=4)
    path = write_views(tmp_path / "views.parquet", list(drawn))
    every, some = open_source(path, view_size=8), open_source(path, view_size=8, views=(1, 3))
    assert (len(every), len(some)) == (12, 6)
    np.testing.assert_array_equal(some.read(2).pixels, drawn[1][:, 8:16])
    assert some.fingerprint() != every.fingerprint() and some.read(5).name.endswith("[11]")
    with pytest.raises(ValueError, match="views must be numbers from 0 to 3"):
        open_source(path, view_size=8, views=(4,))
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").write_bytes(png(pixels()))
    with pytest.raises(ValueError, match="holds single pictures"):
        open_source(tmp_path / "p", views=(0,))


@pytest.mark.parametrize(("mode", "kind"), [("L", "grey"), ("1", "grey"), ("P", "palette"), ("CMYK", "CMYK")])
def test_conversions_without_a_choice_are_reported(mode: str, kind: str) -> None:
    array, conversion = to_pixels(Image.fromarray(pixels()).convert(mode))
    assert array.shape == (6, 5, 3) and array.dtype == np.uint8 and conversion == kind


def test_transparency_needs_a_background() -> None:
    image = Image.fromarray(np.zeros((4, 4, 4), dtype=np.uint8))
    with pytest.raises(PictureError, match="choose --background"):
        to_pixels(image)
    assert to_pixels(image, "white")[0].min() == 255 and to_pixels(image, "black")[0].max() == 0
    assert to_pixels(image, "drop")[1] == "transparent (drop)"


def test_other_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="mode I;16"):
        to_pixels(Image.fromarray(np.zeros((4, 4), dtype=np.uint16)))
    frames = [Image.fromarray(pixels()) for _ in range(3)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    (tmp_path / "b.png").write_bytes(png(pixels(40, 40))[:60])
    (tmp_path / "c.jpg").write_text("no picture")
    source = FolderSource(tmp_path)
    for index, message in ((0, "a.webp has 3 frames"), (1, "b.png cannot be decoded"), (2, "c.jpg cannot be decoded")):
        with pytest.raises(PictureError, match=message):
            source.read(index)


def test_missing_and_empty_sources_say_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_source(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"holds no pictures.*found files with \.txt"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match=r"got a \.txt file"):
        open_source(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="unknown background 'blue'"):
        open_source(tmp_path, background="blue")


def test_archives_without_pictures_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("notes.txt", "x")
    with pytest.raises(FileNotFoundError, match="hold no pictures"):
        ArchiveSource([tmp_path / "a.zip"])


def test_text_pipeline_needs_prompts() -> None:
    class Pipe:
        config: dict[str, Any] = {}

    Pipe.config = type("Config", (dict,), {"id2label": None})()
    with pytest.raises(ValueError, match="give prompts with --prompts"):
        PipelineSource(Pipe(), "genkit/some", 4)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        PipelineSource(Pipe(), "genkit/some", 1, ["a"])
