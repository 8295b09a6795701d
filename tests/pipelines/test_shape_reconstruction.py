"""ShapeReconstructionPipeline and `genkit reconstruct` on a VAE that makes a ball of everything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from genkit.cli.main import main
from genkit.pipelines.base import GenPipeline
from genkit.pipelines.shape_reconstruction import ShapeReconstructionPipeline
from tests.pipelines.toy_shapes import ball_vae

RADIUS = 0.927  # along the axes: cos x = 0.6


@pytest.fixture(scope="module")
def pipe() -> Any:
    return ShapeReconstructionPipeline(ball_vae(), octree_resolution=32)


@pytest.mark.parametrize("decoder", ["dense", "hierarchical", "flash"])
def test_the_result_lies_where_the_mesh_was(pipe: Any, decoder: str) -> None:
    box = trimesh.creation.box((20, 10, 10))
    box.apply_translation([100, 0, -50])
    output = pipe(box, decoder=decoder, generator=[1])
    mesh = output.meshes[0]
    np.testing.assert_allclose(mesh.bounds.mean(0), [100, 0, -50], atol=0.1)
    assert mesh.extents[0] == pytest.approx(20 * RADIUS, rel=0.06)
    assert mesh.is_watertight and output.latents.shape == (1, 8, 4) and output.seeds == [1]


def test_seeds_budgets_and_several_meshes(pipe: Any) -> None:
    meshes = [trimesh.creation.box((1, 2, 3)), trimesh.creation.icosphere(2)]
    both = pipe(meshes, generator=[1, 2], max_faces=100)
    alone = pipe(meshes[1], generator=[2], max_faces=100)
    assert torch.equal(both.latents[1:], alone.latents) and not torch.equal(both.latents[:1], alone.latents)
    assert all(len(mesh.faces) <= 100 for mesh in both.meshes)
    assert pipe.estimate_memory().peak > pipe.estimate_memory(octree_resolution=16).peak > 0


def test_saved_pipelines_open(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "pipe")
    again: Any = GenPipeline.from_pretrained(tmp_path / "pipe")
    box = trimesh.creation.box((1, 2, 3))
    assert np.array_equal(again(box, generator=[1]).meshes[0].vertices, pipe(box, generator=[1]).meshes[0].vertices)


def test_a_slim_head_decodes_the_same_latents(pipe: Any, tmp_path: Path) -> None:
    slim = ball_vae(num_encoder_layers=None, head_downsample=2, head_mlp_ratio=1.0)
    with torch.no_grad():
        slim.head.query_proj.bias[0] = -2.8
    both: Any = ShapeReconstructionPipeline(ball_vae(), slim, octree_resolution=32)
    box = trimesh.creation.box((1, 2, 3))
    base, other = both(box, generator=[1]), both(box, head="slim", generator=[1])
    assert torch.equal(base.latents, other.latents)
    assert np.array_equal(base.meshes[0].vertices, pipe(box, generator=[1]).meshes[0].vertices)
    assert other.meshes[0].volume < 0.6 * base.meshes[0].volume, "its ball is smaller"
    both.register_to_config(head="slim")
    both.save_pretrained(tmp_path / "both")
    again: Any = GenPipeline.from_pretrained(tmp_path / "both")
    assert np.array_equal(again(box, generator=[1]).meshes[0].vertices, other.meshes[0].vertices)
    for call, message in (
        (lambda: pipe(box, head="slim"), "has no slim head"),
        (lambda: both(box, head="slimmer"), "unknown head"),
        (lambda: ShapeReconstructionPipeline(ball_vae(), head="slim"), "needs a slim_vae"),
        (lambda: ShapeReconstructionPipeline(ball_vae(), ball_vae(scale_factor=2.0)), "scale_factor are 1.0 and 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_bad_input_is_refused(pipe: Any) -> None:
    box = trimesh.creation.box()
    for call, message in (
        (lambda: pipe(trimesh.Trimesh()), "no faces"),
        (lambda: pipe(box, octree_resolution=2), "octree_resolution must lie in"),
        (lambda: pipe(box, decoder="octree"), "unknown decoder"),
        (lambda: pipe(box, max_faces=2), "at least 4"),
        (lambda: ShapeReconstructionPipeline(ball_vae(num_encoder_layers=None)), "decoder only"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_command_writes_mesh_and_preview(pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe.save_pretrained(tmp_path / "pipe")
    trimesh.creation.box((1, 2, 3)).export(tmp_path / "box.obj")
    words = [
        "reconstruct",
        str(tmp_path / "box.obj"),
        "--model",
        str(tmp_path / "pipe"),
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "x.glb"),
    ]
    assert main([*words, "--json", "--resolution", "12"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["watertight"] and 0 < record["metrics"]["volume-iou"] < 1 and record["evaluated"] == 1
    mesh: Any = trimesh.load(tmp_path / "x.glb", force="mesh")
    assert len(mesh.faces) == record["faces"]
    preview = np.asarray(Image.open(record["preview"]))
    assert preview.shape[1] > 8 * 160 and (preview[:160] != 255).any() and (preview[-160:] != 255).any()
    assert main([*words, "--max-faces", "50", "--no-metrics", "--preview", str(tmp_path / "turn.gif")]) == 0
    assert "closed" in capsys.readouterr().out
    with Image.open(tmp_path / "turn.gif") as turning:
        assert turning.n_frames == 32 and turning.width > 2 * 160  # type: ignore[attr-defined]
    for extra, message in (
        (["--out", "x.txt"], "--out must end in"),
        (["--preview", "x.jpg"], "--preview must end in .png or .gif"),
        (["--resolution", "3"], "octree_resolution must lie in"),
        (["--model", "genkit/enat-lowpoly"], "reconstructs no meshes"),
    ):
        assert main([*words, *extra]) == 2
        assert message in capsys.readouterr().err
    assert main(["reconstruct", "none.obj", *words[2:]]) == 2
    assert "no mesh at" in capsys.readouterr().err


def test_the_packaged_model_reconstructs_an_asset_by_either_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    box = trimesh.util.concatenate([trimesh.creation.box((2, 0.2, 1)), trimesh.creation.box((0.4, 1, 0.4))])
    box.export(tmp_path / "table.obj")
    for head, least in (("base", 0.7), ("slim", 0.6)):
        words = ["reconstruct", str(tmp_path / "table.obj"), "--head", head, "--resolution", "64", "--device", "cpu", "--json"]
        assert main([*words, "--out", str(tmp_path / f"{head}.glb")]) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["model"] == "genkit/shape-vae-lowpoly" and record["watertight"] and record["metrics"]["volume-iou"] > least
