"""The loop: gradients, schedules, averages, records, errors, and runs that resume exactly."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from genkit.training import checkpoint
from genkit.training.config import ConfigError, TrainConfig
from genkit.training.loop import NonFiniteError, Trainer
from genkit.training.task import Batch, Phase, StepContext, Task
from tests.training.toy import Breaking, Regression, Rivals

SPEEDS = ("steps_per_second", "samples_per_second", "seconds")


def settings(out: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "out": str(out),
        "steps": 12,
        "batch_size": 8,
        "warmup": 3,
        "schedule": "cosine",
        "checkpoint_every": 4,
        "log_every": 2,
    }
    return TrainConfig(**{**values, **changes})


def assert_same_run(one: Path, other: Path, step: int = 12) -> None:
    """Assert that two runs ended in the same bits: weights, averages, optimizers, records."""
    folders = [checkpoint.folder_of(out, step) for out in (one, other)]
    names = sorted(path.name for path in folders[0].glob("*.safetensors"))
    assert names == sorted(path.name for path in folders[1].glob("*.safetensors"))
    for name in names:
        torch.testing.assert_close(load_file(folders[0] / name), load_file(folders[1] / name), rtol=0, atol=0)
    states = [torch.load(folder / "state.pt", weights_only=True) for folder in folders]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert records(one) == records(other)


def records(out: Path) -> list[dict[str, float]]:
    """Return a run's metrics without the speeds."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in SPEEDS} for line in lines]


def weights(task: Task) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for module in task.modules.values() for p in module.parameters()])


@pytest.mark.parametrize(
    ("kind", "changes"), [(Regression, {}), (Rivals, {"mixed_precision": "bf16"}), (Rivals, {"mixed_precision": "fp16", "accumulation": 2})]
)
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(kind: type[Regression], changes: dict[str, Any], tmp_path: Path) -> None:
    arguments = {"dropout": 0.2} if kind is Regression else {}
    Trainer(kind(**arguments), settings(tmp_path / "whole", **changes)).run()
    stopped = Trainer(kind(**arguments), settings(tmp_path / "parts", **changes)).run(until=5)
    assert (stopped.step, stopped.steps) == (5, 12)
    resumed = Trainer(kind(**arguments), settings(tmp_path / "parts", **changes)).run()
    assert resumed.step == 12
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_sigterm_writes_a_checkpoint_that_resumes_exactly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminated(Regression):
        def step(self, batch: Batch, ctx: StepContext) -> Iterator[Phase]:
            if ctx.step == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            yield from super().step(batch, ctx)

    result = Trainer(Terminated(), settings(tmp_path / "parts")).run()
    assert (result.step, result.stopped_by) == (7, signal.SIGTERM)
    assert "same command continues" in capsys.readouterr().err
    assert not (tmp_path / "parts" / "export").exists()
    Trainer(Regression(), settings(tmp_path / "parts")).run()
    Trainer(Regression(), settings(tmp_path / "whole")).run()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_data_workers_and_looking_at_samples_change_nothing(tmp_path: Path) -> None:
    Trainer(Regression(dropout=0.2), settings(tmp_path / "plain")).run()
    Trainer(Regression(dropout=0.2), settings(tmp_path / "busy", num_workers=1, sample_every=3)).run()
    assert_same_run(tmp_path / "plain", tmp_path / "busy")


@pytest.mark.parametrize("kind", [Regression, Rivals])
def test_accumulated_parts_give_the_result_of_the_whole_batch(kind: type[Regression], tmp_path: Path) -> None:
    whole, parts = kind(), kind()
    Trainer(whole, settings(tmp_path / "whole")).run()
    Trainer(parts, settings(tmp_path / "parts", accumulation=4)).run()
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=1e-6)


def test_one_step_is_the_textbook_step(tmp_path: Path) -> None:
    class Line(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.modules = {"net": nn.Linear(3, 1)}
            nn.init.zeros_(self.modules["net"].get_parameter("weight"))
            nn.init.zeros_(self.modules["net"].get_parameter("bias"))

        def optimizers(self) -> dict[str, torch.optim.Optimizer]:
            return {"main": torch.optim.SGD(self.modules["net"].parameters(), lr=0.1)}

        def step(self, batch: Batch, ctx: StepContext) -> Iterator[Phase]:
            yield Phase("main", (self.modules["net"](batch["x"]) - batch["y"]).square().mean())

    task = Line()
    trainer = Trainer(task, settings(tmp_path, steps=1, batch_size=37, warmup=0, schedule="constant", grad_clip=0.5))
    trainer.run()
    points = task.dataset()
    gradient = torch.cat([(-2 * points.y * points.x).mean(0), (-2 * points.y).mean(0)])
    torch.testing.assert_close(weights(task), -0.1 * gradient * 0.5 / gradient.norm(), rtol=1e-5, atol=1e-7)
    (record,) = records(tmp_path)
    assert record["grad_norm/main"] == pytest.approx(float(gradient.norm()), rel=1e-5)
    average = load_file(checkpoint.folder_of(tmp_path, 1) / "net.ema.safetensors")
    torch.testing.assert_close(average["weight"].flatten(), 0.9 * weights(task)[:3], rtol=1e-5, atol=1e-7)  # decay 1/10 at step 0


def test_second_phase_sees_the_first_update_and_touches_only_its_own_optimizer(tmp_path: Path) -> None:
    task = Rivals()
    Trainer(task, settings(tmp_path, steps=3, log_every=1)).run()
    for record in records(tmp_path):
        assert record["gap"] > 0
        assert {"loss/main", "loss/critic", "lr/main", "lr/critic", "grad_norm/main", "grad_norm/critic"} <= set(record)

    class OnlyMain(Rivals):
        def step(self, batch: Batch, ctx: StepContext) -> Iterator[Phase]:
            yield next(iter(super().step(batch, ctx)))

    lone, before = OnlyMain(), OnlyMain()
    Trainer(lone, settings(tmp_path / "lone", steps=3)).run()
    assert torch.equal(lone.modules["critic"].get_parameter("weight"), before.modules["critic"].get_parameter("weight"))
    assert not torch.equal(weights(lone), weights(before))


def test_run_learns_and_leaves_records_samples_and_export(tmp_path: Path) -> None:
    task = Regression()
    result = Trainer(task, settings(tmp_path, steps=150, warmup=10, sample_every=150, log_every=50)).run()
    assert result.losses["main"] < 0.2 < records(tmp_path)[0]["loss"]
    assert [record["step"] for record in records(tmp_path)] == [50, 100, 150]
    assert Image.open(tmp_path / "samples" / "planes-00000150.png").size == (3 * 6 + 2, 3 * 7 + 2)  # 8 pictures of 4 x 5, bordered
    exported = load_file(tmp_path / "export" / "net.safetensors")
    torch.testing.assert_close(exported, load_file(checkpoint.folder_of(tmp_path, 150) / "net.ema.safetensors"), rtol=0, atol=0)
    assert json.loads((tmp_path / "result.json").read_text())["num_processes"] == 1
    assert len(checkpoint.find(tmp_path)) == 3
    assert not task.frozen["scale"].weight.requires_grad


@pytest.mark.parametrize("accumulation", [1, 4])
def test_nonfinite_loss_stops_before_the_update_and_names_its_origin(accumulation: int, tmp_path: Path) -> None:
    task = Breaking(at=3)
    with pytest.raises(NonFiniteError, match="step") as caught:
        Trainer(task, settings(tmp_path, steps=30, accumulation=accumulation, checkpoint_every=1)).run()
    text = str(caught.value)
    step = len(task.seen[1:]) // accumulation - 1
    assert f"at step {step}: loss of optimizer 'main' is inf" in text
    assert "group 0: 4 non-finite gradients (net.0.weight" in text
    samples = text.split("Samples of the batch: ")[1].split(".")[0].split(", ")
    assert "5" in samples
    assert len(samples) == 8 // accumulation  # only the part that broke
    torch.testing.assert_close(weights(task), task.seen[-1], rtol=0, atol=0)
    assert checkpoint.find(tmp_path)[-1] == checkpoint.folder_of(tmp_path, step)


def test_infinite_gradient_of_a_finite_loss_stops_too(tmp_path: Path) -> None:
    class Root(Regression):
        def step(self, batch: Batch, ctx: StepContext) -> Iterator[Phase]:
            yield Phase("main", (self.modules["net"](batch["x"]) * 0).sqrt().sum())

    with pytest.raises(NonFiniteError, match=r"loss of optimizer 'main' is 0, gradient norm nan"):
        Trainer(Root(), settings(tmp_path)).run()


@pytest.mark.parametrize(("key", "value"), [("batch_size", 4), ("seed", 1), ("mixed_precision", "bf16"), ("steps", 24)])
def test_resuming_with_other_settings_is_an_error_that_names_them(key: str, value: Any, tmp_path: Path) -> None:
    Trainer(Regression(), settings(tmp_path)).run(until=2)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(checkpoint.CheckpointError, match=rf"train\.{key} is"):
        Trainer(Regression(), settings(tmp_path, **{key: value})).run()
    assert (tmp_path / "config.yaml").read_text() == before


def test_other_runs_and_other_models_are_not_mixed_up(tmp_path: Path) -> None:
    Trainer(Regression(), settings(tmp_path)).run(until=2)
    with pytest.raises(checkpoint.CheckpointError, match="checkpoints of another run"):
        Trainer(Regression(), settings(tmp_path)).run(resume="never")
    with pytest.raises(ValueError, match="unknown resume mode 'newest'"):
        Trainer(Regression(), settings(tmp_path)).run(resume="newest")
    wide = Regression()
    wide.modules["net"] = nn.Sequential(nn.Linear(3, 9), nn.SiLU(), nn.Dropout(0), nn.Linear(9, 1))
    with pytest.raises(checkpoint.CheckpointError, match=r"3 of the wrong shape: 0.bias .*0.weight expected \[9, 3\], found \[8, 3\]"):
        Trainer(wide, settings(tmp_path)).run()
    with pytest.raises(checkpoint.CheckpointError, match="missing, damaged"):
        Trainer(Rivals(), settings(tmp_path)).run()


def test_changed_task_settings_hold_and_are_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(Regression(lr=0.02), settings(tmp_path), {"task_config": {"lr": 0.02}, "train": {}}).run(until=6)
    Trainer(Regression(lr=0.01), settings(tmp_path), {"task_config": {"lr": 0.01}, "train": {}}).run(until=8)
    assert "Note: task_config.lr is 0.02 there and 0.01 here" in capsys.readouterr().err
    assert records(tmp_path)[-1]["lr/main"] == pytest.approx(0.01 * settings(tmp_path).lr_factor(7))


def test_task_mistakes_are_explained(tmp_path: Path) -> None:
    class Forgets(Rivals):
        def optimizers(self) -> dict[str, torch.optim.Optimizer]:
            return Regression.optimizers(self)

    class Detached(Regression):
        def step(self, batch: Batch, ctx: StepContext) -> Iterator[Phase]:
            yield Phase("main", self.modules["net"](batch["x"]).detach().mean())

    class Misnamed(Regression):
        def step(self, batch: Batch, ctx: StepContext) -> Iterator[Phase]:
            yield Phase("man", self.modules["net"](batch["x"]).mean())

    class Silent(Regression):
        def step(self, batch: Batch, ctx: StepContext) -> Iterator[Phase]:
            yield from ()

    for kind, message in (
        (Forgets, r"2 trainable parameters are in no optimizer: critic\.weight"),
        (Detached, "must be a scalar with a gradient"),
        (Misnamed, "Did you mean 'main'"),
        (Silent, "yielded no phase at step 0"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            Trainer(kind(), settings(tmp_path)).run()
    with pytest.raises(ConfigError, match=r"train\.batch_size must be a multiple of"):
        settings(tmp_path, accumulation=3)
