"""The distillation task: which networks learn, order of updates, adapters, alarms, bad input, export."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from genkit.distill.alarms import AlarmConfig, CollapseAlarm, CollapseError
from genkit.distill.methods import METHODS, MeanFlow, UpdatePlan, Work, make_method
from genkit.pipelines.base import GenPipeline
from genkit.tasks.distill import Config, DistillTask, Samples
from genkit.training.config import TrainConfig
from genkit.training.loop import NonFiniteError, Trainer
from genkit.training.task import StepContext
from tests.distill.toy import denoiser, pictures, teacher

ROLES = {"sim": {"student", "critic"}, "consistency_distillation": {"student"}, "consistency_training": {"student"}}
TRAINABLE = sorted(set(METHODS) - {"mean_flow"})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(pictures(tmp_path_factory.mktemp("data")))


def task(data: str | None, name: str = "sim", **options: Any) -> DistillTask:
    method = {"name": name, **options.pop("method", {})}
    options.setdefault("lr", 1e-3)
    built = DistillTask(Config(teacher="toy", method=method, data=data, image_size=8, **options), teacher())
    built.dataset()
    return built


def batch_of(built: DistillTask, count: int = 4) -> dict[str, Tensor]:
    rows = [built.dataset()[i] for i in range(count)]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def context(step: int = 0) -> StepContext:
    return StepContext(step, 0, torch.device("cpu"))


def gradients(modules: dict[str, nn.Module]) -> dict[str, float]:
    return {n: sum(float(p.grad.abs().sum()) for p in m.parameters() if p.grad is not None) for n, m in modules.items()}


def graphs_of(module: nn.Module) -> list[bool]:
    """Return a list that grows with each evaluation of a module: whether it kept a graph."""
    found: list[bool] = []
    module.register_forward_hook(lambda *args: found.append(torch.is_grad_enabled()))
    return found


@pytest.mark.parametrize("name", TRAINABLE)
def test_each_phase_reaches_the_network_it_trains_and_no_other(name: str, data: str) -> None:
    built = task(data, name)
    if "critic" in built.modules:  # while critic and teacher agree there is nothing to learn
        built.modules["critic"].load_state_dict(denoiser(seed=5).state_dict())
    watched = {**built.modules, "teacher": built.frozen["teacher"]}
    phases = 0
    for phase in built.step(batch_of(built), context()):
        phases += 1
        phase.loss.backward()
        found = gradients(watched)
        allowed = {"student"} if phase.optimizer == "student" else {"critic", "head"}
        assert {role for role, size in found.items() if size} <= allowed
        assert found[phase.optimizer] > 0
        for module in watched.values():
            module.zero_grad(set_to_none=True)
            assert all(p.requires_grad for p in module.parameters()) or module is watched["teacher"]
    expected = {"dmd2": 6, "f_distill": 6, "consistency_distillation": 1, "consistency_training": 1}.get(name, 2)
    assert phases == expected


def test_mean_flow_trains_its_student_alone() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 2)
    images = torch.randn(5, 2)

    def average(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return net(torch.cat([x, r[:, None], t[:, None]], dim=1))

    def never(*args: object) -> Tensor:
        raise AssertionError("MeanFlow asks no other network")

    def scalar(name: str, kind: str) -> Tensor:
        return torch.randn(5) if kind == "normal" else torch.rand(5)

    work = Work(never, never, never, lambda name: torch.randn(5, 2), scalar, {}, mean_velocity=average, images=images)
    (phase,) = MeanFlow().step(work)
    phase.loss.backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in net.parameters())
    assert MeanFlow.uses == {"images", "two_times"}


def test_sequential_and_naive_training_agree(data: str) -> None:
    ends = []
    for sequential in (True, False):
        built = task(data, method={"plan": {"sequential": sequential}})
        for phase in built.step(batch_of(built), context()):
            phase.loss.backward()
        ends.append([p.grad.clone() for p in built.modules["student"].parameters() if p.grad is not None])
    for mine, theirs in zip(*ends, strict=True):
        assert_close(mine, theirs, rtol=1e-3, atol=1e-7)


def test_plan_orders_the_updates(data: str) -> None:
    built = task(data, method={"plan": {"critic_updates": 3, "student_start": 2}})
    names = [[phase.optimizer for phase in built.step(batch_of(built), context(step))] for step in (1, 2)]
    assert names == [["critic"] * 3, ["critic"] * 3 + ["student"]]
    with pytest.raises(ValueError, match="at least one critic update"):
        UpdatePlan(critic_updates=0)


def test_pictures_are_reused_between_critic_and_student(data: str) -> None:
    for reuse, made in ((True, 2), (False, 3)):
        built = task(data, method={"plan": {"reuse": reuse}})
        graphs = graphs_of(built.modules["student"])
        list(built.step(batch_of(built), context()))
        assert len(graphs) == made
        assert graphs.count(True) == 1


@pytest.mark.parametrize("name", ["sim", "consistency_training"])
def test_a_run_changes_the_student_resumes_exactly_and_exports_one_step(name: str, data: str, tmp_path: Path) -> None:
    config = TrainConfig(out=str(tmp_path / "a"), steps=4, batch_size=4, checkpoint_every=2, log_every=1, sample_every=4)
    Trainer(task(data, name), config).run()
    torn = TrainConfig(**{**config.__dict__, "out": str(tmp_path / "b")})
    Trainer(task(data, name), torn).run(until=2)
    Trainer(task(data, name), torn).run()
    ends = [GenPipeline.from_pretrained(tmp_path / out / "export") for out in "ab"]
    pictures_of = [pipe(["red", "blue"], generator=[1, 2], output_type="pt").images for pipe in ends]
    assert_close(pictures_of[0], pictures_of[1], rtol=0, atol=0)
    before = task(data, name)
    first = before.pipeline(before.modules["student"].eval())(["red", "blue"], generator=[1, 2], output_type="pt").images
    assert type(ends[0]).__name__ == "OneStepPipeline" and not torch.equal(first, pictures_of[0])
    assert (tmp_path / "a" / "samples").is_dir()


def test_muon_steps_student_and_critic(data: str, tmp_path: Path) -> None:
    built = task(data, optimizer="muon")
    before = copy.deepcopy(built.modules["student"].state_dict())
    Trainer(built, TrainConfig(out=str(tmp_path), steps=2, batch_size=4, checkpoint_every=2, ema_decay=0.0)).run()
    changed = [key for key, value in built.raw("student").state_dict().items() if not torch.equal(value, before[key])]
    assert len(changed) > 0.9 * len(before)
    with pytest.raises(ValueError, match="optimizer muon is for whole networks"):
        task(data, optimizer="muon", lora=2)


def test_adapters_share_one_frozen_network(data: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    built = task(data, lora=2)
    assert set(built.modules) == {"alarm", "network"}
    sizes = {role: sum(p.numel() for p in built._parameters(role)) for role in ("student", "critic")}
    assert sizes["student"] == sizes["critic"] > 0
    batch, kept = batch_of(built), {n: p.clone() for n, p in built.modules["network"].named_parameters() if not p.requires_grad}
    with torch.no_grad():
        work = built.work(batch, context())
        z = work.normal("z")
        before = work.generate(z, False)
        labels = built.table.pick(batch["index"], context())["labels"]  # type: ignore[union-attr]
        assert_close(before, built.frozen["teacher"](2.5 * z, 2.5, labels).sample, rtol=1e-5, atol=1e-5)
    config = TrainConfig(out=str(tmp_path / "lora"), steps=3, batch_size=4, checkpoint_every=3, log_every=1, ema_decay=0.0)
    Trainer(built, config).run()
    for name, value in built.raw("network").named_parameters():
        if name in kept:
            assert torch.equal(value, kept[name])
    with torch.no_grad():
        after = built.work(batch, context()).generate(z, False)
        merged = built.student_of(built.raw("network"))
        assert_close(merged(2.5 * z, 2.5, labels).sample, after, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-4)
    pipe = GenPipeline.from_pretrained(tmp_path / "lora" / "export")
    assert not any("lora" in name for name, _ in pipe.unet.named_parameters())


def test_a_collapsing_student_is_stopped_by_name() -> None:
    alarm = CollapseAlarm(AlarmConfig(settle=2, patience=3))
    for step in range(4):
        alarm.watch(step, torch.tensor(1.0), torch.tensor(0.1))
    saved = copy.deepcopy(alarm.state_dict())
    for step in (4, 5):
        alarm.watch(step, torch.tensor(0.1), torch.tensor(0.1))
    with pytest.raises(CollapseError, match=r"step 6.*vary by 0.1 \(first 1\)"):
        alarm.watch(6, torch.tensor(0.1), torch.tensor(0.1))
    alarm.load_state_dict(saved)
    alarm.watch(9, torch.tensor(0.1), torch.tensor(0.1))
    with pytest.raises(CollapseError, match="not finite"):
        alarm.watch(10, torch.tensor(1.0), torch.tensor(float("nan")))
    alarm.watch(11, torch.tensor(float("nan")), torch.tensor(0.1))  # a batch of one has no deviation: not watched


def test_a_critic_that_is_not_finite_is_named(data: str, tmp_path: Path) -> None:
    built = task(data)
    with torch.no_grad():
        next(built.modules["critic"].parameters()).fill_(float("nan"))
    config = TrainConfig(out=str(tmp_path), steps=1, batch_size=4, checkpoint_every=1)
    with pytest.raises(NonFiniteError, match="loss of optimizer 'critic' is nan"):
        Trainer(built, config).run()


def test_conditions_of_teachers_without_pictures(tmp_path: Path) -> None:
    by_class = task(None)
    assert [len(by_class.dataset()), by_class.distinct] == [2, [0, 1]]
    (tmp_path / "prompts.txt").write_text("red\n\nblue\nred\n")
    assert len(task(str(tmp_path / "prompts.txt")).dataset()) == 3
    free = DistillTask(Config(teacher="toy", data=None, image_size=8), teacher(label_dim=0))
    assert isinstance(free.dataset(), Samples)
    phases = list(free.step({"index": torch.zeros(3, dtype=torch.long)}, context()))
    assert [phase.optimizer for phase in phases] == ["critic", "student"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": {"name": "smi"}}, "unknown distillation method 'smi'.*Did you mean 'sim'"),
        ({"guidance_scale": 2.0, "free": True}, "needs a teacher with conditions"),
        ({"sigma_init": -1.0}, "sigma_init must be above 0"),
        ({"method": {"name": "dmd2"}, "data": None}, "learns from real pictures"),
        ({"image_size": 4, "method": {"name": "dmd2"}}, r"shape \[3, 8, 8\], the data has \[3, 4, 4\]"),
        ({"lora": 2, "student": "other"}, "cannot start from another"),
        ({"method": {"name": "mean_flow"}}, "EDMUNet2DModel has one"),
    ],
)
def test_what_does_not_fit_together_is_refused(options: dict[str, Any], message: str, data: str) -> None:
    is_free = options.pop("free", False) if "free" in options else False
    settings = {"teacher": "toy", "data": data, "image_size": 8, **{k: v for k, v in options.items() if k != "free"}}
    options["free"] = is_free
    with pytest.raises(ValueError, match=message):
        DistillTask(Config(**settings), teacher(label_dim=0 if is_free else 2))


def test_levels_outside_the_teachers_range_and_other_students_are_refused(data: str, tmp_path: Path) -> None:
    pipe = teacher()
    pipe.unet.preconditioner.sigma_max = 10.0
    with pytest.raises(ValueError, match="levels: noise level 24"):
        DistillTask(Config(teacher="toy", data=data, image_size=8), pipe)
    teacher(label_dim=0).unet.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="teacher and student differ in label_dim: 2 and 0"):
        task(data, student=str(tmp_path / "other"))


def test_a_batch_of_one_is_refused_where_weights_are_averaged(data: str) -> None:
    built = task(data, "f_distill", method={"plan": {"critic_updates": 1}})
    with pytest.raises(ValueError, match="batch of one"):
        list(built.step(batch_of(built, 1), context()))


def test_methods_take_their_options_by_name() -> None:
    assert make_method("sim", distance="l2").rule.distance == "l2"  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="huber"):
        make_method("sim", huber=1)
    with pytest.raises(ValueError, match="goes with DMD's rule"):
        make_method("sim", gan={"weight": 1.0})


@pytest.mark.slow
@pytest.mark.parametrize("method", [{"name": "sim"}, {"name": "dmd2", "plan": {"critic_updates": 2}}])
def test_two_processes_train_what_one_trains(method: dict[str, Any], data: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("processes.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29512"]
    for name, command in (("one", [sys.executable]), ("two", launch)):
        config = {"out": str(tmp_path / name), "steps": 3, "batch_size": 4, "checkpoint_every": 3, "log_every": 1}
        arguments = [*command, str(script), data, json.dumps(method), json.dumps(config)]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:6000]
    assert "processes 2" in done.stdout
    ends = [load_file(tmp_path / name / "checkpoints" / "step-00000003" / "student.ema.safetensors") for name in ("one", "two")]
    for key, value in ends[0].items():
        assert_close(ends[1][key], value, rtol=1e-3, atol=2e-5)
