"""What a run records: grids, tensorboard, bar, and metrics that survive a crash."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from genkit.training.config import TrainConfig
from genkit.training.loop import Trainer
from genkit.training.trackers import image_grid
from tests.training.toy import Regression


def test_grid_places_pictures_row_by_row_with_a_border() -> None:
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 3, 3, 4)
    grid = image_grid(images)
    assert grid.shape == (2 * 5 + 2, 3 * 6 + 2, 3)
    assert grid.dtype == torch.uint8
    values = [
        int(grid[2 + row * 5 : 5 + row * 5, 2 + column * 6 : 6 + column * 6].float().mean()) for row, column in ((0, 0), (0, 2), (1, 1))
    ]
    assert values == [0, 128, 255]
    assert (grid[:2] == 255).all()
    with pytest.raises(ValueError, match=r"got \[5, 1, 3, 4\]"):
        image_grid(images[:, :1])


def test_tensorboard_gets_scalars_and_pictures(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    Trainer(Regression(), TrainConfig(str(tmp_path), 4, 4, log_every=2, sample_every=4, trackers=("tensorboard",))).run()
    events = reader.EventAccumulator(str(tmp_path / "logs" / "regression"))
    events.Reload()
    assert {"loss", "noise", "lr/main", "samples_per_second"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [2, 4]
    assert events.Tags()["images"] == ["planes"]


def test_missing_tracker_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"wandb is not installed; run `pip install 'genkit-torch\[track\]'`"):
        Trainer(Regression(), TrainConfig(str(tmp_path), 4, 4, trackers=("wandb",)))


def test_lines_after_the_checkpoint_and_a_torn_line_are_dropped_on_resume(tmp_path: Path) -> None:
    Trainer(Regression(), TrainConfig(str(tmp_path), 6, 4, log_every=1)).run(until=3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 7.0}\n{"step": 5, "lo')
    Trainer(Regression(), TrainConfig(str(tmp_path), 6, 4, log_every=1)).run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[3]["loss"] != 7.0


def test_terminal_gets_a_bar_with_speed_and_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    Trainer(Regression(), TrainConfig(str(tmp_path), 6, 4, log_every=2)).run()
    shown = capsys.readouterr().err
    assert "6/6" in shown
    assert "steps/s" in shown
    assert "main " in shown
