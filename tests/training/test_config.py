"""Impossible settings are named; the learning-rate factor has its closed form."""

from __future__ import annotations

from typing import Any

import pytest

from genkit.training.config import ConfigError, TrainConfig


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("batch_size", 7),
        ("seed", -1),
        ("mixed_precision", "fp8"),
        ("grad_clip", 0.0),
        ("grad_clip", float("nan")),
        ("schedule", "linear"),
        ("warmup", 11),
        ("lr_floor", 1.5),
        ("ema_decay", 1.0),
        ("checkpoint_every", 0),
        ("trackers", ("mlflow",)),
        ("out", ""),
    ],
)
def test_impossible_value_is_an_error_that_names_the_key(key: str, value: Any) -> None:
    settings = {"out": "run", "steps": 10, "batch_size": 4, "accumulation": 2, key: value}
    with pytest.raises(ConfigError, match=rf"train\.{key} must be"):
        TrainConfig(**settings)


def test_first_update_of_a_warmup_has_a_rate_and_its_last_the_full_one() -> None:
    config = TrainConfig(out="run", steps=10, batch_size=4, warmup=4)
    assert [config.lr_factor(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert TrainConfig(out="run", steps=10, batch_size=4).lr_factor(0) == 1.0


def test_cosine_falls_from_one_to_its_floor() -> None:
    config = TrainConfig(out="run", steps=12, batch_size=4, warmup=2, schedule="cosine", lr_floor=0.2)
    factors = [config.lr_factor(step) for step in range(2, 13)]
    assert factors[0] == 1.0
    assert factors[5] == pytest.approx(0.6)
    assert factors[-1] == pytest.approx(0.2)
    assert factors == sorted(factors, reverse=True)


def test_only_settings_that_decide_the_weights_count_as_differences() -> None:
    saved = {"steps": 10, "batch_size": 4, "seed": 0, "out": "elsewhere", "log_every": 1, "trackers": ["wandb"]}
    assert TrainConfig(out="run", steps=20, batch_size=4).differences(saved) == []
    assert TrainConfig(out="run", steps=20, batch_size=8).differences(saved) == ["train.batch_size is 4 there and 8 here"]
    assert TrainConfig(out="run", steps=20, batch_size=4, schedule="cosine").differences(saved) == ["train.steps is 10 there and 20 here"]
