"""Preparation of shapes and training of the shape VAE on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import trimesh

from genkit.data.mesh_fields import FieldCounts
from genkit.data.shape_samples import ShapeSamples, prepare, read_report
from genkit.pipelines.base import GenPipeline
from genkit.tasks.shape_vae import Config, ShapeVAETask
from genkit.tokenizers.shape_vae import ShapeVAE
from genkit.training.config import TrainConfig
from genkit.training.evaluation import EvaluationConfig
from genkit.training.loop import Trainer
from genkit.training.task import StepContext

COUNTS = FieldCounts(volume=300, near=300, sharp=120, surface=64, edges=64)
MODEL: dict[str, Any] = {
    "num_latents": 8, "embed_dim": 4, "width": 16, "heads": 4, "num_encoder_layers": 1, "num_decoder_layers": 1, "pc_size": 32,
    "pc_sharpedge_size": 32, "downsample_ratio": 4,
}  # fmt: skip
SLIM = {**MODEL, "head_downsample": 2, "head_mlp_ratio": 1.0, "head_ln_post": False}


def write_meshes(folder: Path) -> Path:
    folder.mkdir()
    for i, extents in enumerate([(1, 1, 1), (1, 2, 0.5), (0.3, 1, 1)]):
        trimesh.creation.box(extents).export(folder / f"box_{i}.obj")
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    prepare(write_meshes(folder / "meshes"), folder / "out", COUNTS)
    return folder / "out"


def test_the_job_resumes_and_reports_what_it_could_not_use(tmp_path: Path) -> None:
    meshes, out = write_meshes(tmp_path / "meshes"), tmp_path / "out"
    (meshes / "broken.obj").write_text("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n")
    found = prepare(meshes, out, COUNTS)
    assert found.names == ["box_0", "box_1", "box_2"] and found.computed == 4
    assert "no area" in found.refused["broken"] and read_report(out)["refused"] == found.refused
    first = (out / "box_1.safetensors").read_bytes()
    (out / "box_1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of 3 samples"):
        ShapeSamples(out)
    again = prepare(meshes, out, COUNTS)
    assert again.computed == 1 and (out / "box_1.safetensors").read_bytes() == first
    data = ShapeSamples(out)
    assert len(data) == 3 and data[2]["surface"].shape == (128, 7) and int(data[2]["index"]) == 2
    with pytest.raises(ValueError, match="other settings"):
        prepare(meshes, out, COUNTS, seed=1)


@pytest.mark.slow
def test_two_processes_prepare_what_one_does(tmp_path: Path) -> None:
    meshes = write_meshes(tmp_path / "meshes")
    prepare(meshes, tmp_path / "a", COUNTS)
    prepare(meshes, tmp_path / "b", COUNTS, processes=2)
    for name in ShapeSamples(tmp_path / "a").names:
        assert (tmp_path / "a" / f"{name}.safetensors").read_bytes() == (tmp_path / "b" / f"{name}.safetensors").read_bytes()


def test_nothing_usable_is_said(tmp_path: Path) -> None:
    (tmp_path / "meshes").mkdir()
    (tmp_path / "meshes" / "a.obj").write_text("v 0 0 0\n")
    with pytest.raises(ValueError, match="none of 1 meshes can be used"):
        prepare(tmp_path / "meshes", tmp_path / "out", COUNTS)
    with pytest.raises(FileNotFoundError, match="prepare_shapes"):
        ShapeSamples(tmp_path / "nothing")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_ends_in_a_vae_and_resumes_exactly(optimizer: Any, prepared: Path, tmp_path: Path) -> None:
    def fresh() -> ShapeVAETask:
        return ShapeVAETask(Config(data=str(prepared), model=MODEL, points=96, optimizer=optimizer, lr=1e-3), ShapeSamples(prepared))

    config = TrainConfig(out=str(tmp_path / "a"), steps=4, batch_size=3, checkpoint_every=2, log_every=1, sample_every=4)
    Trainer(fresh(), config).run()
    torn = TrainConfig(**{**config.__dict__, "out": str(tmp_path / "b")})
    Trainer(fresh(), torn).run(until=2)
    Trainer(fresh(), torn).run()
    one, two = (ShapeVAE.from_pretrained(tmp_path / out / "export" / "vae").state_dict() for out in "ab")
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert (tmp_path / "a" / "samples").is_dir()


def test_it_learns_and_a_slim_head_follows_with_the_encoder_frozen(prepared: Path, tmp_path: Path) -> None:
    data = ShapeSamples(prepared)
    config = Config(data=str(prepared), model=MODEL, points=300, optimizer="muon", lr=5e-3, gamma=1e-4)
    losses = [
        Trainer(ShapeVAETask(config, data), TrainConfig(out=str(tmp_path / str(n)), steps=n, batch_size=3, warmup=5)).run().losses["main"]
        for n in (5, 60)
    ]
    assert losses[1] < 0.7 * losses[0]
    start = str(tmp_path / "60" / "export" / "vae")
    slim = ShapeVAETask(Config(data=str(prepared), model=SLIM, points=300, start=start, only_head=True, lr=1e-3), data)
    Trainer(slim, TrainConfig(out=str(tmp_path / "slim"), steps=3, batch_size=3)).run()
    pipe: Any = GenPipeline.from_pretrained(tmp_path / "slim" / "export")
    base, surface = ShapeVAE.from_pretrained(start), torch.rand(1, 64, 7)
    assert torch.equal(base.encode(surface).mean, pipe.vae.encode(surface).mean) and pipe.slim_vae.encoder is None
    assert not torch.equal(base.post_kl.weight, pipe.slim_vae.post_kl.weight)
    trained = cast(Any, slim.modules["vae"]).model
    assert all(torch.equal(value, trained.encoder.state_dict()[key]) for key, value in base.encoder.state_dict().items())
    assert pipe.slim_vae.config["head_downsample"] == 2 and pipe.vae.config["scale_factor"] == pipe.slim_vae.config["scale_factor"] != 1


def test_generators_see_latents_of_unit_variance(prepared: Path) -> None:
    task = ShapeVAETask(Config(data=str(prepared), model=MODEL), ShapeSamples(prepared))
    factor, rows = task.latent_scale(task.vae), []
    for i in range(3):
        batch = {name: value[None] for name, value in task.data[i].items()}
        with torch.no_grad():
            posterior = task.vae.encode(task.draw(batch, StepContext(0, 0, torch.device("cpu")))["surface"])
        rows.append(posterior.mean.square() + posterior.std.square())
    assert float(torch.cat(rows).mean() * factor**2) == pytest.approx(1, rel=1e-4)


def test_metrics_of_shapes_while_training(prepared: Path, tmp_path: Path) -> None:
    meshes = write_meshes(tmp_path / "meshes")
    evaluation = EvaluationConfig(str(meshes), metrics=("volume-iou", "chamfer-l1-sum"), num_samples=2, size=16)
    task = ShapeVAETask(Config(data=str(prepared), model=MODEL, points=300, optimizer="muon", lr=5e-3), ShapeSamples(prepared))
    Trainer(task, TrainConfig(out=str(tmp_path / "run"), steps=2, batch_size=3, evaluate_every=2, evaluate=evaluation)).run()
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = next(row for row in logged if "eval/volume-iou" in row)
    assert 0 <= found["eval/volume-iou"] <= 1 and 0 <= found["eval/without-surface"] <= 1
    with pytest.raises(ValueError, match="volume-iou"):
        task.check_evaluation(EvaluationConfig(str(meshes), metrics=("volume_iou",)))


def test_draws_are_of_every_kind(prepared: Path) -> None:
    data = ShapeSamples(prepared)
    task = ShapeVAETask(Config(data=str(prepared), model=MODEL, points=90), data)
    batch = {name: value[None].expand(2, *value.shape) for name, value in data[1].items()}
    drawn = task.draw(batch, StepContext(0, 0, torch.device("cpu")))
    assert drawn["surface"].shape == (2, 64, 7) and drawn["points"].shape == (2, 90, 3) and drawn["field"].shape == (2, 90)
    assert bool((drawn["surface"][:, :32, 6] == 0).all()) and bool((drawn["surface"][:, 32:, 6] == 1).all())
    far, near = drawn["field"][:, :30].abs().mean(), drawn["field"][:, 30:].abs().mean()
    assert float(near) < 0.3 * float(far)
    other = task.draw(batch, StepContext(1, 0, torch.device("cpu")))
    assert not torch.equal(other["points"], drawn["points"])
    points = {tuple(row) for row in np.round(batch["points"][0].numpy(), 6).tolist()}
    assert all(tuple(row) in points for row in np.round(drawn["points"][0].numpy(), 6).tolist())


def test_augmented_shapes_are_turned_and_mirrored_as_a_whole(prepared: Path) -> None:
    data = ShapeSamples(prepared)
    tasks = [ShapeVAETask(Config(data=str(prepared), model=MODEL, points=90, augment=augment), data) for augment in (False, True)]
    batch = {name: value[None].expand(32, *value.shape) for name, value in data[1].items()}
    plain, turned = (task.draw(batch, StepContext(0, 0, torch.device("cpu"))) for task in tasks)
    assert torch.equal(plain["field"], turned["field"])
    ways = set()
    for i in range(32):
        way = torch.linalg.lstsq(plain["points"][i], turned["points"][i]).solution
        ways.add(tuple(way.round().int().flatten().tolist()))
        assert torch.allclose(way, way.round(), atol=1e-4) and torch.allclose(way @ way.T, torch.eye(3), atol=1e-4)
        for rows in (slice(0, 3), slice(3, 6)):
            assert torch.allclose(plain["surface"][i, :, rows] @ way, turned["surface"][i, :, rows], atol=1e-4)
    assert len(ways) == 8 and all(way[4] == 1 for way in ways)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": 0.0}, "truncation"),
        ({"points": 2}, "points"),
        ({"only_head": True}, "give its folder as start"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)


def test_more_points_than_prepared_are_refused(prepared: Path) -> None:
    with pytest.raises(ValueError, match="prepared are 64 and 64"):
        ShapeVAETask(Config(data=str(prepared), model={**MODEL, "pc_size": 128, "pc_sharpedge_size": 128}), ShapeSamples(prepared))
