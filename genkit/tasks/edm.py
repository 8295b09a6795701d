"""Train an EDM denoiser on pictures, from text, from classes, or without a condition.

loss = lambda(sigma) |D(x + sigma n; sigma, condition) - x|^2, ln sigma ~ N(-1.2, 1.2^2), mean over pixels and batch; now and then the
condition is left out, so that guidance works.

Source: Karras et al. 2022 (arXiv 2206.00364), table 1 and section 5.
Letters: b batch, c channels, h w rows and columns, l width of the condition.
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

from genkit.conditioners.text import condition_vector
from genkit.data.images import ImageFolderDataset, open_dataset
from genkit.data.views import ViewDataset
from genkit.distill.denoising import denoising_loss
from genkit.distill.levels import edm_weight, make_levels
from genkit.generators.edm import EDMUNet2DModel
from genkit.generators.preconditioning import EDMPreconditioner
from genkit.paths import cache_dir
from genkit.tasks._prompts import PromptTable, captions_of, load_text, prompts_of, rows_of_views, text_table
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
        lr, betas, eps, weight_decay: of AdamW (the decay is 0 as published, which is Adam).
        export_dtype: floating type of the exported weights.
        seed: of the initial weights.
        cache: folder of the encoded prompts; the user's cache folder if null.
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
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    export_dtype: Literal["float32", "float16"] = "float32"
    seed: int = 0
    cache: str | None = None

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


class Conditions:
    """Conditions of pictures for a network that takes one vector: pooled text, class ids, or nothing.

    Args:
        data: the pictures.
        text: text encoder, frozen, and its tokenizer; None for classes or nothing.
        classes: classes where there is no text.
        prompts_per_picture: prompts encoded per view.

    Attributes:
        class_names: names by id, of a class model.
        dim: width of the condition, 0 for none.
        prompts: texts of every picture.
    """

    def __init__(
        self, data: ViewDataset | ImageFolderDataset, text: tuple[nn.Module, Any] | None, classes: bool, prompts_per_picture: int
    ) -> None:
        captions = captions_of(data)
        self.encoder, self.tokenizer = text or (None, None)
        self.class_names = sorted(set(captions)) if classes and not text else []
        ids = {name: i for i, name in enumerate(self.class_names)}
        self.labels = torch.tensor([ids[caption] for caption in captions] if ids else [], dtype=torch.long)
        self.prompts = prompts_of(data, prompts_per_picture) if text else [(caption,) for caption in captions]
        self.dim = int(cast(Any, self.encoder).config.projection_dim) if text else len(self.class_names)
        self.table: PromptTable | None = None

    def prepare(self, cache: str | None) -> None:
        """Encode the prompts, once."""
        if self.encoder is not None:
            folder = Path(cache).expanduser() if cache else cache_dir()
            self.table = text_table(folder, self.prompts, self.tokenizer, self.encoder)

    def rows(self, index: Tensor, ctx: StepContext, name: str = "prompt") -> Tensor | None:
        """Return condition rows [b, l] of pictures index [b]; None for an unconditional model.

        Raises:
            RuntimeError: before `prepare`.
        """
        if not self.dim:
            return None
        if self.class_names:
            return torch.nn.functional.one_hot(self.labels[index.cpu()], self.dim).float().to(ctx.device)
        if self.table is None:
            raise RuntimeError("the prompts are not encoded yet; call dataset() first.")
        never = torch.zeros(len(index), dtype=torch.bool)
        picked = self.table.pick(index, ctx.rand(name, len(index)), never)
        return condition_vector(picked["pooled"]).to(ctx.device)

    @property
    def distinct_prompts(self) -> list[str]:
        """The plain prompts, or class names, once each."""
        return list(dict.fromkeys(row[0] for row in self.prompts))


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
        self.config, self.data = config, data
        self.conditions = Conditions(data, text, config.classes, config.prompts_per_picture)
        self.frozen = {"text_encoder": text[0]} if text else {}
        self.levels = make_levels(**config.levels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = EDMUNet2DModel(
                sample_size=config.image_size,
                label_dim=self.conditions.dim,
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
        """Return the pictures, {"image": [3, h, w], "index"}; the encoded prompts are written at the first call."""
        self.conditions.prepare(self.config.cache)
        return Subset(self.data, rows_of_views(self.data, self.config.views, self.config.data))

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return one optimizer over all parameters."""
        c = self.config
        settings: dict[str, Any] = {"lr": c.lr, "betas": c.betas, "eps": c.eps, "weight_decay": c.weight_decay}
        return {"main": torch.optim.AdamW(self.modules["unet"].parameters(), **settings)}

    def step(self, batch: dict[str, Tensor], ctx: StepContext) -> Iterator[Phase]:
        """Compute the loss on pictures [b, 3, h, w]."""
        images, b = batch["image"], len(batch["image"])
        if self.config.flip:
            images = torch.where(ctx.rand("flip", b, 1, 1, 1) < 0.5, images.flip(-1), images)
        labels = self.conditions.rows(batch["index"], ctx)
        if labels is not None:
            labels = labels * (ctx.rand("null", b, 1) >= self.config.null_probability)
        draw = ctx.randn if self.levels.draws == "normal" else ctx.rand
        sigma, noise = self.levels.sigma(draw("level", b)), ctx.randn("noise", b, *images.shape[1:])
        loss = denoising_loss(
            lambda x, level: self.modules["unet"](x, level, labels).sample, images, noise, sigma, edm_weight(sigma, self.sigma_data)
        )
        yield Phase("main", loss.mean())

    def pipeline(self, unet: nn.Module) -> EDMPipeline:
        """Return the pipeline around a denoiser of this task."""
        from genkit.pipelines.edm import EDMPipeline
        from genkit.schedulers.edm_heun import EDMHeunScheduler

        sampling = self.config.sampling
        return EDMPipeline(
            unet=cast(EDMUNet2DModel, unet),
            scheduler=EDMHeunScheduler(),
            text_encoder=self.frozen.get("text_encoder"),
            tokenizer=self.conditions.tokenizer,
            id2label=dict(enumerate(self.conditions.class_names)) or None,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
        )

    def sample(self, batch: dict[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Return pictures [m, 3, h, w] of the prompts in the settings, else of the batch's own, with fixed seeds."""
        own = [self.conditions.prompts[i][0] for i in batch["index"].tolist()]
        prompts = (list(self.config.sampling.prompts) or own)[:NUM_SAMPLES]
        return {"samples": self._make(prompts, list(range(len(prompts))), ctx)}

    def generate(self, indices: Sequence[int], ctx: StepContext) -> Tensor:
        """Return pictures [len(indices), 3, h, w] of the averaged weights: the distinct plain prompts in turn, seed i each."""
        plain = self.conditions.distinct_prompts
        return self._make([plain[i % len(plain)] for i in indices], list(indices), ctx)

    def _make(self, prompts: Sequence[str], seeds: list[int], ctx: StepContext) -> Tensor:
        pipe = self.pipeline(ctx.ema["unet"])
        pipe.set_progress_bar_config(disable=True)
        prompt = list(prompts) if self.conditions.dim else None
        count = 1 if prompt else len(seeds)
        output = pipe(prompt, num_images_per_prompt=count, generator=seeds, output_type="pt", samples_at_once=len(seeds))
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
