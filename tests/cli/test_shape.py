"""`genkit shape` on small random networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trimesh
from PIL import Image

from genkit.cli.main import main
from tests.pipelines.toy_shapes import ball_pipeline, object_picture


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "shapes"
    ball_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def chest(tmp_path: Path) -> str:
    object_picture("RGBA", (0, 0, 0, 0)).save(tmp_path / "chest.png")
    return str(tmp_path / "chest.png")


def test_a_picture_becomes_a_file_with_a_preview(model: str, chest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made.glb"
    assert main(["shape", chest, "--model", model, "--out", str(out), "--steps", "2", "--seed", "7", "--max-faces", "200"]) == 0
    mesh = trimesh.load(out, force="mesh")
    assert 0 < len(mesh.faces) <= 200
    assert Image.open(tmp_path / "made-preview.png").size[0] >= 8 * 160
    printed = capsys.readouterr().out
    assert "seed 7" in printed and "closed" in printed and "s per shape" in printed


def test_several_shapes_are_numbered(model: str, chest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, strip = tmp_path / "made.ply", tmp_path / "strip.png"
    options = ["--num-shapes", "2", "--seed", "3", "--steps", "2", "--json", "--preview", str(strip)]
    assert main(["shape", chest, chest, "--model", model, "--out", str(out), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [shape["seed"] for shape in found["shapes"]] == [3, 4, 5, 6]
    assert all(Path(shape["mesh"]).is_file() and shape["watertight"] for shape in found["shapes"])
    assert found["preview"] == str(strip) and strip.is_file()


def test_views_make_one_shape(model: str, chest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made.obj"
    assert main(["shape", chest, chest, "--views", "front", "back", "--model", model, "--out", str(out), "--steps", "1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["shapes"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{chest}", "--out", "shape.xyz"], "--out must end in .glb"),
        (["{chest}", "--out", "nowhere/shape.glb"], "there is no folder"),
        (["missing.png"], "there is no picture at 'missing.png'"),
        ([" "], "the prompt is empty"),
        (["{chest}", "{chest}", "--views", "front"], "--views names 1 sides"),
        (["a chair"], "takes pictures, not text"),
        (["{chest}", "--preview", "strip.jpg"], "--preview must end in .png or .gif"),
        (["{text}"], "cannot be read as a picture"),
    ],
)
def test_bad_input_is_one_line(
    model: str,
    chest: str,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    filled = [argument.format(chest=chest, text="text.png") for argument in arguments]
    assert main(["shape", *filled, "--model", model]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_models_of_other_things_are_refused(chest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shape", chest, "--model", "genkit/enat-lowpoly", "--out", str(tmp_path / "a.glb")]) == 2
    assert "makes no shapes" in capsys.readouterr().err
