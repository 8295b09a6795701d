"""Metrics of the averaged weights while training: logged, resumable, refused early when they cannot be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from genkit.training.config import ConfigError, TrainConfig
from genkit.training.evaluation import EvaluationConfig
from genkit.training.loop import Trainer
from genkit.training.task import StepContext
from tests.training.toy import Regression


class Painter(Regression):
    """A regression whose first bias is the brightness of its pictures."""

    asked: list[list[int]]

    def generate(self, indices: Sequence[int], ctx: StepContext) -> Tensor:
        self.asked.append(list(indices))
        assert not ctx.ema["net"].training
        noise = torch.stack([torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in indices])
        return noise - 0.5 + ctx.ema["net"][0].bias[0].detach()  # type: ignore[index]


@pytest.fixture
def real(tmp_path: Path) -> Path:
    folder = tmp_path / "real"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def settings(tmp_path: Path, real: Path, **options: Any) -> TrainConfig:
    evaluate = EvaluationConfig(str(real), num_samples=5, batch_size=4, size=32, **options)
    return TrainConfig(str(tmp_path / "run"), steps=4, batch_size=4, evaluate_every=2, evaluate=evaluate, log_every=4)


def test_metrics_of_the_average_are_recorded_and_change_nothing(tmp_path: Path, real: Path) -> None:
    task = Painter()
    task.asked = []
    result = Trainer(task, settings(tmp_path, real)).run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line["eval/frechet-efficientnet-lite0"]) for line in lines if "eval/frechet-efficientnet-lite0" in line]
    assert [step for step, _ in found] == [2, 4] and found[0][1] != found[1][1] and all(value > 0 for _, value in found)
    assert task.asked == [[0, 1, 2, 3], [4]] * 2
    plain = Trainer(Regression(), TrainConfig(str(tmp_path / "plain"), steps=4, batch_size=4)).run()
    assert plain.losses == result.losses


def test_what_cannot_be_measured_is_refused_before_training(tmp_path: Path, real: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'fid'"):
        Trainer(Painter(), settings(tmp_path, real, metrics=("fdi",)))
    with pytest.raises(ConfigError, match="given where train.evaluate_every is"):
        TrainConfig(str(tmp_path), 4, 4, evaluate_every=2)
    with pytest.raises(ValueError, match="num_samples must be at least 2"):
        EvaluationConfig("x", num_samples=1)
    with pytest.raises(NotImplementedError, match="makes no pictures"):
        Trainer(Regression(), settings(tmp_path, real)).run()
