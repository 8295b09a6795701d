"""Train an EDM denoiser on pictures, from text, from classes, or without a condition.

loss = lambda(sigma) |D(x + sigma n; sigma, condition) - x|^2, ln sigma ~ N(-1.2, 1.2^2), mean over pixels and batch; now and then the
condition is left out, so that guidance works.

Source: Karras et al. 2022 (arXiv 2206.00364), table 1 and section 5.
Letters: b batch, c channels, h w rows and columns, l width of the condition, u distinct prompts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from genkit.conditioners.text import condition_vector, encode_text
from genkit.data.images import ImageFolderDataset, open_dataset
from genkit.data.views import ViewDataset
from genkit.distill.denoising import denoising_loss
from genkit.distill.levels import edm_weight, make_levels
from genkit.generators.edm import EDMUNet2DModel
from genkit.generators.preconditioning import EDMPreconditioner
from genkit.tasks._conditions import ConditionTable
from genkit.tasks._prompts import captions_of, load_text, prompts_of, rows_of_views
from genkit.training.optimizers import adamw_or_muon
from genkit.training.task import Phase, StepContext, Task

if TYPE_CHECKING:
    from genkit.pipelines.edm import EDMPipeline
    from genkit.pipelines.outputs import ImageOutput

NUM_SAMPLES = 16


@dataclass
class ModelConfig:
    """The network; see `EDMUNet2DModel`. Sizes and width of the condition follow from the data and the text encoder."""

    unet: dict[str, Any] = field(default_factory=lambda: {"name": "song"})
    preconditioner: dict[str, Any] = field(default_factory=lambda: {"name": "edm"})
    patch_size: int = 1


@dataclass
class SamplingConfig:
    """How pictures are made while training, and what the exported pipeline does by default; `guidance_scale` 1 is off."""

    num_inference_steps: int = 18
    guidance_scale: float = 1.0
    prompts: tuple[str, ...] = ()


@dataclass
class Config:
    """Settings of the task.

    Attributes:
        data: parquet file of views, folder of pictures or hub id.
        image_size: pictures are reduced to this side, in pixels.
        views: turntable views to learn from (0 is the front, then turning about the asset); all if null. Other data have no views.
        text_encoder, tokenizer: folders or hub ids of a CLIP text model with projection and its tokenizer; null for no text.
        classes: without text: learn from classes, one per distinct caption (the folder of a picture), else unconditionally.
        prompts_per_picture: prompts encoded per view; a step draws one of them.
        null_probability: how often the condition is left out.
        flip: also learn from mirrored pictures (not with text, which may name a side).
        model: the network.
        levels: law of the noise levels, see `genkit.distill.levels`.
        sampling: of the sample grids and the exported pipeline.
        start: folder of a denoiser (`.../export/unet`) whose weights the training starts from; null starts anew.
        optimizer: "adamw", which is the published Adam at a decay of 0, or "muon": Muon for kernels and matrices of the blocks, AdamW for
            the rest.
        lr, betas, eps, weight_decay: of the optimizer; Muon shares rate and decay.
        export_dtype: floating type of the exported weights.
        seed: of the initial weights.
    """

    data: str = "data/lowpoly/train.parquet"
    image_size: int = 64
    views: tuple[int, ...] | None = None
    text_encoder: str | None = None
    tokenizer: str | None = None
    classes: bool = True
    prompts_per_picture: int = 8
    null_probability: float = 0.1
    flip: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    levels: dict[str, Any] = field(default_factory=lambda: {"name": "lognormal"})
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    start: str | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    export_dtype: Literal["float32", "float16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.null_probability <= 1:
            raise ValueError(f"null_probability must lie in [0, 1], got {self.null_probability}.")
        if self.lr <= 0 or self.prompts_per_picture < 1:
            raise ValueError(f"lr and prompts_per_picture must be above 0, got {self.lr} and {self.prompts_per_picture}.")
        if (self.text_encoder is None) != (self.tokenizer is None):
            raise ValueError(f"text needs text_encoder and tokenizer, got {self.text_encoder!r} and {self.tokenizer!r}; give both or none.")
        if self.flip and self.text_encoder is not None:
            raise ValueError("flip=true mirrors pictures whose prompts may name a side; leave it out for a text model.")
        make_levels(**self.levels)


class EDMTask(Task):
    """One optimizer, one network: denoise.

    Args:
        config: the settings.
        data: the pictures.
        text: text encoder, frozen, and its tokenizer; None for classes or nothing.
    """

    name = "edm"
    ema = ("unet",)

    def __init__(self, config: Config, data: ViewDataset | ImageFolderDataset, text: tuple[nn.Module, Any] | None = None) -> None:
        self.config, self.data, self.tokenizer = config, data, text[1] if text else None
        captions, width = captions_of(data), 0
        self.class_names = sorted(set(captions)) if config.classes and not text else []
        self.prompts = prompts_of(data, config.prompts_per_picture) if text else [(c,) for c in captions] if self.class_names else []
        self.frozen = {"text_encoder": text[0]} if text else {}
        self.table: ConditionTable | None = None
        if self.prompts:
            width = cast(Any, text[0]).config.projection_dim if text else len(self.class_names)
        self.levels = make_levels(**config.levels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = EDMUNet2DModel(
                sample_size=config.image_size,
                label_dim=width,
                unet_config=config.model.unet,
                preconditioner_config=config.model.preconditioner,
                patch_size=config.model.patch_size,
            )
        if config.start is not None:
            model.load_state_dict(EDMUNet2DModel.from_pretrained(config.start).state_dict())
        own = model.preconditioner
        self.sigma_data = own.sigma_data if isinstance(own, EDMPreconditioner) else 0.5
        self.modules = {"unet": model}

    def dataset(self) -> Subset[dict[str, Tensor]]:
        """Return the pictures, {"image": [3, h, w], "index"}; the conditions of all distinct prompts are computed at the first call."""
        rows = rows_of_views(self.data, self.config.views, self.config.data)
        if self.table is None:
            used = set(rows)
            self.table = ConditionTable([row if i in used else () for i, row in enumerate(self.prompts)], self.encode)
        return Subset(self.data, rows)

    def encode(self, prompts: Sequence[Any]) -> dict[str, Tensor]:
        """Return the conditions of texts or class names, {"labels": [u, l]}."""
        if self.tokenizer is None:
            ids = torch.tensor([self.class_names.index(name) for name in prompts])
            return {"labels": nn.functional.one_hot(ids, len(self.class_names)).float()}
        with torch.no_grad():
            return {"labels": condition_vector(encode_text(list(prompts), self.tokenizer, self.frozen["text_encoder"]).pooled)}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return one optimizer over all parameters."""
        c, inner = self.config, ("unet.enc.", "unet.dec.")
        settings: dict[str, Any] = {"lr": c.lr, "betas": c.betas, "eps": c.eps, "weight_decay": c.weight_decay}
        return {"main": adamw_or_muon(self.modules["unet"], c.optimizer, inner, **settings)}

    def step(self, batch: dict[str, Tensor], ctx: StepContext) -> Iterator[Phase]:
        """Compute the loss on pictures [b, 3, h, w]."""
        images, b = batch["image"], len(batch["image"])
        if self.config.flip:
            images = torch.where(ctx.rand("flip", b, 1, 1, 1) < 0.5, images.flip(-1), images)
        if self.table is None:
            raise RuntimeError("EDMTask: the conditions are not computed yet; call dataset() first.")
        labels = self.table.pick(batch["index"], ctx).get("labels")
        if labels is not None:
            labels = labels * (ctx.rand("null", b, 1) >= self.config.null_probability)
        draw = ctx.randn if self.levels.draws == "normal" else ctx.rand
        sigma, noise = self.levels.sigma(draw("level", b)), ctx.randn("noise", b, *images.shape[1:])
        loss = denoising_loss(
            lambda x, level: self.modules["unet"](x, level, labels).sample, images, noise, sigma, edm_weight(sigma, self.sigma_data)
        )
        rows, is_noisy = loss.detach().flatten(1).mean(1), (sigma > 1).float()  # where the condition, not the picture, decides
        yield Phase("main", loss.mean(), {"noisy": (rows * is_noisy).sum() / is_noisy.sum().clamp_min(1)})

    def pipeline(self, unet: nn.Module) -> EDMPipeline:
        """Return the pipeline around a denoiser of this task."""
        from genkit.pipelines.edm import EDMPipeline
        from genkit.schedulers.edm_heun import EDMHeunScheduler

        sampling = self.config.sampling
        return EDMPipeline(
            unet=cast(EDMUNet2DModel, unet),
            scheduler=EDMHeunScheduler(),
            text_encoder=self.frozen.get("text_encoder"),
            tokenizer=self.tokenizer,
            id2label=dict(enumerate(self.class_names)) or None,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
        )

    def sample(self, batch: dict[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Return pictures [m, 3, h, w] of the prompts in the settings, else of the batch's own, with fixed seeds."""
        own = [self.prompts[i][0] for i in batch["index"].tolist()] if self.prompts else []
        prompts = (list(self.config.sampling.prompts) or own)[:NUM_SAMPLES]
        return {"samples": self._make(prompts, list(range(len(prompts) or NUM_SAMPLES)), ctx)}

    def generate(self, indices: Sequence[int], ctx: StepContext) -> Tensor:
        """Return pictures [len(indices), 3, h, w] of the averaged weights: the distinct plain prompts in turn, seed i each."""
        plain = list(dict.fromkeys(row[0] for row in self.prompts))
        return self._make([plain[i % len(plain)] for i in indices] if plain else [], list(indices), ctx)

    def _make(self, prompts: Sequence[str], seeds: list[int], ctx: StepContext) -> Tensor:
        pipe = self.pipeline(ctx.ema["unet"])
        pipe.set_progress_bar_config(disable=True)
        count = 1 if prompts else len(seeds)
        output = pipe(list(prompts) or None, num_images_per_prompt=count, generator=seeds, output_type="pt", samples_at_once=len(seeds))
        return cast(Tensor, cast("ImageOutput", output).images)

    def export(self, modules: dict[str, nn.Module], out: Path) -> None:
        """Write the pipeline: `out/unet`, `out/scheduler`, and for text `out/text_encoder` and `out/tokenizer`."""
        pipe = self.pipeline(modules["unet"])
        if self.config.export_dtype == "float16":
            halves = {name: copy.deepcopy(part).half() for name, part in pipe.components.items() if isinstance(part, nn.Module)}
            pipe.register_modules(**halves)
        pipe.save_pretrained(out)


def build(config: Config) -> EDMTask:
    """Build the task of a recipe: open the pictures and load the text encoder."""
    return EDMTask(config, open_dataset(config.data, config.image_size), load_text(config.text_encoder, config.tokenizer))
