"""Train a shape transformer by flow matching, on the latents of a shape VAE, given pictures or captions.

loss = mean |v(x_t, t, c) - (latent - noise)|^2, x_t = t latent + (1 - t) noise

A step's batch sees pictures or texts as a whole. Pictures are cut out as the pipeline does; some come from an image tokenizer and back, so
that generated pictures are not strange to the model. The image encoder learns along, or is a trained one that stays as it is.

Source: Hunyuan3D 2.0 (arXiv 2501.12202); condition dropout is ours, without it guidance has nothing to lead away from.
Letters: b shapes, n latent tokens, e width of a latent, m condition tokens, w width of one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from genkit.conditioners.pictures import encode_pictures
from genkit.data.shape_samples import ShapeSamples
from genkit.data.views import ViewDataset
from genkit.generators.shape_dit import ShapeDiT
from genkit.pipelines.base import GenPipeline
from genkit.pipelines.shape import ShapePipeline
from genkit.schedulers.flow_matching import FlowMatchingScheduler, interpolate, logit_normal_times
from genkit.tasks._prompts import load_text
from genkit.tasks._shape_data import ConditionPictures, ShapeData, ShapeDataConfig, open_vaes, sample_slices
from genkit.tasks._solid_metrics import check_solid_metrics, generated_metrics
from genkit.tokenizers.shape_vae import ShapeVAE
from genkit.training.evaluation import EvaluationConfig
from genkit.training.optimizers import adamw_or_muon
from genkit.training.task import Phase, StepContext, Task


@dataclass
class TimesConfig:
    """Law of the times: uniform, or logit-normal with a shift; see `logit_normal_times`."""

    law: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift_scale: float = 1.0


@dataclass
class Config(ShapeDataConfig):
    """Settings of the task, beside those of the data.

    Attributes:
        vae: folder of a shape VAE or of a pipeline with one.
        image_encoder: of `Dinov2Config`, to learn along; {} for text alone.
        pretrained_image_encoder: folder or hub id of one that stays as it is, instead.
        text_encoder, tokenizer: folders or hub ids; null for no text.
        model: of `ShapeDiT`; widths of latents and conditions follow from the others.
        times: their law.
        sampling_steps, guidance_scale: of the sample grids and the exported pipeline.
        start: folder of a pipeline whose transformer and image encoder the training starts from; null starts anew.
        optimizer: "adamw", or "muon": Muon for the matrices of the blocks, AdamW for the rest.
        lr, betas, eps, weight_decay: of the optimizer.
        export_dtype: floating type of the exported weights.
    """

    vae: str = "genkit/shape-vae-lowpoly"
    image_encoder: dict[str, Any] = field(default_factory=dict)
    pretrained_image_encoder: str | None = None
    text_encoder: str | None = None
    tokenizer: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    times: TimesConfig = field(default_factory=TimesConfig)
    sampling_steps: int = 20
    guidance_scale: float = 2.0
    start: str | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-6
    weight_decay: float = 1e-2
    export_dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}.")
        if (self.text_encoder is None) != (self.tokenizer is None):
            raise ValueError(f"text needs text_encoder and tokenizer, got {self.text_encoder!r} and {self.tokenizer!r}; give both or none.")
        if self.image_encoder and self.pretrained_image_encoder is not None:
            raise ValueError("give image_encoder (to learn along) or pretrained_image_encoder, not both.")
        if not self.image_encoder and self.pretrained_image_encoder is None and self.text_encoder is None:
            raise ValueError("nothing to be given: name an image encoder, a text encoder, or both.")


class ShapeFlowModel(nn.Module):
    """Transformer and image encoder as one module, so that several processes exchange gradients of what a step uses.

    Args:
        transformer: the velocity field.
        image_encoder: that learns along, or None.
    """

    def __init__(self, transformer: ShapeDiT, image_encoder: nn.Module | None) -> None:
        super().__init__()
        self.transformer, self.image_encoder = transformer, image_encoder

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, keep: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the velocity [b, n, e].

        Args:
            x: [b, n, e]. t: [b].
            condition: [b, 3, s, s] pictures for the encoder, or [b, m, w] tokens.
            keep: [b] bool; where False the tokens are zero.
            mask: [b, m] bool of the tokens.
        """
        tokens = encode_pictures(condition, self.image_encoder) if condition.ndim == 4 else condition
        tokens = tokens * keep[:, None, None].to(tokens)
        velocity: Tensor = self.transformer(x, t, tokens, encoder_attention_mask=mask).sample
        return velocity


class ShapeFlowTask(Task):
    """One optimizer, one network: the velocity towards latents.

    Args:
        config: the settings.
        views: pictures and captions.
        samples: prepared shapes of the same objects.
        vae: of the latents.
        text: text encoder, frozen, and its tokenizer, or None.
        pictures_encoder: trained image encoder that stays as it is, or None.
        slim_vae: decodes the same latents with a slim head; becomes part of the pipeline.

    Raises:
        ValueError: if shapes and pictures are not of the same objects, or widths differ.
    """

    name = "shape_flow"
    ema = ("model",)
    find_unused_parameters = True  # a step with captions leaves the image encoder out

    def __init__(
        self, config: Config, views: ViewDataset, samples: ShapeSamples, vae: ShapeVAE, text: tuple[nn.Module, Any] | None = None,
        pictures_encoder: nn.Module | None = None, slim_vae: ShapeVAE | None = None,
    ) -> None:  # fmt: skip
        self.config, self.vae, self.slim_vae = config, vae.eval().requires_grad_(False), slim_vae
        self.tokenizer = text[1] if text else None
        self.frozen = {"vae": self.vae} | ({"text_encoder": text[0]} if text else {}) | ({"slim_vae": slim_vae} if slim_vae else {})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            own = Dinov2Model(Dinov2Config(**config.image_encoder)) if config.image_encoder else None
            encoder = own if own is not None else pictures_encoder
            parts: list[Any] = [part for part in (encoder, text[0] if text else None) if part is not None]
            widths = {part.config.hidden_size for part in parts}
            if len(widths) != 1:
                raise ValueError(f"pictures and text are conditions of one width, got {sorted(widths)}.")
            sizes = {"in_channels": vae.config["embed_dim"], "context_in_dim": widths.pop()}
            transformer = ShapeDiT(**{**config.model, **sizes})
        self.shape_data = ShapeData(config, views, samples, self.vae, text, encoder is not None)
        if pictures_encoder is not None:
            self.frozen["image_encoder"] = pictures_encoder
        self.modules = {"model": ShapeFlowModel(transformer, own)}
        if config.start is not None:
            self._load(GenPipeline.from_pretrained(config.start))

    def _load(self, pipe: Any) -> None:
        """Start from the weights of a pipeline."""
        model = cast(ShapeFlowModel, self.modules["model"])
        model.transformer.load_state_dict(pipe.transformer.state_dict())
        if model.image_encoder is not None and pipe.image_encoder is not None:
            model.image_encoder.load_state_dict(pipe.image_encoder.state_dict())

    def dataset(self) -> ConditionPictures:
        """Return the pictures; latents and captions are computed at the first call."""
        return self.shape_data.dataset()

    # ---- one step ----

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return one optimizer over all trained parameters."""
        c, inner = self.config, ("transformer.blocks.", "transformer.single_blocks.", "image_encoder.encoder.")
        settings: dict[str, Any] = {"lr": c.lr, "betas": c.betas, "eps": c.eps, "weight_decay": c.weight_decay}
        return {"main": adamw_or_muon(self.modules["model"], c.optimizer, inner, **settings)}

    def step(self, batch: dict[str, Tensor], ctx: StepContext) -> Iterator[Phase]:
        """Compute the loss."""
        b, data = len(batch["shape"]), self.shape_data.latent(batch, ctx)
        noise, t = ctx.randn("noise", b, *data.shape[1:]), self._times(ctx, b)
        condition, mask = self.shape_data.condition(batch, ctx)
        encoder = self.frozen.get("image_encoder")
        if condition.ndim == 4 and encoder is not None:
            condition = encode_pictures(condition, encoder)
        keep = self.shape_data.keep(ctx, b)
        velocity = self.modules["model"](interpolate(data, noise, t), t, condition, keep, mask)
        errors = (velocity.float() - (data - noise)).square().flatten(1).mean(1)
        yield Phase("main", errors.mean(), {"late": _mean_where(errors.detach(), t > 0.5), "early": _mean_where(errors.detach(), t <= 0.5)})

    def _times(self, ctx: StepContext, b: int) -> Tensor:
        law = self.config.times
        if law.law == "uniform":
            return ctx.rand("time", b)
        return logit_normal_times(ctx.randn("time", b), law.mean, law.std, law.shift_scale)

    # ---- what comes out ----

    def pipeline(self, module: nn.Module) -> ShapePipeline:
        """Return the pipeline around trained networks."""
        model, c = cast(ShapeFlowModel, module), self.config
        return ShapePipeline(
            transformer=model.transformer,
            vae=self.vae,
            slim_vae=self.slim_vae,
            scheduler=FlowMatchingScheduler(),
            image_encoder=cast(Any, model.image_encoder if model.image_encoder is not None else self.frozen.get("image_encoder")),
            text_encoder=cast(Any, self.frozen.get("text_encoder")),
            tokenizer=self.tokenizer,
            condition_size=c.image_size,
            octree_resolution=128,
            decoder="hierarchical",
            num_inference_steps=c.sampling_steps,
            guidance_scale=c.guidance_scale,
            takes_views=False,
        )

    def sample(self, batch: dict[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Return the batch's first pictures, if it has some, and front slices of the averaged weights' shapes, white inside."""
        return sample_slices(self.pipeline(ctx.ema["model"]), self.shape_data, batch, ctx)

    def check_evaluation(self, config: EvaluationConfig) -> None:
        """Refuse metrics that shapes do not have."""
        check_solid_metrics(config)

    def evaluate(self, config: EvaluationConfig, ctx: StepContext) -> dict[str, float]:
        """Make shapes of pictures with the averaged weights."""
        return generated_metrics(config, self.pipeline(ctx.ema["model"]), self.config.image_size)

    def export(self, modules: dict[str, nn.Module], out: Path) -> None:
        """Write the pipeline."""
        pipe = self.pipeline(modules["model"])
        if self.config.export_dtype == "float16":
            halves = {name: copy.deepcopy(part).half() for name, part in pipe.components.items() if isinstance(part, nn.Module)}
            pipe.register_modules(**halves)
        pipe.save_pretrained(out)


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the chosen values, 0 of none."""
    return (values * mask).sum() / mask.sum().clamp_min(1)


def build(config: Config) -> ShapeFlowTask:
    """Build the task of a recipe: open pictures, shapes, VAE and encoders."""
    encoder = None
    if config.pretrained_image_encoder is not None:
        encoder = Dinov2Model.from_pretrained(config.pretrained_image_encoder, torch_dtype=torch.float32).eval().requires_grad_(False)
    text = load_text(config.text_encoder, config.tokenizer)
    views, samples = ViewDataset(config.data, config.image_size), ShapeSamples(config.shapes)
    vae, slim_vae = open_vaes(config.vae)
    return ShapeFlowTask(config, views, samples, vae, text, encoder, slim_vae)
