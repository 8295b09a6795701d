"""Train a ViT-VQGAN tokenizer on pictures: reconstruction, quantizer loss and a perceptual term.

loss = l1 * mean|x' - x| + l2 * mean (x' - x)^2 + perceptual * d(x', x) + quantizer loss, pictures in [-1, 1].

The first steps may train a plain autoencoder; then the codes start at the k-means centres of its latents and quantization begins. On 64x64
views of game assets SimVQ's own start had 4 % of 1,024 codes in use after 500 steps (width 32), a start at the blank encoder's latents had
17 % after 300 (width 8); started this way, 90 % were in use after 500 steps (width 8).

The perceptual term compares feature maps of EfficientNet-Lite1 (extra `features`); the numbers in our reports come from Lite0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from genkit.checks import choose
from genkit.data.images import open_dataset
from genkit.eval.features import FeatureNetwork
from genkit.tasks.losses import perceptual_distance
from genkit.tokenizers.quantizers import QUANTIZERS
from genkit.tokenizers.vit_vqgan import ViTVQModel
from genkit.training.task import Phase, StepContext, Task


@dataclass
class TowerConfig:
    """One transformer tower: width, blocks, heads, MLP width, head width and the MLP's activation."""

    dim: int = 128
    depth: int = 3
    heads: int = 4
    mlp_dim: int = 512
    dim_head: int = 32
    act: str = "gelu"


@dataclass
class QuantizerConfig:
    """The quantizer by name ("simvq", "l2_vq", "vq", "ema_vq", "fsq", ...) and its sizes, as far as it has them; `options` are its others.

    See `genkit.tokenizers.quantizers.build_quantizer`.
    """

    name: str = "simvq"
    codebook_size: int = 1024
    dim: int = 32
    beta: float = 0.25
    gradient: str = "straight_through"
    options: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Return the config of `build_quantizer`.

        Raises:
            ValueError: for an unknown name.
        """
        entry = QUANTIZERS[choose(self.name, QUANTIZERS, "quantizer")]
        taken = (*entry.needs, *entry.takes)
        common: dict[str, Any] = {key: getattr(self, key) for key in ("codebook_size", "dim", "beta", "gradient") if key in taken}
        return {"name": self.name, **common, **self.options}


@dataclass
class Config:
    """Settings of the task.

    Attributes:
        data: parquet file, folder of pictures or hub id.
        image_size: pictures are reduced to this side, in pixels.
        patch_size: pixels per token side.
        stem: "conv" or "patch".
        encoder, decoder, quantizer: sizes of the model's parts.
        lr: peak learning rate of AdamW; betas, weight_decay: its other settings. Norms, biases and tables are not decayed.
        l1_weight, l2_weight, perceptual_weight: weights of the terms; 0 switches a term off.
        perceptual_network: feature network of the perceptual term.
        perceptual_size: pictures are resized to this side for it, in pixels.
        flip: mirror each picture with probability 1/2.
        quantize_after: steps without quantization; 0 starts from the quantizer's own initialisation, as published.
        fit_pictures: pictures whose latents the codes are fitted to after those steps.
        seed: of the initial weights.
    """

    data: str = "data/lowpoly/train.parquet"
    image_size: int = 64
    patch_size: int = 4
    stem: str = "conv"
    encoder: TowerConfig = field(default_factory=TowerConfig)
    decoder: TowerConfig = field(default_factory=TowerConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    l1_weight: float = 1.0
    l2_weight: float = 1.0
    perceptual_weight: float = 1.0
    perceptual_network: str = "efficientnet-lite1"
    perceptual_size: int = 128
    flip: bool = True
    quantize_after: int = 0
    fit_pictures: int = 192
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("l1_weight", "l2_weight", "perceptual_weight", "weight_decay", "quantize_after"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} must be at least 0, got {getattr(self, key)}.")
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}.")


class ViTVQTask(Task):
    """One optimizer, one network: reconstruct a batch of pictures through the codes."""

    name = "vit_vqgan"
    ema = ("vqvae",)

    def __init__(self, config: Config) -> None:
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = ViTVQModel(
                patch_size=config.patch_size,
                encoder_config=asdict(config.encoder),
                decoder_config=asdict(config.decoder),
                quantizer_config=config.quantizer.settings(),
                stem=config.stem,
                sample_size=config.image_size,
            )
        self.modules: dict[str, nn.Module] = {"vqvae": model}
        self.find_unused_parameters = config.quantize_after > 0  # the quantizer's, before it is used
        self.frozen: dict[str, nn.Module] = {}
        if config.perceptual_weight:
            self.frozen["features"] = FeatureNetwork(config.perceptual_network, size=config.perceptual_size)

    def dataset(self) -> Dataset[dict[str, Tensor]]:
        """Return the pictures: {"image": [3, h, w] in [-1, 1], "index"}."""
        return open_dataset(self.config.data, self.config.image_size)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return AdamW over the trained parameters, with decay on matrices and kernels only."""
        trained = [(n, p) for n, p in self.modules["vqvae"].named_parameters() if p.requires_grad]
        decayed = [p for n, p in trained if p.ndim > 1 and "quantizer" not in n]
        rest = [p for n, p in trained if p.ndim <= 1 or "quantizer" in n]
        groups = [{"params": decayed, "weight_decay": self.config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        return {"main": torch.optim.AdamW(groups, lr=self.config.lr, betas=self.config.betas)}

    def step(self, batch: dict[str, Tensor], ctx: StepContext) -> Iterator[Phase]:
        """Compute the loss on pictures [b, 3, h, w]."""
        x = batch["image"]
        if self.config.flip:
            mirrored = ctx.rand("flip", len(x)) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        quantize = ctx.step >= self.config.quantize_after
        if self.config.quantize_after and ctx.step == self.config.quantize_after and ctx.part == 0:
            self._fit_codes(ctx)
        out = self.modules["vqvae"](x, quantize=quantize)
        sample = out.sample.float()
        terms = {"l1": F.l1_loss(sample, x), "l2": F.mse_loss(sample, x)}
        loss = self.config.l1_weight * terms["l1"] + self.config.l2_weight * terms["l2"]
        psnr = 10 * torch.log10(4 / terms["l2"].detach().clamp_min(1e-10))
        if quantize:
            loss = loss + out.loss
            terms |= out.terms
            used = out.indices.unique().numel() / cast(ViTVQModel, self.raw("vqvae")).quantizer.codebook_size
            terms["codes_used"] = torch.tensor(used)  # of this batch; `CodebookStats` counts over a data set
        if self.config.perceptual_weight:
            network = cast(FeatureNetwork, self.frozen["features"])
            with torch.no_grad():
                target = network.maps(x)
            terms["perceptual"] = perceptual_distance(network.maps(sample), target)
            loss = loss + self.config.perceptual_weight * terms["perceptual"]
        yield Phase(optimizer="main", loss=loss, logs={**terms, "psnr": psnr})

    @torch.no_grad()
    def _fit_codes(self, ctx: StepContext) -> None:
        """Start the codes at the latents of some pictures, the same in every process, in the model and its average."""
        model, average = cast(ViTVQModel, self.raw("vqvae")), cast(ViTVQModel, ctx.ema["vqvae"])
        pictures, generator = self.dataset(), ctx.generator("codes")
        chosen = torch.randperm(len(pictures), generator=generator)[: self.config.fit_pictures].tolist()  # type: ignore[arg-type]
        with torch.autocast(ctx.device.type, enabled=False):
            latents = [model.encode_latents(pictures[i]["image"][None].to(ctx.device)).flatten(0, 1) for i in chosen]
        model.quantizer.fit(torch.cat(latents), generator)
        average.quantizer.load_state_dict(model.quantizer.state_dict())

    def sample(self, batch: dict[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Return up to 16 pictures above their reconstructions by the EMA model, [2 * m, 3, h, w]."""
        x = batch["image"][:16]
        sample = ctx.ema["vqvae"](x, quantize=ctx.step >= self.config.quantize_after).sample
        return {"reconstructions": torch.cat([x, sample.float().clamp(-1, 1)])}

    def generate(self, indices: Sequence[int], ctx: StepContext) -> Tensor:
        """Return reconstructions [len(indices), 3, h, w] of the training pictures by the averaged weights (rFID and the like)."""
        pictures = self.dataset()
        x = torch.stack([pictures[i % len(pictures)]["image"] for i in indices]).to(ctx.device)  # type: ignore[arg-type]
        return cast(Tensor, ctx.ema["vqvae"](x, quantize=ctx.step >= self.config.quantize_after).sample)

    def export(self, modules: dict[str, nn.Module], out: Path) -> None:
        """Write the tokenizer as `out/vqvae`."""
        cast(ViTVQModel, modules["vqvae"]).save_pretrained(out / "vqvae")


def build(config: Config) -> ViTVQTask:
    """Build the task of a recipe."""
    return ViTVQTask(config)
