"""What tasks of image tokenizers share: reconstruction through codes, a perceptual term, and an adversarial stage.

loss = l1 mean|x' - x| + l2 mean (x' - x)^2 + laplace logit-Laplace(x', x) + perceptual d(x', x) + quantizer loss + adversarial term,
pictures in [-1, 1]

The discriminator has an optimizer of its own and sees the reconstructions of the same evaluation. Perceptual distances are those of
EfficientNet-Lite1's features (extra `features`; the numbers in our reports come from Lite0), or LPIPS from the user's files.

Letters: b pictures, h w rows and columns.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from genkit.checks import choose
from genkit.data.images import open_dataset
from genkit.distill.adversarial import GAN_FORMS
from genkit.eval.features import FeatureNetwork
from genkit.eval.lpips import LPIPS
from genkit.tasks.losses import perceptual_distance
from genkit.tokenizers.discriminators import KINDS, LeCam, adaptive_weight, build_discriminator, gradient_penalty, logit_laplace
from genkit.tokenizers.quantizers import QUANTIZERS
from genkit.tokenizers.vq_model import VQModel
from genkit.training.task import Phase, StepContext, Task
from genkit.weights import read_checkpoint

LPIPS_NAME = "lpips-vgg"


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
class AdversarialConfig:
    """The adversarial stage.

    Attributes:
        discriminator: "style" (StyleGAN2's) or "patch" (PatchGAN's).
        width: of it; the published one if null.
        form: of the tokenizer's term, see `GAN_FORMS`.
        discriminator_form: of the discriminator's loss; as `form` if null.
        weight: of the tokenizer's term.
        is_adaptive: also times the ratio of the gradients at the decoder's last layer.
        start: step from which on it is used.
        r1_gamma, r1_every: penalty on the gradient at real pictures, and how often; 0 for none.
        lecam_weight: pull towards running averages of the other side's logits; 0 for none.
        lr: of the discriminator; the tokenizer's if null.
    """

    discriminator: Literal["style", "patch"] = "style"
    width: int | None = None
    form: str = "vanilla"
    discriminator_form: str | None = None
    weight: float = 0.1
    is_adaptive: bool = False
    start: int = 0
    r1_gamma: float = 0.0
    r1_every: int = 16
    lecam_weight: float = 0.0
    lr: float | None = None

    def __post_init__(self) -> None:
        choose(self.discriminator, KINDS, "discriminator")
        for form in (self.form, self.discriminator_form or self.form):
            choose(form, GAN_FORMS, "form of adversarial loss")
        if min(self.weight, self.r1_gamma, self.lecam_weight, self.start) < 0 or self.r1_every < 1:
            raise ValueError("adversarial: weights, r1_gamma and start must be at least 0 and r1_every at least 1.")


@dataclass
class TokenizerConfig:
    """Settings that tasks of tokenizers share.

    Attributes:
        data: parquet file, folder of pictures or hub id.
        image_size: pictures are reduced to this side, in pixels.
        quantizer: between the towers.
        lr: peak learning rate of AdamW; betas, weight_decay: its other settings. Norms, biases and tables are not decayed.
        l1_weight, l2_weight, laplace_weight, perceptual_weight: weights of the terms; 0 switches a term off.
        perceptual_network: feature network of the perceptual term; "lpips-vgg" needs `lpips_weights`.
        perceptual_size: pictures are resized to this side for it, in pixels; LPIPS sees them as they are.
        lpips_weights: file that holds VGG16 and LPIPS's heads, such as an official tokenizer checkpoint.
        adversarial: the adversarial stage; null for none.
        flip: mirror each picture with probability 1/2.
        quantize_after: steps without quantization; 0 starts from the quantizer's own initialisation, as published.
        fit_pictures: pictures whose latents the codes are fitted to after those steps.
        fit: how, see `VectorQuantizerBase.fit`.
        seed: of the initial weights.
    """

    data: str = "data/lowpoly/train.parquet"
    image_size: int = 64
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    l1_weight: float = 1.0
    l2_weight: float = 1.0
    laplace_weight: float = 0.0
    perceptual_weight: float = 1.0
    perceptual_network: str = "efficientnet-lite1"
    perceptual_size: int = 128
    lpips_weights: str | None = None
    adversarial: AdversarialConfig | None = None
    flip: bool = True
    quantize_after: int = 0
    fit_pictures: int = 192
    fit: Literal["kmeans", "moments"] = "kmeans"
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("l1_weight", "l2_weight", "laplace_weight", "perceptual_weight", "weight_decay", "quantize_after"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} must be at least 0, got {getattr(self, key)}.")
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}.")
        if (self.perceptual_network == LPIPS_NAME) != (self.lpips_weights is not None):
            raise ValueError(f"lpips_weights belong to perceptual_network={LPIPS_NAME!r}, got {self.perceptual_network!r} and "
                             f"{self.lpips_weights!r}.")  # fmt: skip


class TokenizerTask(Task):
    """Reconstruct pictures through codes; a discriminator, if there is one, has an optimizer of its own.

    Args:
        config: the settings.
    """

    ema = ("vqvae",)
    config: Any

    def __init__(self, config: TokenizerConfig) -> None:
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = self.network()
            self.modules = {"vqvae": model}
            if config.adversarial is not None:
                own = config.adversarial
                self.modules |= {"discriminator": build_discriminator(own.discriminator, config.image_size, own.width), "lecam": LeCam()}
        self.find_unused_parameters = config.quantize_after > 0  # the quantizer's, before it is used
        self.frozen: dict[str, nn.Module] = {}
        if config.perceptual_weight and config.lpips_weights is not None:
            state = read_checkpoint(Path(config.lpips_weights))[0]
            self.frozen["features"] = LPIPS.from_checkpoint({key.rpartition("perceptual_loss.")[2]: value for key, value in state.items()})
        elif config.perceptual_weight:
            self.frozen["features"] = FeatureNetwork(config.perceptual_network, size=config.perceptual_size)

    @abstractmethod
    def network(self) -> VQModel:
        """Build the tokenizer."""

    def dataset(self) -> Dataset[dict[str, Tensor]]:
        """Return the pictures: {"image": [3, h, w] in [-1, 1], "index"}."""
        return open_dataset(self.config.data, self.config.image_size)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return AdamW over the tokenizer's parameters, with decay on matrices and kernels only, and one for the discriminator."""
        trained = [(n, p) for n, p in self.modules["vqvae"].named_parameters() if p.requires_grad]
        decayed = [p for n, p in trained if p.ndim > 1 and "quantizer" not in n]
        rest = [p for n, p in trained if p.ndim <= 1 or "quantizer" in n]
        groups = [{"params": decayed, "weight_decay": self.config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        found: dict[str, torch.optim.Optimizer] = {"main": torch.optim.AdamW(groups, lr=self.config.lr, betas=self.config.betas)}
        if self.config.adversarial is not None:
            lr = self.config.adversarial.lr or self.config.lr
            settings: dict[str, Any] = {"lr": lr, "betas": self.config.betas, "weight_decay": self.config.weight_decay}
            found["discriminator"] = torch.optim.AdamW(self.modules["discriminator"].parameters(), **settings)
        return found

    def step(self, batch: dict[str, Tensor], ctx: StepContext) -> Iterator[Phase]:
        """Compute the losses on pictures [b, 3, h, w]: the tokenizer's, then the discriminator's."""
        config, x = self.config, batch["image"]
        if config.flip:
            mirrored = ctx.rand("flip", len(x)) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        quantize = ctx.step >= config.quantize_after
        if config.quantize_after and ctx.step == config.quantize_after and ctx.part == 0:
            self._fit_codes(ctx)
        out = self.modules["vqvae"](x, quantize=quantize)
        sample = out.sample.float()
        loss, terms = self.reconstruction(sample, x)
        adversarial = config.adversarial if config.adversarial is not None and ctx.step >= config.adversarial.start else None
        if adversarial is not None:
            g = GAN_FORMS[adversarial.form][0](self.raw("discriminator")(sample))
            weight: Tensor | float = adversarial.weight
            if adversarial.is_adaptive:
                weight = weight * adaptive_weight(loss, g, cast(VQModel, self.raw("vqvae")).last_layer)
                terms["adversarial_weight"] = weight
            terms["adversarial"] = g
            loss = loss + weight * g
        if quantize:
            loss = loss + out.loss
            terms |= out.terms
            used = out.indices.unique().numel() / cast(VQModel, self.raw("vqvae")).quantizer.codebook_size
            terms["codes_used"] = torch.tensor(used)  # of this batch; `CodebookStats` counts over a data set
        psnr = 10 * torch.log10(4 / F.mse_loss(sample.detach(), x).clamp_min(1e-10))
        yield Phase(optimizer="main", loss=loss, logs={**{name: value.detach() for name, value in terms.items()}, "psnr": psnr})
        if adversarial is not None:
            yield self.judged(sample.detach(), x, adversarial, ctx)

    def reconstruction(self, sample: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of reconstructions of pictures, both [b, 3, h, w], and its terms."""
        config = self.config
        terms = {"l1": F.l1_loss(sample, x), "l2": F.mse_loss(sample, x)}
        loss = config.l1_weight * terms["l1"] + config.l2_weight * terms["l2"]
        if config.laplace_weight:
            mean = torch.logit((0.4 * sample + 0.5).clamp(1e-4, 1 - 1e-4))  # the picture as the distribution's mean
            terms["laplace"] = logit_laplace(mean, (x + 1) / 2)
            loss = loss + config.laplace_weight * terms["laplace"]
        if config.perceptual_weight:
            network = self.frozen["features"]
            if isinstance(network, LPIPS):
                terms["perceptual"] = network(sample, x).mean()
            else:
                with torch.no_grad():
                    target = cast(FeatureNetwork, network).maps(x)
                terms["perceptual"] = perceptual_distance(cast(FeatureNetwork, network).maps(sample), target)
            loss = loss + config.perceptual_weight * terms["perceptual"]
        return loss, terms

    def judged(self, fake: Tensor, real: Tensor, config: AdversarialConfig, ctx: StepContext) -> Phase:
        """Return the discriminator's phase on reconstructions and pictures, both [b, 3, h, w]."""
        judge, form = self.modules["discriminator"], config.discriminator_form or config.form
        logits = judge(real), judge(fake)
        share = 1.0 if form == "non_saturating" else 0.5
        loss = share * GAN_FORMS[form][1](*logits)
        logs = {"discriminator": loss.detach(), "logits_real": logits[0].detach().mean(), "logits_fake": logits[1].detach().mean()}
        if config.lecam_weight:
            loss = loss + config.lecam_weight * self.raw("lecam")(*logits)
        if config.r1_gamma and ctx.step % config.r1_every == 0:
            penalty = gradient_penalty(self.raw("discriminator"), real)
            loss, logs["r1"] = loss + config.r1_gamma * config.r1_every / 2 * penalty, penalty.detach()
        return Phase("discriminator", loss, logs)

    @torch.no_grad()
    def _fit_codes(self, ctx: StepContext) -> None:
        """Start the codes at the latents of some pictures, the same in every process, in the model and its average."""
        model, average = cast(VQModel, self.raw("vqvae")), cast(VQModel, ctx.ema["vqvae"])
        pictures, generator = self.dataset(), ctx.generator("codes")
        chosen = torch.randperm(len(pictures), generator=generator)[: self.config.fit_pictures].tolist()  # type: ignore[arg-type]
        with torch.autocast(ctx.device.type, enabled=False):
            latents = [model.encode_latents(pictures[i]["image"][None].to(ctx.device)).flatten(0, 1) for i in chosen]
        model.quantizer.fit(torch.cat(latents), generator, self.config.fit)
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
        cast(VQModel, modules["vqvae"]).save_pretrained(out / "vqvae")
