"""Folders, and writing them completely or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from genkit import paths


def test_recipes_lie_beside_the_package_in_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(paths, "PACKAGE", tmp_path / "genkit")
    with pytest.raises(FileNotFoundError, match="reinstall"):
        paths.recipes_dir()
    for name in paths.LAUNCH_FOLDERS:
        (tmp_path / name).mkdir()
    assert paths.recipes_dir() == tmp_path
    (tmp_path / "genkit" / "recipes").mkdir(parents=True)
    assert paths.recipes_dir() == tmp_path / "genkit" / "recipes"


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path))
    assert paths.cache_dir() == tmp_path
    monkeypatch.delenv("GENKIT_CACHE")
    assert paths.cache_dir().name in ("genkit", "cache")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"

    def fail() -> None:
        with paths.whole_folder(target) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list((tmp_path / "deep").iterdir()) == []
    with paths.whole_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("1")
        assert not target.exists()
    with paths.whole_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("2")
    assert (target / "sub" / "file").read_text() == "2"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]


def test_a_file_in_the_way_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"), paths.whole_folder(tmp_path / "model"):
        pass
    assert (tmp_path / "model").read_text() == "mine"
