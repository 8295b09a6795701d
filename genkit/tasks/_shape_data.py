"""What tasks on shapes share: latents of prepared shapes, cut-out pictures of them, captions.

Letters: b shapes, n latent tokens, e width of a latent, m condition tokens, w width of one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from genkit.conditioners.pictures import encode_pictures, object_rgba, recentred, to_condition
from genkit.conditioners.text import encode_text
from genkit.data.shape_samples import ShapeSamples
from genkit.data.views import ViewDataset
from genkit.pipelines.base import GenPipeline
from genkit.pipelines.shape import ShapePipeline
from genkit.pipelines.tokenizers import load_tokenizer
from genkit.tasks._conditions import ConditionTable
from genkit.tasks._prompts import prompts_of
from genkit.tokenizers.shape_vae import ShapeVAE
from genkit.training.task import StepContext

logger = logging.getLogger(__name__)

NUM_SAMPLES = 4
SLICE = 64  # side of the slices that sample grids show


@dataclass
class ShapeDataConfig:
    """Settings of the data.

    Attributes:
        data: parquet file of views with captions; its rows are the meshes that were prepared.
        shapes: folder of prepared shapes, see `tokenizers/prepare_shapes.py`.
        image_size: pictures are reduced to this side before the object is cut out; also the side of the condition.
        views: turntable views to learn from; all if null.
        text_probability: how often a step sees captions instead of pictures.
        prompts_per_picture: captions per view.
        null_probability: how often the condition is left out.
        picture_tokenizer: pictures pass through it, see `load_tokenizer`; null for none.
        generated_probability: how often they do.
        seed: of the initial weights, and of the surface points that are encoded.
    """

    data: str = "data/lowpoly/train.parquet"
    shapes: str = "shapes/train"
    image_size: int = 64
    views: tuple[int, ...] | None = None
    text_probability: float = 0.3
    prompts_per_picture: int = 8
    null_probability: float = 0.1
    picture_tokenizer: str | None = None
    generated_probability: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in ("text_probability", "null_probability", "generated_probability")}
        if wrong := {name: value for name, value in shares.items() if not 0 <= value <= 1}:
            raise ValueError(f"probabilities must lie in [0, 1], got {wrong}.")
        if self.prompts_per_picture < 1:
            raise ValueError(f"prompts_per_picture must be at least 1, got {self.prompts_per_picture}.")


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
        found, failed = [], 0
        for start in range(0, len(self.rows), 32):
            rows = self.rows[start : start + 32]
            for place, picture in enumerate(again(torch.stack([self.views[row]["image"] for row in rows]))):
                try:
                    found.append(cut_out(picture, size))
                except ValueError:
                    found.append(self.pictures[start + place])
                    failed += 1
        if failed:
            logger.warning("%d of %d pictures stay as they were: no object in what the tokenizer made", failed, len(self.rows))
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
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    picture, _ = recentred(object_rgba(Image.fromarray(pixels)))
    return ((to_condition(picture, size)[0] + 1) * 127.5).round().byte()


class ShapeData:
    """Latents and conditions of prepared shapes.

    Args:
        config: the settings.
        views: pictures and captions.
        samples: prepared shapes of the same objects.
        vae: of the latents.
        text: text encoder and its tokenizer, or None.
        has_pictures: whether steps may see pictures.

    Raises:
        ValueError: if shapes and pictures are not of the same objects.
    """

    def __init__(
        self,
        config: ShapeDataConfig,
        views: ViewDataset,
        samples: ShapeSamples,
        vae: ShapeVAE,
        text: tuple[nn.Module, Any] | None,
        has_pictures: bool,
    ) -> None:
        self.config, self.views, self.samples, self.vae, self.text, self.has_pictures = config, views, samples, vae, text, has_pictures
        self.shapes = shapes_of(samples, views)
        self.latents: dict[str, Tensor] = {}
        self.table: ConditionTable | None = None

    def dataset(self) -> ConditionPictures:
        """Return the pictures; latents and captions are computed at the first call."""
        if not self.latents:
            self.latents = self._latents()
        if self.text is not None and self.table is None:
            self.table = ConditionTable(prompts_of(self.views, self.config.prompts_per_picture), self.encode_text)
        again = None
        if self.config.picture_tokenizer is not None:
            vqvae = load_tokenizer(self.config.picture_tokenizer).float()
            again = torch.no_grad()(lambda images: vqvae.decode(vqvae.encode(images).indices).sample.clamp(-1, 1))
        return ConditionPictures(self.views, self.shapes, self.config.views, self.config.image_size, again)

    @torch.no_grad()
    def _latents(self) -> dict[str, Tensor]:
        """Return mean and standard deviation [k, n, e] of every shape's latents."""
        config, counts, rng = self.vae.config, self.samples.counts, np.random.default_rng(self.config.seed)
        found: dict[str, list[Tensor]] = {"mean": [], "std": []}
        for i in range(len(self.samples)):
            surface = self.samples[i]["surface"]
            plain = rng.permutation(counts.surface)[: config["pc_size"]]
            sharp = counts.surface + rng.permutation(counts.edges)[: config["pc_sharpedge_size"]]
            posterior = self.vae.encode(surface[np.concatenate([plain, sharp])][None, :, : 3 + config["point_feats"]])
            found["mean"].append(posterior.mean)
            found["std"].append(posterior.std)
        return {name: torch.cat(parts).float() for name, parts in found.items()}

    def encode_text(self, prompts: Sequence[Any]) -> dict[str, Tensor]:
        """Return tokens [u, m, w] and their mask [u, m] of texts."""
        assert self.text is not None
        with torch.no_grad():
            encoded = encode_text(list(prompts), self.text[1], self.text[0])
        return {"tokens": encoded.tokens.float(), "mask": encoded.mask}

    def latent(self, batch: dict[str, Tensor], ctx: StepContext) -> Tensor:
        """Return drawn latents [b, n, e] of a batch, scaled as generators see them."""
        if not self.latents:
            raise RuntimeError("the latents are not computed yet; call dataset() first.")
        shape = batch["shape"].cpu()
        mean, std = (self.latents[name][shape].to(ctx.device) for name in ("mean", "std"))
        return (mean + std * ctx.randn("posterior", len(mean), *mean.shape[1:])) * self.vae.config["scale_factor"]

    def condition(self, batch: dict[str, Tensor], ctx: StepContext) -> tuple[Tensor, Tensor | None]:
        """Return pictures [b, 3, s, s] or text tokens [b, m, w] of a step, and the tokens' mask."""
        if self.table is not None and (not self.has_pictures or ctx.draw("kind") < self.config.text_probability):
            found = self.table.pick(batch["index"], ctx)
            return found["tokens"], found["mask"]
        images = batch["image"]
        if "generated" in batch:
            is_generated = ctx.rand("generated", len(images), 1, 1, 1) < self.config.generated_probability
            images = torch.where(is_generated, batch["generated"], images)
        return images, None

    def keep(self, ctx: StepContext, b: int) -> Tensor:
        """Draw which samples keep their condition [b] bool."""
        return ctx.rand("null", b) >= self.config.null_probability


@torch.no_grad()
def sample_slices(pipe: ShapePipeline, data: ShapeData, batch: dict[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
    """Return the first pictures of a batch, if it has some, and front slices of what a pipeline makes of them, white inside, fixed seeds.

    Returns:
        "given" [m, 3, s, s] and "slices" [m, 3, 64, 64] in [-1, 1].
    """
    found: dict[str, Tensor] = {}
    if data.has_pictures:
        found["given"] = batch["image"][:NUM_SAMPLES]
        tokens = [encode_pictures(image[None], pipe.image_encoder) for image in found["given"]]
    else:
        captions = [data.views.captions[data.views.object_of(int(i))] for i in batch["index"][:NUM_SAMPLES]]
        encoded = data.encode_text(captions)
        tokens = [rows[keep][None].to(ctx.device) for rows, keep in zip(encoded["tokens"], encoded["mask"], strict=True)]
    settings = pipe.config["num_inference_steps"], pipe.config["guidance_scale"]
    *_, last = pipe.run(tokens, list(range(len(tokens))), *settings, len(tokens))
    axis = torch.linspace(-1, 1, SLICE, device=ctx.device)
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    plane = torch.stack([x, y, torch.zeros_like(x)], -1).view(1, -1, 3).expand(len(tokens), -1, -1)
    logits = data.vae.query(plane, data.vae.decode(last.sample / data.vae.config["scale_factor"]))
    return {**found, "slices": logits.clamp(-1, 1).view(-1, 1, SLICE, SLICE).expand(-1, 3, -1, -1)}


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


def open_vaes(path: str) -> tuple[ShapeVAE, ShapeVAE | None]:
    """Open a shape VAE, and the one with a slim head if it has one: a VAE's folder, or a pipeline's name or folder."""
    if (Path(path) / "config.json").is_file():
        return cast(ShapeVAE, ShapeVAE.from_pretrained(path)), None
    pipe: Any = GenPipeline.from_pretrained(path)
    return pipe.vae, pipe.slim_vae
