"""`genkit remesh` on small random networks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from genkit.cli.main import main
from tests.generators.toy_meshes import mesh_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "meshes"
    mesh_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def ball(tmp_path: Path) -> str:
    trimesh.creation.icosphere(3).export(tmp_path / "ball.obj")
    return str(tmp_path / "ball.obj")


def test_a_shape_becomes_a_file_with_a_preview(model: str, ball: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made.glb"
    assert main(["remesh", ball, "--model", model, "--out", str(out), "--max-faces", "3", "--shell-depth", "4"]) == 0
    assert 0 < len(trimesh.load(out, force="mesh").faces) <= 3
    assert Image.open(tmp_path / "made-preview.png").size[1] >= 2 * 160
    printed = capsys.readouterr().out
    assert "1,280 faces -> " in printed and "Chamfer" in printed and "tokens in" in printed


def test_points_and_json(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mesh = trimesh.creation.icosphere(1)
    np.save(tmp_path / "points.npy", np.concatenate([mesh.triangles_center, mesh.face_normals], axis=1))
    out, strip = tmp_path / "made.ply", tmp_path / "strip.png"
    options = ["--sample", "--seed", "3", "--json", "--preview", str(strip)]
    assert main(["remesh", str(tmp_path / "points.npy"), "--model", model, "--out", str(out), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["faces_before"] is None and found["faces"] > 0 and found["complete"] and not found["dropped_tokens"]
    assert strip.is_file() and out.is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{ball}", "--out", "shape.xyz"], "--out must end in .glb"),
        (["{ball}", "--out", "nowhere/shape.glb"], "there is no folder"),
        (["missing.obj"], "there is no shape at 'missing.obj'"),
        (["{ball}", "--preview", "x.jpg"], "--preview must end in .png or .gif"),
        (["{ball}", "--model", "genkit/meshany"], "unknown model"),
        (["{ball}", "--shell-depth", "2"], "4..10, got 2"),
        (["{ball}", "--temperature", "0"], "temperature must be above 0"),
        (["{ball}", "--max-faces", "3", "--no-grammar"], "takes the grammar"),
        (["{text}"], "cannot be read as an array"),
    ],
)
def test_wrong_requests_are_refused(
    arguments: list[str],
    message: str,
    model: str,
    ball: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.npy").write_text("no numbers")
    given = [part.format(ball=ball, text="text.npy") for part in arguments]
    given += [] if "--model" in given else ["--model", model]
    assert main(["remesh", *given]) != 0
    assert message in capsys.readouterr().err
