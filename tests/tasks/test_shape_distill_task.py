"""The stages of progressive flow distillation on small random networks, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image

from genkit.data.shape_samples import ShapeSamples
from genkit.data.views import ViewDataset
from genkit.distill.progressive_flow import guided_velocity
from genkit.pipelines.base import GenPipeline
from genkit.pipelines.shape import ShapePipeline
from genkit.schedulers.flow_matching import interpolate
from genkit.tasks.shape_distill import Config, ShapeDistillTask, build
from genkit.training.config import TrainConfig
from genkit.training.loop import Trainer
from genkit.training.task import StepContext
from tests.tasks.toy_shapes import shape_data, shape_teacher


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Prepared boxes and a teacher with guidance."""
    folder = tmp_path_factory.mktemp("data")
    found = shape_data(folder)
    shape_teacher().save_pretrained(folder / "teacher")
    return {"data": found["data"], "shapes": found["shapes"], "teacher": str(folder / "teacher")}


def settings(data: dict[str, str], **options: Any) -> Config:
    return Config(**{**data, "image_size": 32, "lr": 1e-3, "text_probability": 0.5, **options})


def train(config: Config, out: Path, until: int | None = None) -> str:
    run = TrainConfig(out=str(out), steps=4, batch_size=3, checkpoint_every=2, log_every=1, sample_every=4, ema_decay=0.9, ema_warmup=False)
    Trainer(build(config), run).run(until=until)
    return str(out / "export")


def batch_of(task: ShapeDistillTask) -> dict[str, torch.Tensor]:
    pictures = task.dataset()
    rows = [pictures[i] for i in (0, 5, 9)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def context(task: ShapeDistillTask, step: int = 3) -> StepContext:
    return StepContext(step, 0, torch.device("cpu"), {"student": task.raw("student")})


def test_the_stages_follow_each_other_and_resume_exactly(data: dict[str, str], tmp_path: Path) -> None:
    first = train(settings(data), tmp_path / "guidance")
    pipe = cast(ShapePipeline, GenPipeline.from_pretrained(first))
    assert pipe.transformer.config["guidance_embed"] and pipe.scheduler.config["steps"] == "uniform"
    assert pipe.config["max_guidance_scale"] == settings(data).guidance_range[1]
    with pytest.raises(ValueError, match=r"has learned scales up to \d, got guidance_scale=30"):
        pipe(Image.new("RGB", (16, 16)), guidance_scale=30)
    second = {"teacher": first, "stage": "consistency"}
    several = train(settings({**data, **second}, phases=5), tmp_path / "five")
    one = train(settings({**data, **second}, phases=1, start=several), tmp_path / "one")
    third = settings({**data, "teacher": first, "stage": "adversarial", "start": one}, phases=1)
    last = train(third, tmp_path / "adversarial")
    train(third, tmp_path / "torn", until=2)
    again = train(third, tmp_path / "torn")
    states = [cast(ShapePipeline, GenPipeline.from_pretrained(folder)).transformer.state_dict() for folder in (last, again)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    turbo = cast(ShapePipeline, GenPipeline.from_pretrained(last))
    turbo.set_progress_bar_config(disable=True)
    assert turbo.config["num_inference_steps"] == 5 and turbo.scheduler.config["phases"] == 100
    assert turbo("a table", generator=[1], octree_resolution=24, decoder="dense").meshes[0].is_watertight


def test_the_guided_teacher_is_what_the_student_learns(data: dict[str, str]) -> None:
    for share in (0.0, 1.0):
        task = build(settings(data, text_probability=share))
        batch, ctx = batch_of(task), context(task)
        tokens, mask = task.shape_data.condition(batch, ctx)
        assert (mask is not None) == bool(share)
        x, t, scale = torch.randn(3, 8, 4), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([1.0, 3.0, 5.0])
        tokens = torch.randn(3, 6, 12) if mask is None else tokens
        teacher = cast(Any, task.frozen["transformer"])
        found = task._guided(x, t, tokens, mask, scale)
        without = teacher(x, t, torch.zeros_like(tokens), encoder_attention_mask=mask).sample
        expected = guided_velocity(teacher(x, t, tokens, encoder_attention_mask=mask).sample, without, scale)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_a_student_starts_as_its_teacher_without_guidance(data: dict[str, str]) -> None:
    task = build(settings(data))
    x, t, tokens = torch.randn(2, 8, 4), torch.tensor([0.2, 0.7]), torch.randn(2, 5, 12)
    teacher, student = cast(Any, task.frozen["transformer"]), cast(Any, task.raw("student"))
    torch.testing.assert_close(student(x, t, tokens, torch.tensor([2.0, 7.0])).sample, teacher(x, t, tokens).sample)


@pytest.mark.parametrize(("stage", "phases"), [("consistency", 5), ("adversarial", 1)])
def test_who_receives_gradients(stage: Any, phases: int, data: dict[str, str], tmp_path: Path) -> None:
    first = train(settings(data), tmp_path / "guidance")
    task = build(settings({**data, "teacher": first}, stage=stage, phases=phases))
    batch = batch_of(task)
    target = build(settings({**data, "teacher": first}, stage=stage)).raw("student").requires_grad_(True)
    ctx = StepContext(3, 0, torch.device("cpu"), {"student": target})
    seen = []
    for phase in task.step(batch, ctx):
        for module in task.modules.values():
            module.zero_grad()
        phase.loss.backward()
        touched = {name: any(p.grad is not None and bool(p.grad.any()) for p in m.parameters()) for name, m in task.modules.items()}
        seen.append(phase.optimizer)
        assert touched["student"] == (phase.optimizer == "student")
        assert torch.isfinite(phase.loss)
        if phase.optimizer == "heads":
            assert touched["heads"]
        assert all(p.grad is None for p in (*target.parameters(), *task.frozen["transformer"].parameters()))
    assert seen == (["heads", "student"] if stage == "adversarial" else ["student"])


def test_the_students_point_lies_on_the_path(data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(settings(data), tmp_path / "guidance")
    task = build(settings({**data, "teacher": first}, stage="consistency", phases=5))
    seen: dict[str, Any] = {}
    import genkit.tasks.shape_distill as module

    def watch(student: Any, target: Any, **points: Any) -> torch.Tensor:
        seen.update(points)
        return student(points["x"], points["time"]).sum((1, 2))

    monkeypatch.setattr(module, "consistency_flow_loss", watch)
    batch, ctx = batch_of(task), context(task)
    next(iter(task.step(batch, ctx)))
    expected = interpolate(task.shape_data.latent(batch, ctx), ctx.randn("noise", 3, 8, 4), seen["time"])
    torch.testing.assert_close(seen["x"], expected)
    assert (seen["time"] < seen["next_time"]).all() and (seen["next_time"] <= seen["end"]).all()


def test_bad_settings_are_named(data: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"guidance_range must ascend from at least 0, got \[8, 1\]"):
        settings(data, guidance_range=(8, 1))
    with pytest.raises(ValueError, match=r"phases must lie in 1 \.\. 100 \(table\), got 0"):
        settings(data, phases=0)
    with pytest.raises(ValueError, match="needs a teacher that came out of the guidance stage"):
        build(settings(data, stage="consistency"))
    with pytest.raises(ValueError, match="is of class ENATPipeline, not ShapePipeline"):
        build(settings({**data, "teacher": "genkit/enat-lowpoly"}))
    views, samples = ViewDataset(data["data"], 32), ShapeSamples(data["shapes"])
    teacher = shape_teacher(guidance_embed=True)
    with pytest.raises(ValueError, match=r"feature_blocks must lie in 0 \.\. 1, got \[2\]"):
        ShapeDistillTask(settings(data, stage="adversarial", feature_blocks=(2,)), views, samples, teacher)
