"""Distil a one-step student from a diffusion or flow teacher.

The teacher is any pipeline that `genkit.distill.families` knows; the method is named in the recipe (`genkit.distill.methods`). Student and
critic start as copies of the teacher, or as low-rank adapters on one shared frozen network.

Sources: those of the methods. Letters: b batch, c h w of a picture or latent.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from genkit.data.images import open_dataset
from genkit.distill.adapters import SharedNetwork
from genkit.distill.alarms import AlarmConfig, CollapseAlarm
from genkit.distill.denoising import Denoiser
from genkit.distill.discriminator import BottleneckHead
from genkit.distill.families import Condition, Family, family_of
from genkit.distill.methods import Method, Work, make_method
from genkit.distill.paths import guided
from genkit.tasks._conditions import ConditionTable
from genkit.tasks._prompts import prompts_of, rows_of_views
from genkit.training.task import Phase, StepContext, Task

NUM_SAMPLES = 16


@dataclass
class SamplingConfig:
    """Prompts of the sample grids; the data's own if there are none."""

    prompts: tuple[str, ...] = ()


@dataclass
class Config:
    """Settings of the task.

    Attributes:
        teacher: pipeline to distil: packaged name, folder or hub id.
        method: {"name": ...} and its options, see `genkit.distill.methods`.
        data: prompts and, for methods that need them, pictures: parquet file of views, folder of pictures, hub id; or a text file with one
            prompt per line. null draws the classes of a class teacher, or nothing for an unconditional one.
        image_size, views, prompts_per_picture: as the teacher was trained with.
        student: folder of a network that the student starts from; the teacher if null.
        sigma_init: noise level of one-step generation; the method's own if null.
        guidance_scale: of the teacher, 1 = off; the critic is not guided.
        null_probability: how often the condition is left out.
        lora: rank of adapters for student and critic on one shared network; null trains whole copies.
        dropout: of student and critic while training; null keeps the teacher's.
        gradient_checkpointing: recompute activations in the backward pass.
        lr, critic_lr, betas, eps: of Adam; the critic's rate is the student's if null.
        alarms: when to stop a collapsing student.
        sampling: of the sample grids.
        export_dtype: floating type of the exported weights.
        seed: of the discriminator's weights.
    """

    teacher: str
    method: dict[str, Any] = field(default_factory=lambda: {"name": "sim"})
    data: str | None = "data/lowpoly/train.parquet"
    image_size: int = 64
    views: tuple[int, ...] | None = None
    prompts_per_picture: int = 8
    student: str | None = None
    sigma_init: float | None = None
    guidance_scale: float = 1.0
    null_probability: float = 0.0
    lora: int | None = None
    dropout: float | None = 0.0
    gradient_checkpointing: bool = False
    lr: float = 1e-5
    critic_lr: float | None = None
    betas: tuple[float, float] = (0.0, 0.999)
    eps: float = 1e-8
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    export_dtype: Literal["float32", "float16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        make_method(**self.method)
        if self.lr <= 0 or (self.critic_lr is not None and self.critic_lr <= 0):
            raise ValueError(f"lr and critic_lr must be above 0, got {self.lr} and {self.critic_lr}.")
        if not 0 <= self.null_probability <= 1:
            raise ValueError(f"null_probability must lie in [0, 1], got {self.null_probability}.")
        if self.sigma_init is not None and not self.sigma_init > 0:
            raise ValueError(f"sigma_init must be above 0, got {self.sigma_init}.")


class Samples(Dataset[dict[str, Tensor]]):
    """Numbers of samples, with pictures where a method needs them.

    Args:
        rows: numbers.
        images: of them, or None.
    """

    def __init__(self, rows: Sequence[int], images: Any = None) -> None:
        self.rows, self.images = list(rows), images

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        found = {"index": torch.tensor(row)}
        return found if self.images is None else {"image": self.images[row]["image"], **found}


class DistillTask(Task):
    """A method on the networks of a teacher.

    Args:
        config: the settings.
        pipe: the teacher's pipeline.

    Raises:
        ValueError: if teacher, student, method and data do not fit together; names what.
    """

    name = "distill"
    find_unused_parameters = True  # a phase trains one role

    def __init__(self, config: Config, pipe: Any) -> None:
        self.config, self.family, self.method = config, family_of(pipe), make_method(**config.method)
        family, method = self.family, self.method
        self.sigma_init = method.sigma_init if config.sigma_init is None else config.sigma_init
        check_levels(family, method, self.sigma_init)
        self.rows, self.prompts, self.images = self._samples()
        self.table: ConditionTable | None = None
        self.distinct = list(dict.fromkeys(row[0] for row in self.prompts if row))
        is_conditional = bool(self.distinct and family.conditions(self.distinct[:1]))
        if config.guidance_scale != 1 and not is_conditional:
            raise ValueError(f"guidance_scale={config.guidance_scale} needs a teacher with conditions; this one has none.")
        teacher = family.network.eval().requires_grad_(False)
        self.frozen = {"teacher": teacher, **{n: m for n, m in pipe.components.items() if isinstance(m, nn.Module) and m is not teacher}}
        self.shared: SharedNetwork | None = None
        self.modules: dict[str, nn.Module] = {"alarm": CollapseAlarm(config.alarms)}
        roles = ["student", *(["critic"] if "critic" in method.uses else [])]
        if config.lora is not None:
            if config.student is not None:
                raise ValueError("lora shares one network between the roles, so the student cannot start from another; leave student out.")
            self.shared = SharedNetwork(self._copy(teacher), roles, config.lora)
            self.modules["network"] = self.shared
            self.ema = ("network",)
        else:
            for role in roles:
                self.modules[role] = self._copy(teacher)
            if config.student is not None:
                start = type(teacher).from_pretrained(config.student)  # type: ignore[attr-defined]
                family.check_student(start)
                self.modules["student"] = self._trainable(start)
            self.ema = ("student",)
        if "head" in method.uses:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self.modules["head"] = BottleneckHead(self._bottleneck_width(teacher))

    # ---- data ----

    def _samples(self) -> tuple[list[int], list[tuple[Any, ...]], Any]:
        """Return sample numbers, prompts by number (empty for an unconditional teacher), and pictures or None."""
        config, pipe, needs_images = self.config, self.family.pipe, "images" in self.method.uses
        classes = getattr(pipe, "class_names", []) if not getattr(pipe, "is_text_model", False) else []
        width = getattr(pipe.unet, "config", {}).get("label_dim", 0) if hasattr(pipe, "unet") else 0
        if config.data is None or (Path(config.data).suffix == ".txt"):
            if needs_images:
                raise ValueError(f"method {config.method['name']!r} learns from real pictures: give task_config.data with pictures.")
            if config.data is not None:
                lines = [line.strip() for line in Path(config.data).expanduser().read_text(encoding="utf-8").splitlines() if line.strip()]
                if not lines:
                    raise ValueError(f"task_config.data: {config.data} holds no prompt; give one per line.")
                return list(range(len(lines))), [(line,) for line in lines], None
            if getattr(pipe, "is_text_model", False):
                raise ValueError("task_config.data: a text teacher needs prompts; give a data set with captions or a text file of them.")
            return list(range(max(width, 1))), [(i,) for i in range(width)], None
        data = open_dataset(config.data, config.image_size)
        size = tuple(data[0]["image"].shape)
        if needs_images and size != self.family.shape:
            raise ValueError(f"the teacher makes samples of shape {list(self.family.shape)}, the data has {list(size)}; set image_size.")
        prompts: list[tuple[Any, ...]] = list(prompts_of(data, config.prompts_per_picture)) if width else []
        if classes:  # a class teacher knows its own names only
            prompts = [row[:1] for row in prompts]
        rows = rows_of_views(data, config.views, config.data)
        used = set(rows)
        prompts = [prompt if i in used else () for i, prompt in enumerate(prompts)]
        return rows, prompts, data if needs_images else None

    def dataset(self) -> Samples:
        """Return the samples; the conditions of all distinct prompts are computed at the first call."""
        if self.table is None:
            self.table = ConditionTable(self.prompts, self.family.conditions)
        return Samples(self.rows, self.images)

    # ---- networks ----

    def _copy(self, network: nn.Module) -> nn.Module:
        return self._trainable(copy.deepcopy(network))

    def _trainable(self, network: nn.Module) -> nn.Module:
        """Make a network ready to train: fp32 weights, dropout and checkpointing as configured."""
        network = network.float().train().requires_grad_(True)
        for module in network.modules():
            if isinstance(module, nn.Dropout) and self.config.dropout is not None:
                module.p = self.config.dropout
        if self.config.gradient_checkpointing:
            cast(Any, network).enable_gradient_checkpointing()
        return network

    def _bottleneck_width(self, teacher: nn.Module) -> int:
        condition = self.family.conditions(self.distinct[:1]) if self.distinct else {}
        with torch.no_grad():
            probe = torch.zeros(1, *self.family.shape, device=next(teacher.parameters()).device)
            return self.family.bottleneck(teacher, probe, torch.ones(1, device=probe.device), condition).shape[1]

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return Adam for the student and, where there is one, for the critic with its discriminator."""
        c = self.config
        settings: dict[str, Any] = {"betas": c.betas, "eps": c.eps}
        found: dict[str, torch.optim.Optimizer] = {"student": torch.optim.Adam(self._parameters("student"), lr=c.lr, **settings)}
        if "critic" in self.method.uses:
            own = [*self._parameters("critic"), *(self.modules["head"].parameters() if "head" in self.modules else ())]
            found["critic"] = torch.optim.Adam(own, lr=c.lr if c.critic_lr is None else c.critic_lr, **settings)
        return found

    def _parameters(self, role: str) -> list[nn.Parameter]:
        return list(self.shared.parameters_of(role) if self.shared else self.modules[role].parameters())

    def _caller(self, role: str, wrapped: bool) -> Callable[..., Any]:
        """Return a network as a role; wrapped where its gradients are exchanged between processes."""
        name = role if self.shared is None else "network"
        module = self.modules[name] if wrapped else self.raw(name)
        return module if self.shared is None else lambda *args: module(role, *args)

    def _denoiser(self, network: Callable[..., Any], condition: Condition) -> Denoiser:
        return lambda x, sigma: self.family.denoise(network, x, sigma, condition)

    # ---- one step ----

    def step(self, batch: dict[str, Tensor], ctx: StepContext) -> Iterator[Phase]:
        """Run the method on a batch of conditions, and watch the student."""
        for phase in self.method.step(self.work(batch, ctx)):
            if phase.optimizer == "student" and "distance" in phase.logs and "std" in phase.logs:
                figures = torch.stack([torch.as_tensor(phase.logs[key], device=ctx.device).float() for key in ("std", "distance")])
                std, distance = _mean_over_processes(figures)
                if ctx.part == 0:
                    cast(CollapseAlarm, self.modules["alarm"]).watch(ctx.step, std, distance)
            yield phase

    def work(self, batch: dict[str, Tensor], ctx: StepContext) -> Work:
        """Return what the method works with: networks with the batch's conditions bound, and named draws."""
        if self.table is None:
            raise RuntimeError("DistillTask: the conditions are not computed yet; call dataset() first.")
        b, family = len(batch["index"]), self.family
        condition: Condition = self.table.pick(batch["index"], ctx)
        if condition and self.config.null_probability:
            is_null = ctx.rand("null", b) < self.config.null_probability
            empty = family.null(condition)
            condition = {k: torch.where(is_null.view(-1, *[1] * (v.ndim - 1)), empty[k], v) for k, v in condition.items()}
        empty = family.null(condition)
        trained, has_critic = self._caller("student", True), "critic" in self.method.uses
        still = self._caller("student", False)
        level = torch.full((b,), self.sigma_init, device=ctx.device)

        def generate(z: Tensor, keep_graph: bool) -> Tensor:
            with contextlib.nullcontext() if keep_graph else torch.no_grad():
                return family.denoise(trained if keep_graph else still, self.sigma_init * z, level, condition)

        def bottleneck(x: Tensor, sigma: Tensor, is_trained: bool) -> Tensor:
            both = {k: torch.cat([v] * (len(x) // b)) for k, v in condition.items()}
            return family.bottleneck(self._caller("critic", is_trained), x, sigma, both)

        def scalar(name: str, kind: str) -> Tensor:
            return (ctx.randn if kind == "normal" else ctx.rand)(name, b)

        teacher = self.frozen["teacher"]
        others: dict[str, nn.Module] = {}
        if has_critic:
            others["critic"] = self.raw("critic") if self.shared is None else self.shared.parameters_of("critic")
        if "head" in self.modules:
            others["head"] = self.raw("head")
        return Work(
            student=self._denoiser(trained, condition),
            teacher=guided(self._denoiser(teacher, condition), self._denoiser(teacher, empty), self.config.guidance_scale),
            generate=generate,
            normal=lambda name: ctx.randn(name, b, *family.shape),
            scalar=scalar,
            networks=others,
            step=ctx.step,
            seen=ctx.step * b * ctx.num_processes * ctx.num_parts,
            critic=self._denoiser(self._caller("critic", True), condition) if has_critic else None,
            critic_as_input=self._denoiser(self._caller("critic", False), condition) if has_critic else None,
            bottleneck=bottleneck,
            head=self.modules.get("head"),
            images=batch.get("image"),
            sigma_data=family.sigma_data,
        )

    # ---- what comes out ----

    def student_of(self, module: nn.Module) -> nn.Module:
        """Return the student alone, of an averaged or trained module: adapters merged into the weights."""
        return cast(SharedNetwork, module).merged("student") if self.shared is not None else module

    def pipeline(self, module: nn.Module) -> Any:
        """Return the one-step pipeline around a student."""
        return self.family.pipeline(self.student_of(module), self.sigma_init)

    def sample(self, batch: dict[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Return pictures [m, 3, h, w] of the averaged student, fixed latents: the prompts in the settings, else of the batch's own."""
        own = [self.prompts[i][0] for i in batch["index"].tolist()] if self.prompts else []
        prompts = (list(self.config.sampling.prompts) or own)[:NUM_SAMPLES]
        return {"samples": self._make(prompts, list(range(len(prompts) or NUM_SAMPLES)), ctx)}

    def generate(self, indices: Sequence[int], ctx: StepContext) -> Tensor:
        """Return pictures [len(indices), 3, h, w] of the averaged student: the distinct first prompts in turn, seed i each."""
        plain = self.distinct
        return self._make([plain[i % len(plain)] for i in indices] if plain else [], list(indices), ctx)

    def _make(self, prompts: Sequence[Any], seeds: list[int], ctx: StepContext) -> Tensor:
        pipe = self.pipeline(ctx.ema[self.ema[0]])
        pipe.set_progress_bar_config(disable=True)
        count = 1 if prompts else len(seeds)
        output = pipe(list(prompts) or None, num_images_per_prompt=count, generator=seeds, output_type="pt", samples_at_once=len(seeds))
        return cast(Tensor, output.images)

    def export(self, modules: dict[str, nn.Module], out: Path) -> None:
        """Write the one-step pipeline with the teacher's encoders."""
        pipe = self.pipeline(modules[self.ema[0]])
        if self.config.export_dtype == "float16":
            halves = {name: copy.deepcopy(part).half() for name, part in pipe.components.items() if isinstance(part, nn.Module)}
            pipe.register_modules(**halves)
        pipe.save_pretrained(out)


def check_levels(family: Family, method: Method, sigma_init: float) -> None:
    """Refuse noise levels that the teacher does not know.

    Raises:
        ValueError: naming the level and the range.
    """
    low, high = family.sigma_range
    for name, value in (("sigma_init", sigma_init), *(("levels", value) for value in method.level_range())):
        if math.isfinite(value) and value > 0 and not low * 0.999 <= value <= high * 1.001:
            raise ValueError(f"{name}: noise level {value:g} is outside what the teacher knows, {low:g} .. {high:g}; choose another.")


def _mean_over_processes(figures: Tensor) -> Tensor:
    """Return figures averaged over the processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(figures)
        return figures / torch.distributed.get_world_size()
    return figures


def build(config: Config) -> DistillTask:
    """Build the task of a recipe: open the teacher."""
    from genkit.pipelines.base import GenPipeline

    return DistillTask(config, GenPipeline.from_pretrained(config.teacher))
