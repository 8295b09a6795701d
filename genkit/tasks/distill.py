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
from genkit.distill.families import Condition, Family, family_of, open_teacher
from genkit.distill.methods import Method, Work, make_method
from genkit.distill.paths import guided
from genkit.pipelines.seeds import SampleStreams
from genkit.tasks._conditions import ConditionTable, read_conditions
from genkit.tasks._prompts import prompts_of, rows_of_views
from genkit.training.optimizers import kernels, muon_with_adamw
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
            prompt per line; or a .safetensors file of conditions that `distill/encode.py` wrote. null draws the classes of a class teacher,
            or nothing for an unconditional one.
        image_size, views, prompts_per_picture: as the teacher was trained with.
        student: folder of a network that the student starts from; the teacher if null.
        sigma_init: noise level of one-step generation; the method's own if null.
        guidance_scale: of the teacher, 1 = off; the critic is not guided.
        null_probability: how often the condition is left out.
        lora: rank of adapters for student and critic on one shared network; null trains whole copies.
        dropout: of student and critic while training; null keeps the teacher's.
        gradient_checkpointing: recompute activations in the backward pass.
        optimizer: "adam" as published, or "muon": Muon for kernels and matrices of the blocks, AdamW without decay for the rest.
        lr, critic_lr, betas, eps: of the optimizers; the critic's rate is the student's if null, Muon shares the rate.
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
    optimizer: Literal["adam", "muon"] = "adam"
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
        if self.optimizer == "muon" and self.lora is not None:
            raise ValueError("optimizer muon is for whole networks; adapters (lora) are trained by adam.")
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
        family = self.family
        if family.levels is not None and "levels" not in config.method and 0 < self.method.level_range()[0] < family.sigma_range[0]:
            self.method = make_method(**config.method, levels=family.levels)
        method = self.method
        if "two_times" in method.uses:
            raise ValueError(
                f"method {config.method['name']!r} trains a network of two times, u(x, r, t), and {type(family.network).__name__} has one; "
                "use genkit.distill.methods.MeanFlow with a network of your own."
            )
        self.sigma_init = method.sigma_init if config.sigma_init is None else config.sigma_init
        check_levels(family, method, self.sigma_init)
        self.table: ConditionTable | None = None
        self.rows, self.prompts, self.images = self._samples()
        self.distinct = list(dict.fromkeys(row[0] for row in self.prompts if row))
        if config.guidance_scale != 1 and not (family.is_text or family.num_classes):
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
        """Return sample numbers, prompts by number (none for an unconditional teacher), and pictures or None."""
        config, family, needs_images = self.config, self.family, "images" in self.method.uses
        suffix = None if config.data is None else Path(config.data).suffix
        if config.data is None or suffix in (".txt", ".safetensors"):
            if needs_images:
                raise ValueError(f"method {config.method['name']!r} learns from real pictures: give task_config.data with pictures.")
            if suffix == ".safetensors":
                rows, self.family.empty = read_conditions(str(config.data))
                self.table = ConditionTable.of_rows(rows)
                return list(range(len(self.table.index))), [], None
            if suffix == ".txt":
                prompts = [(line,) for line in read_lines(str(config.data))]
                return list(range(len(prompts))), list(prompts), None
            if family.is_text:
                raise ValueError("task_config.data: a text teacher needs prompts; give a data set with captions or a text file of them.")
            return list(range(max(family.num_classes, 1))), [(i,) for i in range(family.num_classes)], None
        data = open_dataset(config.data, config.image_size)
        size = tuple(data[0]["image"].shape)
        if needs_images and size != family.shape:
            raise ValueError(f"the teacher makes samples of shape {list(family.shape)}, the data has {list(size)}; set image_size.")
        rows_in_use = rows_of_views(data, config.views, config.data)
        used = set(rows_in_use)
        listed: list[tuple[Any, ...]] = []
        if family.is_text or family.num_classes:  # a class teacher knows its own names only: the plain prompt
            every = prompts_of(data, config.prompts_per_picture if family.is_text else 1)
            listed = [row if i in used else () for i, row in enumerate(every)]
        return rows_in_use, listed, data if needs_images else None

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
        """Return one for the student and, where there is one, one for the critic with its discriminator."""
        c = self.config
        found = {"student": self._optimizer("student", c.lr, [])}
        if "critic" in self.method.uses:
            head = list(self.modules["head"].parameters()) if "head" in self.modules else []
            found["critic"] = self._optimizer("critic", c.lr if c.critic_lr is None else c.critic_lr, head)
        return found

    def _optimizer(self, role: str, lr: float, others: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer of a role's parameters and some others."""
        c = self.config
        if c.optimizer == "adam":
            return torch.optim.Adam([*self._parameters(role), *others], lr=lr, betas=c.betas, eps=c.eps)
        matrices, rest = kernels(self.modules[role], self.family.blocks)
        return muon_with_adamw(matrices, [*rest, *others], lr=lr, betas=c.betas, weight_decay=0.0)

    def _parameters(self, role: str) -> list[nn.Parameter]:
        return list(self.shared.parameters_of(role) if self.shared else self.modules[role].parameters())

    def _caller(self, role: str, wrapped: bool) -> Callable[..., Any]:
        """Return a network as a role; wrapped where its gradients are exchanged between processes."""
        name = role if self.shared is None else "network"
        module = self.modules[name] if wrapped else self.raw(name)
        return module if self.shared is None else lambda *args, **kwargs: module(role, *args, **kwargs)

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
            head_as_input=others.get("head"),
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
        """Return pictures [m, 3, h, w] of the averaged student, fixed latents: the prompts in the settings, else the batch's own."""
        prompts = list(self.config.sampling.prompts)[:NUM_SAMPLES]
        if prompts:
            condition = self.family.conditions(prompts)
        else:
            assert self.table is not None
            condition = self.table.pick(batch["index"][:NUM_SAMPLES], ctx)
        count = len(prompts) or min(len(batch["index"]), NUM_SAMPLES)
        return {"samples": self._make(condition, list(range(count)), ctx)}

    def generate(self, indices: Sequence[int], ctx: StepContext) -> Tensor:
        """Return pictures [len(indices), 3, h, w] of the averaged student: the distinct first prompts in turn, seed i each."""
        if self.distinct:
            return self._make(self.family.conditions([self.distinct[i % len(self.distinct)] for i in indices]), list(indices), ctx)
        assert self.table is not None
        condition = self.table.pick(torch.tensor([i % len(self.rows) for i in indices]), ctx)
        return self._make(condition, list(indices), ctx)

    @torch.no_grad()
    def _make(self, condition: Condition, seeds: list[int], ctx: StepContext) -> Tensor:
        student, level = self.student_of(ctx.ema[self.ema[0]]), torch.full((len(seeds),), self.sigma_init, device=ctx.device)
        z = SampleStreams(seeds).normal(*self.family.shape).to(ctx.device)
        placed = {name: rows.to(ctx.device) for name, rows in condition.items()}
        return self.family.decode(self.family.denoise(student, self.sigma_init * z, level, placed)).float().clamp(-1, 1)

    def export(self, modules: dict[str, nn.Module], out: Path) -> None:
        """Write the one-step pipeline with the teacher's encoders."""
        pipe = self.pipeline(modules[self.ema[0]])
        if self.config.export_dtype == "float16":
            halves = {name: copy.deepcopy(part).half() for name, part in pipe.components.items() if isinstance(part, nn.Module)}
            pipe.register_modules(**halves)
        pipe.save_pretrained(out)


def read_lines(path: str) -> list[str]:
    """Return the lines of a text file that are not blank.

    Raises:
        FileNotFoundError: if there is no such file. ValueError: if it holds nothing.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"task_config.data: {path!r} does not exist; give a text file with one prompt per line.")
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"task_config.data: {path} holds no prompt; give one per line.")
    return lines


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
    return DistillTask(config, open_teacher(config.teacher))
