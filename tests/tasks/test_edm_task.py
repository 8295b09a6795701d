"""Training of EDM denoisers: text, classes, nothing; the run is exact and ends in a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from genkit.data.images import open_dataset
from genkit.pipelines.base import GenPipeline
from genkit.tasks.edm import Config, EDMTask, ModelConfig, SamplingConfig
from genkit.training.config import TrainConfig
from genkit.training.loop import Trainer
from genkit.training.task import StepContext
from tests.distill.toy import UNET, pictures
from tests.pipelines.toy import text_parts


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(pictures(tmp_path_factory.mktemp("data")))


def task(data: str, text: bool = False, **options: Any) -> EDMTask:
    config = Config(data=data, image_size=8, model=ModelConfig(unet=UNET), sampling=SamplingConfig(num_inference_steps=2), **options)
    parts = text_parts() if text else None
    return EDMTask(config, open_dataset(data, 8), (parts["text_encoder"], parts["tokenizer"]) if parts else None)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("condition", ["text", "classes", "nothing"])
def test_a_run_ends_in_a_pipeline(condition: str, optimizer: str, data: str, tmp_path: Path) -> None:
    def build() -> EDMTask:
        return task(data, condition == "text", classes=condition == "classes", optimizer=optimizer)

    config = TrainConfig(out=str(tmp_path / "a"), steps=4, batch_size=4, checkpoint_every=2, log_every=1, sample_every=4)
    result = Trainer(build(), config).run()
    assert result.losses["main"] > 0
    torn = TrainConfig(**{**config.__dict__, "out": str(tmp_path / "b")})
    Trainer(build(), torn).run(until=2)
    Trainer(build(), torn).run()
    prompt = None if condition == "nothing" else "red"
    images = []
    for out in "ab":
        pipe = GenPipeline.from_pretrained(tmp_path / out / "export")
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(prompt, generator=[1], output_type="pt").images)
    assert type(pipe).__name__ == "EDMPipeline" and torch.equal(*images)


def test_the_null_condition_comes_as_often_as_asked(data: str) -> None:
    built, rows = task(data, null_probability=0.5), []
    built.dataset()
    built.modules["unet"].register_forward_hook(lambda module, args, output: rows.append(args[2]))
    batch = {"image": torch.zeros(64, 3, 8, 8), "index": torch.arange(64) % 12}
    list(built.step(batch, StepContext(0, 0, torch.device("cpu"))))
    empty = (rows[0].abs().sum(1) == 0).float().mean()
    assert 0.3 < float(empty) < 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"null_probability": 2.0}, "null_probability must lie in"),
        ({"lr": 0.0}, "lr and prompts_per_picture"),
        ({"text_encoder": "a"}, "give both or none"),
        ({"levels": {"name": "normal"}}, "unknown law"),
        ({"flip": True, "text_encoder": "a", "tokenizer": "b"}, "may name a side"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)


def test_views_are_asked_of_turntables_only(data: str) -> None:
    with pytest.raises(ValueError, match="holds single pictures"):
        task(data, views=(0,)).dataset()
