"""Training of video predictors: both models learn, losses are the published ones, exact resume, files at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from genkit.eval.prediction import prediction_metrics
from genkit.generators.mimo_vp import MIMOVP
from genkit.generators.predformer import PredFormer
from genkit.tasks.predictor import Config, PredictorLoss, PredictorTask, build
from genkit.training.config import TrainConfig
from genkit.training.evaluation import EvaluationConfig
from genkit.training.loop import Trainer
from genkit.training.task import StepContext
from tests.data.toy import strips, write_views

MODELS: dict[str, dict[str, Any]] = {
    "predformer": {"name": "predformer", "patch_size": 4, "dim": 16, "heads": 2, "dim_head": 8, "num_layers": 1, "layout": "TS"},
    "mimo_vp": {"name": "mimo_vp", "dim": 8, "heads": 2, "num_encoder_layers": 1, "num_decoder_layers": 2},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "muon"])
@pytest.mark.parametrize("name", MODELS)
def test_a_run_ends_in_a_predictor(name: str, optimizer: str, tmp_path: Path) -> None:
    path = write_views(tmp_path / "train.parquet", list(strips()))

    def fresh() -> PredictorTask:
        return build(Config(data=str(path), image_size=8, num_frames=2, model=MODELS[name], optimizer=optimizer))  # type: ignore[arg-type]

    config = TrainConfig(out=str(tmp_path / "a"), steps=4, batch_size=3, checkpoint_every=2, log_every=1, sample_every=4)
    Trainer(fresh(), config).run()
    torn = TrainConfig(**{**config.__dict__, "out": str(tmp_path / "b")})
    Trainer(fresh(), torn).run(until=2)
    Trainer(fresh(), torn).run()
    kind: Any = PredFormer if name == "predformer" else MIMOVP
    given = torch.rand(1, 2, 3, 8, 8)
    with torch.no_grad():
        one, two = (kind.from_pretrained(tmp_path / out / "export").eval()(given).frames for out in "ab")
    assert torch.equal(one, two)
    assert (tmp_path / "a" / "samples").is_dir()


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_the_published_ones(name: str) -> None:
    torch.manual_seed(0)
    options = {key: value for key, value in MODELS[name].items() if key != "name"}
    model: Any = PredFormer(sample_size=8, num_frames=2, **options) if name == "predformer" else MIMOVP(**options)
    given, future = torch.rand(2, 2, 1, 8, 8) * 2 - 1, torch.rand(2, 2, 1, 8, 8) * 2 - 1
    loss = PredictorLoss(model)(given, future)
    last = (model(given).frames - future) / 2
    if name == "predformer":
        assert_close(loss, last.square().mean(), rtol=1e-5, atol=1e-6)
        return
    single = MIMOVP(**{**options, "num_decoder_layers": 1})
    single.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("decoder.1")})
    first = (single(given).frames - future) / 2
    expected = [10 * error.square().mean() + error.abs().mean() for error in (first, last)]
    assert_close(loss, torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)


def test_a_predictor_learns_to_move_sprites(tmp_path: Path) -> None:
    np.save(tmp_path / "digits.npy", np.full((1, 28, 28), 255, np.uint8))
    config = Config(
        sprites=str(tmp_path / "digits.npy"), sequences=64, image_size=32, num_frames=2, model={**MODELS["predformer"], "patch_size": 8}
    )
    losses = [Trainer(build(config), TrainConfig(out=str(tmp_path / str(n)), steps=n, batch_size=16)).run().losses["main"] for n in (1, 40)]
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give data or sprites"),
        ({"data": "a", "sprites": "b"}, "give data or sprites"),
        ({"data": "a", "model": {"name": "predforme"}}, "predformer"),
        ({"data": "a", "num_frames": 0}, "num_frames"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)


def test_predictions_are_judged_while_training(tmp_path: Path) -> None:
    path = write_views(tmp_path / "train.parquet", list(strips()))
    built = build(Config(data=str(path), image_size=8, num_frames=2, model=MODELS["predformer"]))
    evaluate = EvaluationConfig(str(path), metrics=("mse", "ssim", "frechet-clips"), num_samples=3, batch_size=2, size=32)
    context = StepContext(0, 0, torch.device("cpu"), {"predictor": built.modules["predictor"].eval()})
    with torch.no_grad():
        found = built.evaluate(evaluate, context)
        truth = torch.stack([built.data[i]["frames"] for i in range(3)])
        made = built.modules["predictor"].model(truth[:, :2]).frames  # type: ignore[operator]
    assert_close(found["mse"], float(prediction_metrics(made, truth[:, 2:])["mse"].mean()), rtol=1e-6, atol=0)
    assert set(found) == {"mse", "ssim", "frechet-clips"} and found["frechet-clips"] > 0
    with pytest.raises(ValueError, match="Did you mean 'mse'"):
        built.check_evaluation(EvaluationConfig(str(path), metrics=("msee",)))
