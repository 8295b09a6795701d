"""Train a shape transformer by flow matching, on the latents of a shape VAE, given pictures or captions.

loss = mean |v(x_t, t, c) - (latent - noise)|^2, x_t = t latent + (1 - t) noise

A step's batch sees pictures or texts as a whole. Pictures are cut out as the pipeline does; some come from an image tokenizer and back, so
that generated pictures are not strange to the model. The image encoder learns along, or is a trained one that stays as it is.

Source: Hunyuan3D 2.0 (arXiv 2501.12202); condition dropout is ours, without it guidance has nothing to lead away from.
Letters: b shapes, n latent tokens, e width of a latent, m condition tokens, w width of one.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Dinov2Config, Dinov2Model

from genkit.conditioners.pictures import encode_pictures, object_rgba, recentred, to_condition
from genkit.conditioners.text import encode_text
from genkit.data.shape_samples import ShapeSamples
from genkit.data.views import ViewDataset
from genkit.generators.shape_dit import ShapeDiT
from genkit.pipelines.base import GenPipeline
from genkit.pipelines.shape import ShapePipeline
from genkit.schedulers.flow_matching import FlowMatchingScheduler, interpolate, logit_normal_times
from genkit.tasks._conditions import ConditionTable
from genkit.tasks._prompts import load_text, prompts_of
from genkit.tokenizers.shape_vae import ShapeVAE
from genkit.training.optimizers import kernels, muon_with_adamw
from genkit.training.task import Phase, StepContext, Task

logger = logging.getLogger(__name__)

NUM_SAMPLES = 4
SLICE = 64  # side of the slices that sample grids show


@dataclass
class TimesConfig:
    """Law of the times: uniform, or logit-normal with a shift; see `logit_normal_times`."""

    law: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift_scale: float = 1.0


@dataclass
class Config:
    """Settings of the task.

    Attributes:
        data: parquet file of views with captions; its rows are the meshes that were prepared.
        shapes: folder of prepared shapes, see `tokenizers/prepare_shapes.py`.
        vae: folder of a shape VAE or of a pipeline with one.
        image_size: pictures are reduced to this side before the object is cut out; also the side of the condition.
        views: turntable views to learn from; all if null.
        image_encoder: of `Dinov2Config`, to learn along; {} for text alone.
        pretrained_image_encoder: folder or hub id of one that stays as it is, instead.
        text_encoder, tokenizer: folders or hub ids; null for no text.
        text_probability: how often a step sees captions instead of pictures.
        prompts_per_picture: captions per view.
        null_probability: how often the condition is left out.
        picture_tokenizer: pipeline whose `vqvae` pictures pass through; null for none.
        generated_probability: how often they do.
        model: of `ShapeDiT`; widths of latents and conditions follow from the others.
        times: their law.
        sampling_steps, guidance_scale: of the sample grids and the exported pipeline.
        start: folder of a pipeline whose transformer and image encoder the training starts from; null starts anew.
        optimizer: "adamw", or "muon": Muon for the matrices of the blocks, AdamW for the rest.
        lr, betas, eps, weight_decay: of the optimizer.
        export_dtype: floating type of the exported weights.
        seed: of the initial weights.
    """

    data: str = "data/lowpoly/train.parquet"
    shapes: str = "shapes/train"
    vae: str = "genkit/shape-vae-lowpoly"
    image_size: int = 64
    views: tuple[int, ...] | None = None
    image_encoder: dict[str, Any] = field(default_factory=dict)
    pretrained_image_encoder: str | None = None
    text_encoder: str | None = None
    tokenizer: str | None = None
    text_probability: float = 0.3
    prompts_per_picture: int = 8
    null_probability: float = 0.1
    picture_tokenizer: str | None = None
    generated_probability: float = 0.5
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
    seed: int = 0

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in ("text_probability", "null_probability", "generated_probability")}
        if wrong := {name: value for name, value in shares.items() if not 0 <= value <= 1}:
            raise ValueError(f"probabilities must lie in [0, 1], got {wrong}.")
        if self.lr <= 0 or self.prompts_per_picture < 1:
            raise ValueError(f"lr and prompts_per_picture must be above 0, got {self.lr} and {self.prompts_per_picture}.")
        if (self.text_encoder is None) != (self.tokenizer is None):
            raise ValueError(f"text needs text_encoder and tokenizer, got {self.text_encoder!r} and {self.tokenizer!r}; give both or none.")
        if self.image_encoder and self.pretrained_image_encoder is not None:
            raise ValueError("give image_encoder (to learn along) or pretrained_image_encoder, not both.")
        if not self.image_encoder and self.pretrained_image_encoder is None and self.text_encoder is None:
            raise ValueError("nothing to be given: name an image encoder, a text encoder, or both.")


class ConditionPictures(Dataset[dict[str, Tensor]]):
    """Views of shapes, cut out as the pipeline does; item i is {"image" [3, s, s], "index" of the view, "shape"}.

    Args:
        views: pictures.
        shapes: number of each object's shape.
        chosen: turntable views; all if None.
        size: s.
        again: pictures [k, 3, h, w] in [-1, 1] -> the same from a tokenizer, or None; items have "generated" then.

    Raises:
        ValueError: if no picture shows an object that can be cut out.
    """

    def __init__(self, views: ViewDataset, shapes: dict[int, int], chosen: Sequence[int] | None, size: int, again: Any = None) -> None:
        self.views, self.shapes = views, shapes
        rows = [row for row in views.rows_of(chosen) if views.object_of(row) in shapes]
        pictures, self.rows = [], []
        for row in rows:
            try:
                pictures.append(cut_out(views[row]["image"], size))
            except ValueError:
                continue
            self.rows.append(row)
        if not self.rows:
            raise ValueError(f"none of {len(rows)} pictures shows an object on a plain background.")
        if len(self.rows) < len(rows):
            logger.warning("%d of %d pictures left out: no object could be cut out", len(rows) - len(self.rows), len(rows))
        self.pictures = torch.stack(pictures)
        self.generated = self._again(again, size) if again is not None else None

    def _again(self, again: Any, size: int) -> Tensor:
        """Return the pictures after the tokenizer, cut out anew; the original where that fails."""
        found = []
        for start in range(0, len(self.rows), 32):
            rows = self.rows[start : start + 32]
            for place, picture in enumerate(again(torch.stack([self.views[row]["image"] for row in rows]))):
                try:
                    found.append(cut_out(picture, size))
                except ValueError:
                    found.append(self.pictures[start + place])
        return torch.stack(found)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        item = {"index": torch.tensor(row), "shape": torch.tensor(self.shapes[self.views.object_of(row)])}
        pictures = {"image": self.pictures} | ({} if self.generated is None else {"generated": self.generated})
        return item | {name: stack[index].float() / 127.5 - 1 for name, stack in pictures.items()}


def cut_out(image: Tensor, size: int) -> Tensor:
    """Return a picture [3, h, w] in [-1, 1] with its object centred on white, [3, size, size] bytes.

    Raises:
        ValueError: where no object can be cut out.
    """
    from PIL import Image

    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    picture, _ = recentred(object_rgba(Image.fromarray(pixels)))
    return ((to_condition(picture, size)[0] + 1) * 127.5).round().byte()


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

    Raises:
        ValueError: if shapes and pictures are not of the same objects, or widths differ.
    """

    name = "shape_flow"
    ema = ("model",)
    find_unused_parameters = True  # a step with captions leaves the image encoder out

    def __init__(
        self, config: Config, views: ViewDataset, samples: ShapeSamples, vae: ShapeVAE, text: tuple[nn.Module, Any] | None = None,
        pictures_encoder: nn.Module | None = None,
    ) -> None:  # fmt: skip
        self.config, self.views, self.samples, self.vae = config, views, samples, vae.eval().requires_grad_(False)
        self.tokenizer = text[1] if text else None
        self.shapes = shapes_of(samples, views)
        self.frozen = {"vae": self.vae} | ({"text_encoder": text[0]} if text else {})
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
        self.has_pictures = encoder is not None
        if pictures_encoder is not None:
            self.frozen["image_encoder"] = pictures_encoder
        self.modules = {"model": ShapeFlowModel(transformer, own)}
        if config.start is not None:
            self._load(GenPipeline.from_pretrained(config.start))
        self.latents: dict[str, Tensor] = {}
        self.table: ConditionTable | None = None

    def _load(self, pipe: Any) -> None:
        """Start from the weights of a pipeline."""
        model = cast(ShapeFlowModel, self.modules["model"])
        model.transformer.load_state_dict(pipe.transformer.state_dict())
        if model.image_encoder is not None and pipe.image_encoder is not None:
            model.image_encoder.load_state_dict(pipe.image_encoder.state_dict())

    # ---- data ----

    def dataset(self) -> ConditionPictures:
        """Return the pictures; latents and captions are computed at the first call."""
        if not self.latents:
            self.latents = self._latents()
        if self.tokenizer is not None and self.table is None:
            self.table = ConditionTable(prompts_of(self.views, self.config.prompts_per_picture), self._encode_text)
        again = None
        if self.config.picture_tokenizer is not None:
            vqvae = cast(Any, GenPipeline.from_pretrained(self.config.picture_tokenizer)).vqvae.float().eval()
            again = torch.no_grad()(lambda images: vqvae.decode(vqvae.encode(images).codes).sample.clamp(-1, 1))
        return ConditionPictures(self.views, self.shapes, self.config.views, self.config.image_size, again)

    @torch.no_grad()
    def _latents(self) -> dict[str, Tensor]:
        """Return mean and standard deviation [k, n, e] of every shape's latents."""
        config, counts, rng = self.vae.config, self.samples.counts, np.random.default_rng(self.config.seed)
        found: dict[str, list[Tensor]] = {"mean": [], "std": []}
        for i in range(len(self.samples)):
            surface = self.samples[i]["surface"]
            rows = np.concatenate(
                [
                    rng.permutation(counts.surface)[: config["pc_size"]],
                    counts.surface + rng.permutation(counts.edges)[: config["pc_sharpedge_size"]],
                ]
            )
            posterior = self.vae.encode(surface[rows][None, :, : 3 + config["point_feats"]])
            found["mean"].append(posterior.mean)
            found["std"].append(posterior.std)
        return {name: torch.cat(parts).float() for name, parts in found.items()}

    def _encode_text(self, prompts: Sequence[Any]) -> dict[str, Tensor]:
        with torch.no_grad():
            encoded = encode_text(list(prompts), self.tokenizer, self.frozen["text_encoder"])
        return {"tokens": encoded.tokens.float(), "mask": encoded.mask}

    # ---- one step ----

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return one optimizer over all trained parameters."""
        c, module = self.config, self.modules["model"]
        if c.optimizer == "muon":
            inner = ("transformer.blocks.", "transformer.single_blocks.", "image_encoder.encoder.")
            blocks, rest = kernels(module, inner)
            return {"main": muon_with_adamw(blocks, rest, lr=c.lr, betas=c.betas, weight_decay=c.weight_decay)}
        settings: dict[str, Any] = {"lr": c.lr, "betas": c.betas, "eps": c.eps, "weight_decay": c.weight_decay}
        return {"main": torch.optim.AdamW(module.parameters(), **settings)}

    def step(self, batch: dict[str, Tensor], ctx: StepContext) -> Iterator[Phase]:
        """Compute the loss."""
        if not self.latents:
            raise RuntimeError("ShapeFlowTask: the latents are not computed yet; call dataset() first.")
        b, c, shape = len(batch["shape"]), self.config, batch["shape"].cpu()
        mean, std = (self.latents[name][shape].to(ctx.device) for name in ("mean", "std"))
        size = mean.shape[1:]
        data = (mean + std * ctx.randn("posterior", b, *size)) * self.vae.config["scale_factor"]
        noise, t = ctx.randn("noise", b, *size), self._times(ctx, b)
        keep = ctx.rand("null", b) >= c.null_probability
        condition, mask = self._condition(batch, ctx)
        velocity = self.modules["model"](interpolate(data, noise, t), t, condition, keep, mask)
        errors = (velocity.float() - (data - noise)).square().flatten(1).mean(1)
        yield Phase("main", errors.mean(), {"late": _mean_where(errors.detach(), t > 0.5), "early": _mean_where(errors.detach(), t <= 0.5)})

    def _times(self, ctx: StepContext, b: int) -> Tensor:
        law = self.config.times
        if law.law == "uniform":
            return ctx.rand("time", b)
        return logit_normal_times(ctx.randn("time", b), law.mean, law.std, law.shift_scale)

    def _condition(self, batch: dict[str, Tensor], ctx: StepContext) -> tuple[Tensor, Tensor | None]:
        """Return pictures [b, 3, s, s] or tokens [b, m, w] of a step, and the tokens' mask."""
        is_text = self.table is not None and (not self.has_pictures or ctx.draw("kind") < self.config.text_probability)
        if is_text:
            assert self.table is not None
            found = self.table.pick(batch["index"], ctx)
            return found["tokens"], found["mask"]
        images = batch["image"]
        if "generated" in batch:
            is_generated = ctx.rand("generated", len(images), 1, 1, 1) < self.config.generated_probability
            images = torch.where(is_generated, batch["generated"], images)
        encoder = self.frozen.get("image_encoder")
        return (images if encoder is None else encode_pictures(images, encoder)), None

    # ---- what comes out ----

    def pipeline(self, module: nn.Module) -> ShapePipeline:
        """Return the pipeline around trained networks."""
        model, c = cast(ShapeFlowModel, module), self.config
        return ShapePipeline(
            transformer=model.transformer,
            vae=self.vae,
            scheduler=FlowMatchingScheduler(),
            image_encoder=cast(Any, model.image_encoder if model.image_encoder is not None else self.frozen.get("image_encoder")),
            text_encoder=cast(Any, self.frozen.get("text_encoder")),
            tokenizer=self.tokenizer,
            condition_size=c.image_size,
            octree_resolution=128,
            decoder="hierarchical",
            num_inference_steps=c.sampling_steps,
            guidance_scale=c.guidance_scale,
        )

    @torch.no_grad()
    def sample(self, batch: dict[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Return the batch's first pictures, if it has some, and front slices of the averaged weights' shapes, white inside."""
        pipe = self.pipeline(ctx.ema["model"])
        if self.has_pictures:
            images = batch["image"][:NUM_SAMPLES]
            tokens = [encode_pictures(image[None], pipe.image_encoder) for image in images]
        else:
            captions = [self.views.captions[self.views.object_of(int(i))] for i in batch["index"][:NUM_SAMPLES]]
            images, found = None, self._encode_text(captions)
            tokens = [rows[keep][None].to(ctx.device) for rows, keep in zip(found["tokens"], found["mask"], strict=True)]
        states = pipe.run(tokens, list(range(len(tokens))), self.config.sampling_steps, self.config.guidance_scale, len(tokens))
        *_, last = states
        axis = torch.linspace(-1, 1, SLICE, device=ctx.device)
        y, x = torch.meshgrid(-axis, axis, indexing="ij")
        plane = torch.stack([x, y, torch.zeros_like(x)], -1).view(1, -1, 3).expand(len(tokens), -1, -1)
        logits = self.vae.query(plane, self.vae.decode(last.sample / self.vae.config["scale_factor"]))
        slices = {"slices": logits.clamp(-1, 1).view(-1, 1, SLICE, SLICE).expand(-1, 3, -1, -1)}
        return slices if images is None else {"given": images, **slices}

    def export(self, modules: dict[str, nn.Module], out: Path) -> None:
        """Write the pipeline."""
        pipe = self.pipeline(modules["model"])
        if self.config.export_dtype == "float16":
            halves = {name: copy.deepcopy(part).half() for name, part in pipe.components.items() if isinstance(part, nn.Module)}
            pipe.register_modules(**halves)
        pipe.save_pretrained(out)


def shapes_of(samples: ShapeSamples, views: ViewDataset) -> dict[int, int]:
    """Return the number of the shape of each object that has one.

    Raises:
        ValueError: if the shapes were not prepared from the rows of the pictures.
    """
    found = {}
    for number, name in enumerate(samples.names):
        row, _, own = name.partition("_")
        place = int(row) if row.isdigit() else -1
        if not 0 <= place < views.num_objects or views.names[place] != own:
            raise ValueError(f"shape {name!r} is none of the {views.num_objects} objects of the pictures; prepare both from one file.")
        found[place] = number
    return found


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the chosen values, 0 of none."""
    return (values * mask).sum() / mask.sum().clamp_min(1)


def open_vae(path: str) -> ShapeVAE:
    """Open a shape VAE: its folder, or a pipeline's."""
    if (Path(path) / "config.json").is_file():
        return cast(ShapeVAE, ShapeVAE.from_pretrained(path))
    return cast(ShapeVAE, cast(Any, GenPipeline.from_pretrained(path)).vae)


def build(config: Config) -> ShapeFlowTask:
    """Build the task of a recipe: open pictures, shapes, VAE and encoders."""
    encoder = None
    if config.pretrained_image_encoder is not None:
        encoder = Dinov2Model.from_pretrained(config.pretrained_image_encoder, torch_dtype=torch.float32).eval().requires_grad_(False)
    text = load_text(config.text_encoder, config.tokenizer)
    views, samples = ViewDataset(config.data, config.image_size), ShapeSamples(config.shapes)
    return ShapeFlowTask(config, views, samples, open_vae(config.vae), text, encoder)
