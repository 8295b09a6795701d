"""Training of mesh transformers and mesh VAEs: losses, exact resume, what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trimesh
from torch import Tensor

from genkit.data.mesh_samples import MeshBounds
from genkit.pipelines.base import GenPipeline
from genkit.pipelines.meshanything import MeshAnythingPipeline
from genkit.tasks import mesh_generation, mesh_vae
from genkit.tasks.mesh_generation import next_token_loss
from genkit.tokenizers.mesh_grammar import check_sequence
from genkit.tokenizers.mesh_vae import MeshVQModel
from genkit.training.config import TrainConfig, whole_cosine
from genkit.training.loop import Trainer
from genkit.training.task import StepContext
from tests.data.test_mesh_samples import write_meshes
from tests.generators.toy_meshes import POINTS, SIZES

MODEL = {name: value for name, value in SIZES.items() if name not in ("point_width", "num_points")} | {"max_tokens": 400}
VAE: dict[str, Any] = {"codebook_size": 9, "codebook_dim": 6, "width": 16, "depth": 1, "heads": 2, "hidden": 24, "encoder_depth": 1}


@pytest.fixture(scope="module")
def meshes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_meshes(tmp_path_factory.mktemp("meshes") / "all"))


def settings(meshes: str, **options: Any) -> mesh_generation.Config:
    return mesh_generation.Config(**{"data": meshes, "num_points": 20, "point_encoder": POINTS, "model": MODEL, "lr": 1e-3, **options})


def vae_settings(meshes: str, **options: Any) -> mesh_vae.Config:
    bounds = MeshBounds(max_faces=80)
    return mesh_vae.Config(
        **{"data": meshes, "num_points": 20, "point_encoder": POINTS, "model": VAE, "lr": 1e-3, "bounds": bounds, **options}
    )


def context(step: int = 0) -> StepContext:
    return StepContext(step, 0, torch.device("cpu"))


def runs(build: Any, tmp_path: Path) -> None:
    config = TrainConfig(out=str(tmp_path / "a"), steps=4, batch_size=3, checkpoint_every=2, log_every=1)
    Trainer(build(), config).run()
    torn = TrainConfig(**{**config.__dict__, "out": str(tmp_path / "b")})
    Trainer(build(), torn).run(until=2)
    Trainer(build(), torn).run()


@pytest.mark.parametrize(
    "options", [{"optimizer": "muon"}, {"model": {**MODEL, "layout": "faces", "max_tokens": 800}}], ids=["muon", "faces"]
)
def test_a_run_ends_in_a_pipeline_and_resumes_exactly(options: Any, meshes: str, tmp_path: Path) -> None:
    runs(lambda: mesh_generation.build(settings(meshes, **options)), tmp_path)
    one, two = (GenPipeline.from_pretrained(str(tmp_path / out / "export")) for out in "ab")
    assert isinstance(one, MeshAnythingPipeline) and one.config["num_points"] == 20
    for part in ("transformer", "point_encoder"):
        states: list[dict[str, Tensor]] = [getattr(pipe, part).state_dict() for pipe in (one, two)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    one.set_progress_bar_config(disable=True)
    assert one(trimesh.creation.box(), max_faces=2).reports[0].faces >= 1


def test_ids_of_a_step_are_legal_sequences_and_differ_from_step_to_step(meshes: str) -> None:
    task = mesh_generation.build(settings(meshes))
    batch = {"index": torch.tensor([0, 1, 1])}
    items = task.draws.items(batch, context())
    ids = task.ids(items, torch.device("cpu"))
    for row in ids.tolist():
        assert check_sequence(task.layout, row) == ""
    assert not torch.equal(ids[1], ids[2]), "each is augmented by itself"
    again = task.ids(task.draws.items(batch, context()), torch.device("cpu"))
    assert torch.equal(ids, again)
    plain = mesh_generation.build(settings(meshes, augment=False))
    one, other = (plain.ids(plain.draws.items(batch, context(step)), torch.device("cpu")) for step in (0, 1))
    assert torch.equal(one, other)


def test_rough_points_belong_to_the_same_meshes(meshes: str) -> None:
    batch = {"index": torch.tensor([0, 1, 1])}
    clean, rough = (mesh_generation.build(settings(meshes, point_noise=noise)).draws.items(batch, context()) for noise in (0.0, 0.1))
    moved = []
    for one, other in zip(clean, rough, strict=True):
        assert (one.mesh.faces == other.mesh.faces).all() and (one.mesh.vertices == other.mesh.vertices).all()
        moved.append(abs(one.points - other.points)[:, :3].mean())
    assert 0 < min(moved) < max(moved) < 0.1, "each as rough as its own draw"
    with pytest.raises(ValueError, match="point_noise"):
        settings(meshes, point_noise=-1.0)


def test_points_have_the_normals_of_the_given_faces(meshes: str) -> None:
    config = settings(meshes, mirror=True, bounds=MeshBounds(max_faces=20))  # the box
    items = mesh_generation.build(config).draws.items({"index": torch.zeros(12, dtype=torch.long)}, context())
    for item in items:
        points, normals = item.points[:, :3].astype(float), item.points[:, 3:].astype(float)
        middle = (points.max(0) + points.min(0)) / 2
        assert ((points - middle) * normals).sum(1).min() > 0, "outward, mirrored or not"


def test_groups_of_like_length_have_the_loss_of_the_whole_batch(meshes: str) -> None:
    found = []
    for groups in (1, 2):
        task = mesh_generation.build(settings(meshes, length_groups=groups))
        phase = next(iter(task.step({"index": torch.tensor([1, 0, 1])}, context())))
        phase.loss.backward()
        found.append((phase, {name: p.grad for name, p in task.modules["model"].named_parameters()}))
    (one, grads), (two, others) = found
    torch.testing.assert_close(one.loss, two.loss)
    for name in one.logs:
        torch.testing.assert_close(one.logs[name], two.logs[name])
    for name, grad in grads.items():
        torch.testing.assert_close(grad, others[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="length_groups must be at least 1, got 0"):
        settings(meshes, length_groups=0)


def test_meshes_that_the_model_cannot_hold_are_left_out_and_counted(meshes: str) -> None:
    task = mesh_generation.build(settings(meshes, model={**MODEL, "max_tokens": 70}))
    assert [mesh.name for mesh in task.samples.meshes] == ["box"]
    assert task.samples.refused["too long, or too much lost in quantising"] == 1
    assert [mesh.name for mesh in mesh_generation.build(settings(meshes, max_token_ratio=0.5)).samples.meshes] == ["ball"]
    with pytest.raises(ValueError, match="none of 4 meshes can be used"):
        mesh_generation.build(settings(meshes, model={**MODEL, "max_tokens": 40}))


def test_the_loss_counts_what_it_should() -> None:
    logits, ids = torch.randn(2, 5, 7), torch.tensor([[0, 4, 5, 1, 2], [0, 4, 1, 2, 2]])
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    torch.testing.assert_close(next_token_loss(logits, ids), torch.cat([losses[0, :4], losses[1, :3]]).mean())
    released = torch.cat([losses[0], losses[1, :4]]).mean()
    torch.testing.assert_close(next_token_loss(logits, ids, score_first_pad=True), released)


def test_the_encoder_learns_along_or_stays_as_it_is(meshes: str, tmp_path: Path) -> None:
    task = mesh_generation.build(settings(meshes))
    next(iter(task.step({"index": torch.tensor([0])}, context()))).loss.backward()
    names = [name for name, p in task.modules["model"].named_parameters() if p.grad is None]
    assert not names, names
    model: Any = task.modules["model"]
    model.point_encoder.save_pretrained(tmp_path / "encoder")
    frozen = mesh_generation.build(settings(meshes, point_encoder={}, pretrained_point_encoder=str(tmp_path / "encoder")))
    assert not any("point_encoder" in name for name, _ in frozen.modules["model"].named_parameters())
    assert "point_encoder" in frozen.frozen
    with pytest.raises(ValueError, match="either point_encoder"):
        settings(meshes, point_encoder={})


def test_a_mesh_vae_trains_resumes_and_makes_codes_for_a_generator(meshes: str, tmp_path: Path) -> None:
    runs(lambda: mesh_vae.build(vae_settings(meshes)), tmp_path)
    folder = tmp_path / "a" / "export"
    one, two = (MeshVQModel.from_pretrained(tmp_path / out / "export" / "vq_model").state_dict() for out in "ab")
    assert all(torch.equal(one[key], two[key]) for key in one)
    options: dict[str, Any] = {
        "vq_model": str(folder / "vq_model"), "point_encoder": {}, "pretrained_point_encoder": str(folder / "point_encoder"),
        "model": {**MODEL, "max_tokens": 722}, "bounds": MeshBounds(max_faces=80),
    }  # fmt: skip
    task = mesh_generation.build(settings(meshes, **options))
    ids = task.ids(task.draws.items({"index": torch.tensor([0, 1])}, context()), torch.device("cpu"))
    assert ids.max() < 3 + 9 and (ids[0] > 2).sum() % 9 == 0
    assert isinstance(task.pipeline(task.modules["model"]).vq_model, MeshVQModel)
    next(iter(task.step({"index": torch.tensor([0])}, context()))).loss.backward()


def test_the_second_stage_trains_the_decoder_on_drawn_codes(meshes: str, tmp_path: Path) -> None:
    first = mesh_vae.build(vae_settings(meshes))
    first.export(first.modules, tmp_path)
    options: dict[str, Any] = {
        "start": str(tmp_path / "vq_model"), "only_decoder": True, "noise": 0.5, "point_encoder": {},
        "pretrained_point_encoder": str(tmp_path / "point_encoder"),
    }  # fmt: skip
    task = mesh_vae.build(vae_settings(meshes, **options))
    batch = {"index": torch.tensor([0, 1])}
    phase = next(iter(task.step(batch, context())))
    phase.loss.backward()
    trained = {name.split(".")[1] for name, p in task.modules["model"].named_parameters() if p.grad is not None}
    assert "blocks" in trained and not trained & {"encoder", "quantizer"}
    other = next(iter(task.step(batch, context(1))))
    assert float(phase.loss.detach()) != float(other.loss.detach()), "other noise, other codes"
    with pytest.raises(ValueError, match="give its folder as start"):
        vae_settings(meshes, only_decoder=True)


def test_the_published_course_of_the_rate() -> None:
    config = TrainConfig(out="x", steps=800, batch_size=1, schedule="whole_cosine", warmup=1, warmup_first=0.01, lr_floor=0.6)
    assert config.lr_factor(0) == pytest.approx(0.01) and config.lr_factor(400) == pytest.approx(0.8)
    assert config.lr_factor(800) == pytest.approx(0.6) and whole_cosine(0.0, 0.0, 0.5, 0.1) == 1
