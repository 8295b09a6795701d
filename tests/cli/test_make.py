"""`genkit make`: the chain on a packaged picture model and small random networks behind it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trimesh
from PIL import Image

from genkit.cli.main import main
from tests.generators.toy_meshes import mesh_pipeline
from tests.pipelines.toy_shapes import ball_pipeline


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    ball_pipeline(num_inference_steps=2).save_pretrained(folder / "shape")
    mesh_pipeline().save_pretrained(folder / "mesh")
    own = {"image": "genkit/sim-lowpoly", "shape": str(folder / "shape"), "mesh": str(folder / "mesh")}
    return [part for name, value in own.items() for part in (f"--{name}-model", value)]


def make(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["make", "a treasure chest", "--json", "--device", "cpu", *arguments]) == 0
    found: dict = json.loads(capsys.readouterr().out)
    return found


def test_a_prompt_becomes_files_once(models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "chest"
    first = make(capsys, "--out", str(out), "--max-faces", "4", *models)
    assert Image.open(out / "picture.png").size == (64, 64)
    assert len(trimesh.load(out / "shape.glb", force="mesh").faces) > 100
    assert 0 < len(trimesh.load(out / "mesh.glb", force="mesh").faces) <= 4
    assert getattr(Image.open(out / "turntable.gif"), "n_frames") == 32  # noqa: B009
    assert first["stages"]["mesh"]["faces"] <= 4 and first["stages"]["shape"]["watertight"]
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "make.json"}
    again = make(capsys, "--out", str(out), "--max-faces", "4", *models)
    assert again == first
    assert times == {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "make.json"}
    other = make(capsys, "--out", str(out), "--max-faces", "2", *models)
    changed = {name for name, before in times.items() if (out / name).stat().st_mtime_ns != before}
    assert changed == {"mesh.glb", "turntable.gif"} and other["stages"]["mesh"]["faces"] <= 2
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    make(capsys, "--out", str(out), "--max-faces", "2", "--candidates", "1", *models)
    assert {name for name in ("picture.png", "shape.glb") if (out / name).stat().st_mtime_ns != times[name]} == set()
    assert json.loads((out / "make.json").read_text())["stages"]["mesh"]["made_with"]["candidates"] == 1
    (out / "shape.glb").unlink()
    make(capsys, "--out", str(out), "--max-faces", "2", *models)
    assert (out / "shape.glb").is_file()
    (out / "make.json").write_text("{")
    make(capsys, "--out", str(out), "--max-faces", "2", *models)
    assert json.loads((out / "make.json").read_text())["config"]["prompt"] == "a treasure chest"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "--out", "x"], "the prompt is empty"),
        (["a chest", "--out", "nowhere/x"], "there is no folder"),
        (["a chest", "--out", "x", "--mesh-model", "genkit/nothing"], "unknown model"),
        (["a chest", "--out", "x", "--shape-model", "genkit/sim-lowpoly"], "makes no shapes of pictures"),
    ],
)
def test_wrong_requests_are_refused(
    arguments: list[str],
    message: str,
    models: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["make", arguments[0], *models, *arguments[1:]]) != 0
    assert message in capsys.readouterr().err
