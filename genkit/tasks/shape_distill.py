"""Progressive flow distillation of a shape pipeline, one stage per run: guidance, consistency (several phases, then one), adversarial.

| stage | teacher | student starts as | learns |
|---|---|---|---|
| guidance | a pipeline with guidance | it, with the guidance scale as a further input | the guided velocity, for scales of a range |
| consistency | a pipeline of the first stage | it, or `start` | to jump to the end of its phase, against its own average |
| adversarial | the same | `start` | the same, and to pass for real latents before heads on the teacher's features |

The target is the run's average of the student: set `train.ema_decay` 0.999 and `train.ema_warmup` false, as published.

Source: Lai et al. 2025 (FlashVDM, arXiv 2503.16302), section 3.3; range of scales, heads and rates are not published.
Letters: b shapes, n latent tokens, e width of a latent, m condition tokens, w width of one, d width of the transformer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from genkit.conditioners.pictures import encode_pictures
from genkit.data.shape_samples import ShapeSamples
from genkit.data.views import ViewDataset
from genkit.distill.adversarial import hinge_discriminator_loss, hinge_generator_loss
from genkit.distill.progressive_flow import HUBER, Velocity, consistency_flow_loss, guidance_loss, guided_velocity, jump, phase_ends
from genkit.generators.shape_dit import ShapeDiT
from genkit.pipelines.base import GenPipeline
from genkit.pipelines.shape import ShapePipeline
from genkit.schedulers.flow_matching import FlowMatchingScheduler, interpolate
from genkit.tasks._shape_data import ConditionPictures, ShapeData, ShapeDataConfig, sample_slices
from genkit.tasks._solid_metrics import check_solid_metrics, generated_metrics
from genkit.training.evaluation import EvaluationConfig
from genkit.training.optimizers import adamw_or_muon
from genkit.training.task import Phase, StepContext, Task

BLOCKS = ("blocks.", "single_blocks.")


@dataclass
class Config(ShapeDataConfig):
    """Settings of the task, beside those of the data.

    Attributes:
        teacher: shape pipeline: packaged name or folder.
        stage: "guidance", "consistency" or "adversarial".
        start: folder of a pipeline whose transformer the student starts from; the teacher's if null.
        guidance_range: scales that are drawn, uniformly.
        phases: of the consistency stages.
        table: times of the consistency grid.
        huber_c: width of the pseudo-Huber distance.
        adversarial_weight: of the student's adversarial term.
        feature_blocks: blocks whose tokens the heads see, counted over both kinds; the last of each third if null.
        num_inference_steps, guidance_scale: of the exported pipeline.
        optimizer: "adamw", or "muon": Muon for the matrices of the blocks, AdamW for the rest.
        lr, critic_lr, betas, eps, weight_decay: of the optimizers; the heads' rate is the student's if null.
        export_dtype: floating type of the exported weights.
    """

    teacher: str = "runs/shape-lowpoly/export"
    stage: Literal["guidance", "consistency", "adversarial"] = "guidance"
    start: str | None = None
    guidance_range: tuple[float, float] = (1.0, 8.0)
    phases: int = 5
    table: int = 100
    huber_c: float = HUBER
    adversarial_weight: float = 0.1
    feature_blocks: tuple[int, ...] | None = None
    num_inference_steps: int = 5
    guidance_scale: float = 5.0
    null_probability: float = 0.0
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-5
    critic_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-6
    weight_decay: float = 1e-2
    export_dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.guidance_range
        if not 0 <= low <= high:
            raise ValueError(f"guidance_range must ascend from at least 0, got {list(self.guidance_range)}.")
        if self.lr <= 0 or (self.critic_lr is not None and self.critic_lr <= 0) or self.huber_c < 0:
            raise ValueError(f"rates must be above 0 and huber_c at least 0, got {self.lr}, {self.critic_lr} and {self.huber_c}.")
        if not 1 <= self.phases <= self.table:
            raise ValueError(f"phases must lie in 1 .. {self.table} (table), got {self.phases}.")


class FeatureHeads(nn.Module):
    """A discriminator on latent tokens of some blocks: norm, two layers, one number per token.

    Args:
        width: d.
        count: blocks.
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1)) for _ in range(count)]
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """Return logits [b, count, n] of tokens [b, n, d] of each block."""
        return torch.stack([head(tokens).squeeze(-1) for head, tokens in zip(self.heads, features, strict=True)], dim=1)


class ShapeDistillTask(Task):
    """A stage of progressive flow distillation.

    Args:
        config: the settings.
        views, samples: pictures, captions and prepared shapes.
        teacher: the pipeline.

    Raises:
        ValueError: if the teacher is not of the kind that the stage needs.
    """

    name = "shape_distill"
    ema = ("student",)
    find_unused_parameters = True  # a phase trains one role

    def __init__(self, config: Config, views: ViewDataset, samples: ShapeSamples, teacher: ShapePipeline) -> None:
        self.config, self.pipe = config, teacher
        network: ShapeDiT = teacher.transformer.float().eval().requires_grad_(False)
        embedded = network.config["guidance_embed"]
        if (config.stage == "guidance") == embedded:
            wanted = "has guidance left to distil" if config.stage == "guidance" else "came out of the guidance stage"
            raise ValueError(f"stage {config.stage!r} needs a teacher that {wanted}; {config.teacher} has guidance_embed={embedded}.")
        self.frozen = {name: part for name, part in teacher.components.items() if isinstance(part, nn.Module)}
        text = (teacher.text_encoder, teacher.tokenizer) if teacher.is_text_model else None
        self.shape_data = ShapeData(config, views, samples, teacher.vae.float(), text, teacher.image_encoder is not None)
        self.scheduler = FlowMatchingScheduler(steps="consistency", phases=config.table)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.modules: dict[str, nn.Module] = {"student": self._student(network)}
            if config.stage == "adversarial":
                self.places = self._places(len(network.blocks) + len(network.single_blocks))
                self.modules["heads"] = FeatureHeads(network.config["hidden_size"], len(self.places))

    def _student(self, network: ShapeDiT) -> ShapeDiT:
        """Return the student at its start."""
        if self.config.start is not None:
            network = cast(ShapePipeline, GenPipeline.from_pretrained(self.config.start)).transformer.float()
        student = ShapeDiT(**{**network.config, "guidance_embed": True})
        student.load_state_dict({**student.state_dict(), **network.state_dict()})  # without a guidance input before, that is new
        return student.train().requires_grad_(True)

    def _places(self, count: int) -> tuple[int, ...]:
        """Return the blocks that the heads see."""
        chosen = self.config.feature_blocks or tuple(sorted({max(count * k // 3 - 1, 0) for k in (1, 2, 3)}))
        if not all(0 <= place < count for place in chosen):
            raise ValueError(f"feature_blocks must lie in 0 .. {count - 1}, got {list(chosen)}.")
        return chosen

    def dataset(self) -> ConditionPictures:
        """Return the pictures; latents and captions are computed at the first call."""
        return self.shape_data.dataset()

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return one optimizer of the student and, in the adversarial stage, one of the heads."""
        c, student = self.config, self.modules["student"]
        settings: dict[str, Any] = {"betas": c.betas, "eps": c.eps, "weight_decay": c.weight_decay}
        found = {"student": adamw_or_muon(student, c.optimizer, BLOCKS, lr=c.lr, **settings)}
        if "heads" in self.modules:
            rate = c.lr if c.critic_lr is None else c.critic_lr
            found["heads"] = torch.optim.AdamW(self.modules["heads"].parameters(), lr=rate, **settings)
        return found

    # ---- one step ----

    def step(self, batch: dict[str, Tensor], ctx: StepContext) -> Iterator[Phase]:
        """Compute the losses of the stage."""
        b, c = len(batch["shape"]), self.config
        data = self.shape_data.latent(batch, ctx)
        noise = ctx.randn("noise", b, *data.shape[1:])
        with torch.no_grad():
            tokens, mask = self.shape_data.condition(batch, ctx)
            if tokens.ndim == 4:
                tokens = encode_pictures(tokens, self.frozen["image_encoder"])
            tokens = tokens * self.shape_data.keep(ctx, b)[:, None, None].to(tokens)
        low, high = c.guidance_range
        scale = low + (high - low) * ctx.rand("guidance", b)
        given = {"encoder_hidden_states": tokens, "encoder_attention_mask": mask}

        def velocity(network: Any) -> Velocity:
            return lambda x, t: network(x, t, guidance=scale, **given).sample

        if c.stage == "guidance":
            t = ctx.rand("time", b)
            x = interpolate(data, noise, t)
            errors = guidance_loss(velocity(self.modules["student"])(x, t), self._guided(x, t, tokens, mask, scale))
            yield Phase("student", errors.mean())
            return
        table = torch.cat([self.scheduler.table, torch.ones(1)]).to(ctx.device)
        index = (ctx.rand("index", b) * c.table).long().clamp(max=c.table - 1)
        time, next_time = table[index], table[index + 1]
        end = phase_ends(table[:-1], time, c.phases)
        x = interpolate(data, noise, time)
        with torch.no_grad():
            following = jump(x, time, next_time, velocity(self.frozen["transformer"]))
        student, target = velocity(self.modules["student"]), velocity(ctx.ema["student"])
        points = {"x": x, "following": following, "time": time, "next_time": next_time, "end": end}
        if c.stage == "consistency":
            yield Phase("student", consistency_flow_loss(student, target, **points, c=c.huber_c).mean())
            return
        again, renoise = ctx.rand("again", b), ctx.randn("renoise", b, *data.shape[1:])

        def logits(heads: Any, latents: Tensor) -> Tensor:
            found: Tensor = heads(self._features(interpolate(latents, renoise, again), again, scale, given))
            return found

        with torch.no_grad():
            fake = jump(x, time, torch.ones_like(time), velocity(self.raw("student")))
        real_logits, fake_logits = logits(self.modules["heads"], data), logits(self.modules["heads"], fake)
        yield Phase("heads", hinge_discriminator_loss(real_logits, fake_logits), {"real": real_logits.detach().mean()})
        consistency = consistency_flow_loss(student, target, **points, c=c.huber_c).mean()
        made = jump(x, time, torch.ones_like(time), student)
        adversarial = hinge_generator_loss(logits(self.raw("heads"), made))
        logs: dict[str, Tensor | float] = {"consistency": consistency.detach(), "adversarial": adversarial.detach()}
        yield Phase("student", consistency + c.adversarial_weight * adversarial, logs)

    @torch.no_grad()
    def _guided(self, x: Tensor, t: Tensor, tokens: Tensor, mask: Tensor | None, scale: Tensor) -> Tensor:
        """Return the teacher's guided velocity."""
        teacher = self.frozen["transformer"]
        found = teacher(x, t, tokens, encoder_attention_mask=mask).sample
        if mask is None:
            without = teacher(x, t, torch.zeros_like(tokens[:, :1]), context_count=tokens.shape[1]).sample
        else:
            without = teacher(x, t, torch.zeros_like(tokens), encoder_attention_mask=mask).sample
        return guided_velocity(found, without, scale)

    def _features(self, x: Tensor, t: Tensor, scale: Tensor, given: dict[str, Tensor | None]) -> list[Tensor]:
        """Return latent tokens [b, n, d] behind some of the teacher's blocks."""
        teacher, n, found = cast(ShapeDiT, self.frozen["transformer"]), x.shape[1], {}
        blocks = [*teacher.blocks, *teacher.single_blocks]

        def keep(place: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                found[place] = output[0] if isinstance(output, tuple) else output[:, -n:]

            return hook

        hooks = [blocks[place].register_forward_hook(keep(place)) for place in self.places]
        try:
            teacher(x, t, guidance=scale, **cast(dict[str, Any], given))
        finally:
            for hook in hooks:
                hook.remove()
        return [found[place] for place in self.places]

    # ---- what comes out ----

    def sample(self, batch: dict[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Return the batch's first pictures, if it has some, and front slices of the averaged student's shapes, white inside."""
        return sample_slices(self.pipeline(ctx.ema["student"]), self.shape_data, batch, ctx)

    def pipeline(self, student: nn.Module) -> ShapePipeline:
        """Return the pipeline around a student."""
        parts = {**self.pipe.components, "transformer": student}
        if self.config.stage != "guidance":
            parts["scheduler"] = self.scheduler
        own = {name: self.pipe.config[name] for name in ("condition_size", "octree_resolution", "decoder", "head", "takes_views")}
        if self.config.stage != "guidance" and self.pipe.slim_vae is not None:
            own["head"] = "slim"
        steps = self.pipe.config["num_inference_steps"] if self.config.stage == "guidance" else self.config.num_inference_steps
        own |= {"guidance_scale": self.config.guidance_scale, "max_guidance_scale": self.config.guidance_range[1]}
        return ShapePipeline(**parts, **own, num_inference_steps=steps)

    def check_evaluation(self, config: EvaluationConfig) -> None:
        """Refuse metrics that shapes do not have."""
        check_solid_metrics(config)

    def evaluate(self, config: EvaluationConfig, ctx: StepContext) -> dict[str, float]:
        """Make shapes of pictures with the averaged weights."""
        return generated_metrics(config, self.pipeline(ctx.ema["student"]), self.config.image_size)

    def export(self, modules: dict[str, nn.Module], out: Path) -> None:
        """Write the pipeline of the averaged student."""
        pipe = self.pipeline(modules["student"])
        if self.config.export_dtype == "float16":
            halves = {name: copy.deepcopy(part).half() for name, part in pipe.components.items() if isinstance(part, nn.Module)}
            pipe.register_modules(**halves)
        pipe.save_pretrained(out)


def build(config: Config) -> ShapeDistillTask:
    """Build the task of a recipe: open pictures, shapes and the teacher."""
    teacher = GenPipeline.from_pretrained(config.teacher)
    if not isinstance(teacher, ShapePipeline):
        raise ValueError(f"task_config.teacher: {config.teacher} is of class {type(teacher).__name__}, not ShapePipeline.")
    return ShapeDistillTask(config, ViewDataset(config.data, config.image_size), ShapeSamples(config.shapes), teacher)
