"""Distil a masked-token generator into one of fewer steps: one step of the student predicts what several steps of the teacher found.

From a grid with as many masked tokens as the student meets at its step s, the teacher takes `teacher_factor` smaller steps to the student's
next grid. At every token the log-probabilities of the step that revealed it are kept (of the last step where it is still masked), and the
student, which sees the first grid only, learns them:

loss = KL(teacher's kept log-probabilities || student's), mean over masked tokens

With a guided teacher the student learns guidance too and needs one branch.

Source: Deschenaux and Gulcehre 2024, Self-Distillation Through Time (arXiv 2410.21035), here for pictures, with the confidence sampler of
the masked-token scheduler in place of ancestral sampling.
Letters: b batch, n tokens of the grid, k masked tokens, K codes, s step of the student.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from genkit.data.images import ImageFolderDataset, open_dataset
from genkit.data.views import ViewDataset
from genkit.generators.enat import ENATTransformer2DModel
from genkit.generators.enat_index import positions_where
from genkit.pipelines.seeds import gumbel
from genkit.schedulers.masked_token import MaskedTokenScheduler, guide
from genkit.tasks import enat
from genkit.tasks._enat_masking import random_mask
from genkit.training.task import Phase, StepContext


@dataclass
class Config:
    """Settings of the task.

    Attributes:
        teacher: ENAT pipeline to distil: packaged name, folder or hub id.
        data: parquet file of views, folder of pictures or hub id.
        image_size, views, prompts_per_picture, null_probability: as the teacher was trained with.
        student_steps: steps that the student will take.
        teacher_factor: teacher's steps for one of the student's.
        guidance_scale: of the teacher, 1 = off; the pipeline's own if null.
        reuse_probability: how often a step continues from the averaged student's features.
        prompts: of the sample grids.
        optimizer, lr, betas, weight_decay: see `genkit.tasks.enat`.
        export_dtype: floating type of the exported weights.
        cache: folder of the tokens and encoded prompts; the user's cache folder if null.
    """

    teacher: str
    data: str = "data/lowpoly/train.parquet"
    image_size: int = 64
    views: tuple[int, ...] | None = None
    prompts_per_picture: int = 8
    null_probability: float = 0.1
    student_steps: int = 4
    teacher_factor: int = 4
    guidance_scale: float | None = None
    reuse_probability: float = 0.5
    prompts: tuple[str, ...] = ()
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    export_dtype: Literal["float32", "float16"] = "float32"
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.student_steps < 1 or self.teacher_factor < 2:
            given = f"student_steps={self.student_steps}, teacher_factor={self.teacher_factor}"
            raise ValueError(f"student_steps must be at least 1 and teacher_factor at least 2, got {given}.")


class TokenDistillTask(enat.ENATTask):
    """Self-distillation through time on the codes of the teacher's tokenizer.

    Args:
        config: the settings.
        data: the pictures.
        pipe: the teacher's pipeline.

    Raises:
        ValueError: if the teacher is no ENAT pipeline, or its schedule has fixed lists.
    """

    name = "token_distill"

    def __init__(self, config: Config, data: ViewDataset | ImageFolderDataset, pipe: Any) -> None:
        if type(pipe).__name__ != "ENATPipeline":
            raise ValueError(f"token_distill takes a masked-token teacher (ENATPipeline), got {type(pipe).__name__}; see task distill.")
        if pipe.scheduler.listed_steps is not None:
            raise ValueError("token_distill: the teacher's schedule has lists for a fixed number of steps; give it a schedule by rule.")
        own, sampler = pipe.transformer.config, pipe.scheduler.config
        sizes = {name: own[name] for name in enat.ModelConfig.__dataclass_fields__}
        scale = pipe.config["guidance_scale"] if config.guidance_scale is None else config.guidance_scale
        shared = {name: getattr(config, name) for name in enat.Config.__dataclass_fields__ if hasattr(config, name)}
        sampling = enat.SamplingConfig(
            num_inference_steps=config.student_steps, guidance_scale=1.0, guidance="constant", prompts=config.prompts,
            token_temperature=sampler["token_temperature"], mask_temperature=sampler["mask_temperature"],
        )  # fmt: skip
        text = (pipe.text_encoder, pipe.tokenizer) if pipe.is_text_model else None
        settings = enat.Config(vqvae=config.teacher, model=enat.ModelConfig(**{**sizes, "dropout": 0.0}), sampling=sampling, **shared)
        super().__init__(settings, data, pipe.vqvae, text)
        cast(ENATTransformer2DModel, self.modules["transformer"]).load_state_dict(pipe.transformer.state_dict())
        self.frozen = {**self.frozen, "teacher": pipe.transformer.eval().requires_grad_(False)}
        self.plan, self.guidance_scale = config, float(scale)
        self.schedules = [cast(MaskedTokenScheduler, MaskedTokenScheduler.from_config(sampler)) for _ in range(2)]
        self.schedules[0].set_timesteps(config.student_steps)
        self.schedules[1].set_timesteps(config.student_steps * config.teacher_factor)

    def step(self, batch: dict[str, Tensor], ctx: StepContext) -> Iterator[Phase]:
        """Compute the loss on codes [b, n] at one of the student's steps, the same for the whole batch."""
        net, codes = cast(ENATTransformer2DModel, self.raw("transformer")), batch["indices"]
        b, n = codes.shape
        s = min(int(ctx.draw("step") * self.plan.student_steps), self.plan.student_steps - 1)
        count = n if s == 0 else self.schedules[0].masked_counts(n)[s - 1]
        ids = codes.masked_fill(random_mask(ctx.rand("mask", b, n), count), net.mask_token_id)
        masked_index = positions_where(ids == net.mask_token_id, count)
        condition = self.condition(batch["index"], ctx)
        targets = self.targets(ids, masked_index, s, condition, ctx)
        state = self.earlier_state(ids, condition, count, ctx)
        out = self.modules["transformer"](ids, condition, state, masked_index=masked_index, logits_at="masked")
        log_q = out.logits.float().log_softmax(-1)
        loss = (targets.exp() * (targets - log_q)).sum(-1).mean()
        agreement = (log_q.detach().argmax(-1) == targets.argmax(-1)).float().mean()
        yield Phase("main", loss, {"agreement": agreement, "masked": count / n, "reuse": float(state is not None)})

    @torch.no_grad()
    def targets(self, ids: Tensor, masked_index: Tensor, s: int, condition: dict[str, Tensor], ctx: StepContext) -> Tensor:
        """Return the teacher's log-probabilities [b, k, K] at the masked tokens, each of the step that revealed it.

        Args:
            ids: [b, n] grid before the student's step s.
            masked_index: [b, k] its masked tokens.
            s: the student's step.
            condition: of the samples, as `prepare_condition` takes it.
            ctx: of the step.
        """
        teacher, schedule = cast(ENATTransformer2DModel, self.frozen["teacher"]), self.schedules[1]
        n, codes = ids.shape[1], teacher.config["codebook_size"]
        kept = torch.zeros(*ids.shape, codes, device=ids.device)
        empty = self.empty_condition(condition) if self.guidance_scale != 1 else None
        current, index = ids, masked_index
        first = s * self.plan.teacher_factor
        for sub in range(first, first + self.plan.teacher_factor):
            if not index.shape[1]:
                break
            logits = teacher(current, condition, masked_index=index, logits_at="masked").logits.float()
            if empty is not None:
                null = teacher(current, empty, masked_index=index, logits_at="masked").logits.float()
                logits = guide(logits, null, self.guidance_scale)
            log_p = logits.log_softmax(-1)
            kept.scatter_(1, index[..., None].expand(-1, -1, codes), log_p)
            uniforms, noise = ctx.rand(f"token{sub}", len(ids), n), gumbel(ctx.rand(f"confidence{sub}", len(ids), n))
            done = schedule.step(
                log_p, sub, current, index, token_uniforms=uniforms.gather(1, index), confidence_gumbel=noise.gather(1, index), num_masked=n
            )
            current, index = done.ids, done.masked_index
        return kept.gather(1, masked_index[..., None].expand(-1, -1, codes))

    def empty_condition(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the condition without a prompt, for as many samples."""
        if self.class_names:
            return {"class_labels": torch.full_like(condition["class_labels"], len(self.class_names))}
        assert self.table is not None
        b = len(condition["pooled"])
        picked = self.table.pick(torch.zeros(b, dtype=torch.long), torch.zeros(b), torch.ones(b, dtype=torch.bool))
        return {name: value.to(condition["pooled"].device) for name, value in picked.items()}


def build(config: Config) -> TokenDistillTask:
    """Build the task of a recipe: open the teacher and the pictures."""
    from genkit.pipelines.base import GenPipeline

    return TokenDistillTask(config, open_dataset(config.data, config.image_size), GenPipeline.from_pretrained(config.teacher))
