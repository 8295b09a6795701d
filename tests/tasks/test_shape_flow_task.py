"""Training of the shape transformer: pictures and captions of prepared shapes; exact resume; a pipeline at the end."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from torch import Tensor

from genkit.conditioners.pictures import encode_pictures
from genkit.data.rendering import turntable
from genkit.data.shape_samples import ShapeSamples
from genkit.data.views import ViewDataset
from genkit.pipelines.base import GenPipeline
from genkit.pipelines.shape import ShapePipeline
from genkit.tasks._shape_data import ConditionPictures, open_vaes, shapes_of
from genkit.tasks.shape_flow import Config, ShapeFlowTask, TimesConfig, build
from genkit.training.config import TrainConfig
from genkit.training.evaluation import EvaluationConfig
from genkit.training.loop import Trainer
from genkit.training.task import StepContext
from tests.data.toy import write_views
from tests.pipelines.toy import text_parts, toy_tokenizer
from tests.tasks.toy_shapes import ENCODER, MODEL, shape_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return shape_data(tmp_path_factory.mktemp("data"))


def settings(data: dict[str, str], **options: Any) -> Config:
    return Config(**{**data, "image_size": 32, "image_encoder": ENCODER, "model": MODEL, "lr": 1e-3, "sampling_steps": 2, **options})


def task_of(config: Config, text: bool = False) -> ShapeFlowTask:
    if not text:
        return build(config)
    parts = text_parts()
    views = ViewDataset(config.data, config.image_size)
    return ShapeFlowTask(config, views, ShapeSamples(config.shapes), open_vaes(config.vae)[0], (parts["text_encoder"], parts["tokenizer"]))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_ends_in_a_pipeline_and_resumes_exactly(optimizer: Any, data: dict[str, str], tmp_path: Path) -> None:
    config = TrainConfig(out=str(tmp_path / "a"), steps=4, batch_size=3, checkpoint_every=2, log_every=1, sample_every=4)
    options: dict[str, Any] = {"optimizer": optimizer, "text_probability": 0.5}
    Trainer(task_of(settings(data, **options), text=True), config).run()
    torn = TrainConfig(**{**config.__dict__, "out": str(tmp_path / "b")})
    Trainer(task_of(settings(data, **options), text=True), torn).run(until=2)
    Trainer(task_of(settings(data, **options), text=True), torn).run()
    one, two = (GenPipeline.from_pretrained(str(tmp_path / out / "export")) for out in "ab")
    assert isinstance(one, ShapePipeline) and one.is_text_model
    for part in ("transformer", "image_encoder"):
        states = [getattr(pipe, part).state_dict() for pipe in (one, two)]
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    one.set_progress_bar_config(disable=True)
    picture = Image.fromarray(np.asarray(turntable(trimesh.creation.box((1, 1, 1)), 1, 32)[0]))
    output = one([picture, "a table"], generator=[1, 2], octree_resolution=24, decoder="dense")
    assert all(mesh.is_watertight for mesh in output.meshes)
    assert list((tmp_path / "a" / "samples").iterdir())


def test_metrics_of_shapes_made_from_views_while_training(data: dict[str, str], tmp_path: Path) -> None:
    evaluation = EvaluationConfig(data["data"], metrics=("volume-iou", "fscore@0.02"), num_samples=2, size=16)
    config = TrainConfig(out=str(tmp_path / "run"), steps=2, batch_size=3, evaluate_every=2, evaluate=evaluation)
    task = task_of(settings(data))
    Trainer(task, config).run()
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = next(row for row in logged if "eval/volume-iou" in row)
    assert 0 < found["eval/volume-iou"] < 1 and found["eval/without-surface"] == 0, "its VAE makes a ball of everything"
    with pytest.raises(ValueError, match="unknown metric of shapes"):
        task.check_evaluation(EvaluationConfig(data["data"], metrics=("fid",)))


def test_the_loss_is_that_of_the_straight_path(data: dict[str, str]) -> None:
    task = task_of(settings(data, null_probability=0.0, times=TimesConfig("logit_normal")))
    pictures = task.dataset()
    rows = [pictures[i] for i in (0, 5, 9)]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    ctx = StepContext(3, 0, torch.device("cpu"), {})
    phase = next(iter(task.step(batch, ctx)))
    posterior = [task.shape_data.latents[name][batch["shape"]] for name in ("mean", "std")]
    latent = posterior[0] + posterior[1] * ctx.randn("posterior", 3, *posterior[0].shape[1:])
    noise, t = ctx.randn("noise", 3, *latent.shape[1:]), torch.sigmoid(ctx.randn("time", 3))
    pipe: Any = task.pipeline(task.modules["model"])
    x = t[:, None, None] * latent + (1 - t[:, None, None]) * noise
    velocity = pipe.transformer(x, t, encode_pictures(batch["image"], pipe.image_encoder)).sample
    torch.testing.assert_close(phase.loss, (velocity - (latent - noise)).square().mean())
    phase.loss.backward()
    assert pipe.image_encoder.embeddings.cls_token.grad is not None


def test_pictures_are_cut_out_and_blank_ones_left_out(data: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    views, samples = ViewDataset(data["data"], 32), ShapeSamples(data["shapes"])
    shapes = shapes_of(samples, views)
    assert shapes == {0: 0, 1: 1, 2: 2}

    def darker(images: Tensor) -> Tensor:
        return torch.where(images > 0.9, images, images - 0.2)

    with caplog.at_level(logging.WARNING):
        pictures = ConditionPictures(views, shapes, None, 32, darker)
    assert len(pictures) == 11 and "1 of 12 pictures left out" in caplog.text
    item = pictures[4]
    assert int(item["shape"]) == 1 and item["image"].shape == (3, 32, 32)
    rows = (item["image"].amin(0) < 0.9).any(1).nonzero()[:, 0]
    assert abs((rows[0] + rows[-1]) / 2 - 15.5) <= 1  # centred
    assert (item["generated"] < item["image"] + 1e-3).float().mean() > 0.9
    assert len(ConditionPictures(views, shapes, [0], 32)) == 3


def test_condition_dropout_makes_zero_tokens(data: dict[str, str]) -> None:
    task = task_of(settings(data, null_probability=1.0))
    pictures = task.dataset()
    batch = {name: torch.stack([pictures[i][name] for i in range(2)]) for name in pictures[0]}
    seen: list[Tensor] = []
    task.raw("model").transformer.register_forward_hook(lambda module, args, output: seen.append(args[2]))  # type: ignore[union-attr]
    next(iter(task.step(batch, StepContext(0, 0, torch.device("cpu"), {}))))
    assert not seen[0].any()


def test_bad_settings_are_named(data: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"probabilities must lie in \[0, 1\], got {'text_probability': 2}"):
        settings(data, text_probability=2)
    with pytest.raises(ValueError, match="name an image encoder, a text encoder, or both"):
        settings(data, image_encoder={})
    with pytest.raises(ValueError, match="not both"):
        settings(data, pretrained_image_encoder="dino")
    with pytest.raises(ValueError, match=r"conditions of one width, got \[8, 12\]"):
        task_of(settings(data, image_encoder={**ENCODER, "hidden_size": 8}), text=True)
    others = write_views(tmp_path / "other.parquet", [np.zeros((32, 128, 3), np.uint8)], name=["something"])
    with pytest.raises(ValueError, match="is none of the 1 objects"):
        build(settings({**data, "data": str(others)}))


def test_pictures_pass_through_a_tokenizer_of_generated_ones(
    data: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy_tokenizer().save_pretrained(tmp_path / "vqvae")
    task = build(settings(data, picture_tokenizer=str(tmp_path / "vqvae"), generated_probability=1.0))
    with caplog.at_level(logging.WARNING):
        item = task.dataset()[0]
    assert "no object in what the tokenizer made" in caplog.text, "random weights make no objects, so the pictures stay"
    assert torch.equal(item["generated"], item["image"])
    Trainer(task, TrainConfig(out=str(tmp_path / "run"), steps=1, batch_size=2)).run()
