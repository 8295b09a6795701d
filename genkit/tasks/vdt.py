"""Train a video diffusion transformer on clips: one network for generation, prediction, interpolation, animation and completion.

Every clip of a batch gets a mask of its own; what is given enters clean, the rest noisy:

    loss = mean (mask (eps - eps_hat))^2 + bound in bits for the variances, with eps_hat constant there

Source: Lu et al. 2023 (VDT, arXiv 2305.13311), section 3; Nichol and Dhariwal 2021 (arXiv 2102.09672) for the bound.
Letters: b batch, f frames, c channels, h w rows and columns of a latent, l width of the text.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.data import Dataset

from genkit.conditioners.text import condition_vector, encode_text
from genkit.data.clips import ClipDataset
from genkit.data.video_masks import MaskMixture
from genkit.generators.vdt import VDTTransformer3DModel
from genkit.pipelines.frame_latents import FrameLatents, latent_statistics
from genkit.pipelines.tokenizers import is_pipeline, load_tokenizer
from genkit.schedulers.gaussian import GaussianDiffusion
from genkit.tasks._clip_metrics import ClipMetrics, batches, check_clip_metrics, held_out_clips
from genkit.tasks._clips import check_sources, clip_prompts, to_strips, training_clips
from genkit.tasks._conditions import ConditionTable
from genkit.tasks._prompts import load_text
from genkit.tasks._vdt_loss import masked_loss
from genkit.tokenizers.vq_model import VQModel
from genkit.training.evaluation import EvaluationConfig
from genkit.training.optimizers import block_matrices, muon_with_adamw
from genkit.training.task import Phase, StepContext, Task

if TYPE_CHECKING:
    from genkit.pipelines.vdt import VDTPipeline

NUM_SAMPLES = 4
ENCODED_AT_ONCE, STATISTICS_CLIPS = 32, 64


@dataclass
class DiffusionConfig:
    """The chain, see `GaussianDiffusion`.

    With `predict_clean` the network returns the clip instead of the noise, which suits pixels in large patches (arXiv 2511.13720).
    """

    schedule: str = "linear"
    predict_clean: bool = False


@dataclass
class SamplingConfig:
    """How clips are made while training, and what the exported pipeline does by default; `guidance_scale` 1 is off."""

    scheduler: str = "dpm-solver++"
    num_inference_steps: int = 20
    guidance_scale: float = 1.0
    prompts: tuple[str, ...] = ()


@dataclass
class Config:
    """Settings of the task.

    Attributes:
        data: turntables, encoded clips, shards, folders of clips or an array, see `open_clips`; null for moving sprites.
        sprites: digits or other small pictures that move as in Moving MNIST, see `read_sprites`; null for other data.
        sequences: number of sequences of moving sprites.
        image_size: side of the frames in pixels.
        num_frames: of a clip.
        stride: step between frames; turntables have none.
        any_start: turntables may begin at any view.
        text_encoder, tokenizer: folders or hub ids of a CLIP text model with projection and its tokenizer; null for no text.
        prompts_per_clip: prompts encoded per clip; a step draws one of them.
        null_probability: how often the text is left out.
        vae: folder or hub id of an `AutoencoderKL`, or packaged name or folder of a pipeline whose `vqvae` is an image tokenizer; null
            works on pixels.
        model: of `VDTTransformer3DModel`; sizes and widths that follow from the data and the text encoder are filled in.
        masks: mode -> weight, see `MaskMixture`; the published mixture is {"random": 1}.
        official_masks: with the published masks that hide nothing.
        per_masked: divide the error by the masked share, so that all masks weigh the same; published: not.
        diffusion: the chain.
        sampling: of the sample strips and the exported pipeline.
        gradient_checkpointing: compute activations of blocks twice, to save memory.
        start: folder of a transformer whose weights the training starts from; null starts anew.
        optimizer: "adamw" as published, or "muon": Muon for the matrices of the blocks, AdamW for the rest.
        lr, betas, weight_decay: of the optimizer.
        export_dtype: floating type of the exported weights.
        seed: of the initial weights and of the sprites' ways.
    """

    data: str | None = None
    sprites: str | None = None
    sequences: int = 1_000_000
    image_size: int = 64
    num_frames: int = 16
    stride: int = 1
    any_start: bool = True
    text_encoder: str | None = None
    tokenizer: str | None = None
    prompts_per_clip: int = 16
    null_probability: float = 0.1
    vae: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    masks: dict[str, float] = field(default_factory=lambda: {"random": 1.0})
    official_masks: bool = False
    per_masked: bool = False
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    gradient_checkpointing: bool = False
    start: str | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    export_dtype: Literal["float32", "float16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        check_sources(self.data, self.sprites)
        if not 0 <= self.null_probability <= 1:
            raise ValueError(f"null_probability must lie in [0, 1], got {self.null_probability}.")
        if self.lr <= 0 or self.prompts_per_clip < 1:
            raise ValueError(f"lr and prompts_per_clip must be above 0, got {self.lr} and {self.prompts_per_clip}.")
        if (self.text_encoder is None) != (self.tokenizer is None):
            raise ValueError(f"text needs text_encoder and tokenizer, got {self.text_encoder!r} and {self.tokenizer!r}; give both or none.")
        MaskMixture(self.masks, self.official_masks)


class VDTTask(Task):
    """One optimizer, one network: restore what the masks hide.

    Args:
        config: the settings.
        data: the clips.
        text: text encoder, frozen, and its tokenizer; None for no text.
        vae: frozen; None for pixels.

    Raises:
        ValueError: if the data have no texts for a text model.
    """

    name = "vdt"
    ema = ("transformer",)

    def __init__(self, config: Config, data: ClipDataset, text: tuple[nn.Module, Any] | None = None, vae: nn.Module | None = None) -> None:
        self.config, self.data, self.tokenizer = config, data, text[1] if text else None
        self.frozen = {name: part for name, part in (("text_encoder", text[0] if text else None), ("vae", vae)) if part is not None}
        self.table: ConditionTable | None = None
        self.prompts = clip_prompts(data, config.prompts_per_clip) if text else []
        self.masks = MaskMixture(config.masks, config.official_masks)
        mean, std = statistics_of(vae, data) if isinstance(vae, VQModel) else (None, None)
        self.frame_latents = FrameLatents(cast(Any, vae), mean, std, ENCODED_AT_ONCE)
        side = config.image_size // self.frame_latents.factor
        sizes = {"sample_size": side, "in_channels": self.frame_latents.channels, "num_frames": config.num_frames}
        width = cast(Any, text[0]).config.projection_dim if text else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = VDTTransformer3DModel(**{**sizes, "text_dim": width, **config.model})
        if config.start is not None:
            model.load_state_dict(VDTTransformer3DModel.from_pretrained(config.start).state_dict())
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        learned = "learned_range" if model.config["learn_sigma"] else "fixed_large"
        self.diffusion = GaussianDiffusion(config.diffusion.schedule, predict_clean=config.diffusion.predict_clean, variance=learned)
        self.modules = {"transformer": model}

    def dataset(self) -> Dataset[dict[str, Tensor]]:
        """Return the clips; the conditions of all distinct prompts are computed at the first call."""
        if self.table is None:
            self.table = ConditionTable(self.prompts, self.encode)
        return self.data

    def encode(self, prompts: Sequence[Any]) -> dict[str, Tensor]:
        """Return the conditions of texts, {"pooled": [u, l]}."""
        with torch.no_grad():
            return {"pooled": condition_vector(encode_text(list(prompts), self.tokenizer, self.frozen["text_encoder"]).pooled)}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return one optimizer over all parameters."""
        c, model = self.config, self.modules["transformer"]
        if c.optimizer == "muon":
            blocks, rest = block_matrices(model)
            return {"main": muon_with_adamw(blocks, rest, lr=c.lr, betas=c.betas, weight_decay=c.weight_decay)}
        return {"main": torch.optim.AdamW(model.parameters(), lr=c.lr, betas=c.betas, weight_decay=c.weight_decay)}

    def clips(self, batch: dict[str, Tensor], ctx: StepContext) -> Tensor:
        """Return the clips of a batch [b, f, 3, h, w]; turntables begin at a view of their own, grey becomes three channels."""
        frames = batch["frames"].expand(-1, -1, 3, -1, -1)
        if not (self.data.is_closed and self.config.any_start):
            return frames
        b, f = frames.shape[:2]
        start = (ctx.rand("start", b, 1) * f).long()
        return frames[torch.arange(b, device=frames.device)[:, None], (start + torch.arange(f, device=frames.device)) % f]

    @torch.no_grad()
    def latents(self, frames: Tensor, ctx: StepContext) -> Tensor:
        """Return latents [b, f, c, h, w], of a VAE drawn from its posterior; pixels as they are."""
        coder = self.frame_latents
        if isinstance(coder.coder, VQModel) or coder.coder is None:
            return coder.encode(frames)
        b, f, _, h, w = frames.shape
        return coder.encode(frames, ctx.randn("posterior", b, f, coder.channels, h // coder.factor, w // coder.factor))

    def step(self, batch: dict[str, Tensor], ctx: StepContext) -> Iterator[Phase]:
        """Compute the loss on clips [b, f, 3, H, W]."""
        if self.table is None:
            raise RuntimeError("VDTTask: the conditions are not computed yet; call dataset() first.")
        clean = self.latents(self.clips(batch, ctx), ctx)
        b, f, _, h, w = clean.shape
        cond = self.table.pick(batch["index"], ctx)
        if "pooled" in cond:
            cond["pooled"] = cond["pooled"] * (ctx.rand("null", b, 1) >= self.config.null_probability)
        mask = torch.stack([self.masks.draw(f, h, w, u) for u in ctx.rand("mask", b).tolist()]).to(clean.device)
        t = (ctx.rand("timestep", b) * len(self.diffusion)).long()
        losses = masked_loss(
            self.diffusion,
            lambda x, timestep: self.modules["transformer"](x, timestep, **cond).sample,
            clean,
            ctx.randn("noise", b, *clean.shape[1:]),
            t,
            mask,
            per_masked=self.config.per_masked,
        )
        yield Phase("main", losses["loss"].mean(), {name: rows.detach().mean() for name, rows in losses.items() if name != "loss"})

    def pipeline(self, transformer: nn.Module) -> VDTPipeline:
        """Return the pipeline around a transformer of this task."""
        from genkit.pipelines.vdt import VDTPipeline
        from genkit.schedulers.named import noise_scheduler

        model, sampling, diffusion = cast(VDTTransformer3DModel, transformer), self.config.sampling, self.config.diffusion
        kind = "sample" if diffusion.predict_clean else "epsilon"
        learned = model.config["learn_sigma"]
        return VDTPipeline(
            model,
            noise_scheduler(sampling.scheduler, schedule=diffusion.schedule, learn_sigma=learned, prediction_type=kind),
            vae=cast(Any, self.frozen.get("vae")),
            text_encoder=cast(Any, self.frozen.get("text_encoder")),
            tokenizer=self.tokenizer,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            latents_mean=self.frame_latents.mean,
            latents_std=self.frame_latents.std,
        )

    def sample(self, batch: dict[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Return strips of frames [m, 3, h, f w]: clips from their first frame, and clips from text or nothing, with fixed seeds."""
        pipe, first = cast(Any, self.pipeline(ctx.ema["transformer"])), batch["frames"][:NUM_SAMPLES, :1].expand(-1, -1, 3, -1, -1)
        pipe.set_progress_bar_config(disable=True)
        m = len(first)
        own = [self.prompts[i][0] for i in batch["index"].tolist()[:m]] if self.prompts else []
        prompts = (list(self.config.sampling.prompts) or own)[:m] or None
        options: dict[str, Any] = {"generator": list(range(m)), "output_type": "pt", "samples_at_once": m}
        animated = pipe(frames=first, mask="animate", num_images_per_prompt=m, **options).frames
        made = pipe(prompts, num_images_per_prompt=1 if prompts else m, **options).frames
        return {"animated": to_strips(animated), "generated": to_strips(made)}

    def check_evaluation(self, config: EvaluationConfig) -> None:
        """Refuse metrics that clips do not have."""
        check_clip_metrics(config)

    def evaluate(self, config: EvaluationConfig, ctx: StepContext) -> dict[str, float]:
        """Return metrics of clips that were not trained on, `psnr/<mode>` for each mask mode that gives something, and distances of clips
        made from their captions, or from nothing, to them; clip i has seed i and masks of its own.
        """
        c, pipe = self.config, cast(Any, self.pipeline(ctx.ema["transformer"]))
        pipe.set_progress_bar_config(disable=True)
        clips = held_out_clips(config, c.sprites is not None, c.image_size, c.num_frames, c.stride, c.seed)
        metrics, modes = ClipMetrics(config, c.num_frames, ctx.device), [m for m in c.masks if m not in ("unconditional", "random")]
        for indices, truth in batches(clips, config, ctx.device):
            b, frames = len(indices), truth.expand(-1, -1, 3, -1, -1)
            options: dict[str, Any] = {"generator": indices, "output_type": "pt", "samples_at_once": b}
            options["num_images_per_prompt"] = 1 if self.prompts else b
            prompts = [clips.captions[i] for i in indices] if self.prompts else None
            for mode in modes if metrics.names else []:
                mask = torch.stack([self._pixel_mask(mode, i) for i in indices]).to(truth.device)
                made = pipe(prompts, frames=frames, mask=mask, **options).frames
                metrics.compare(made.mean(2, keepdim=True) if truth.shape[2] == 1 else made, truth, mask, f"/{mode}")
            if metrics.features:
                metrics.add("real", frames)
                metrics.add("made", pipe(prompts, **options).frames)
        return metrics.compute()

    def _pixel_mask(self, mode: str, index: int) -> Tensor:
        """Return a mask [f, H, W] of one mode in pixels that hides something, the same for the same index."""
        factor, side, source = self.frame_latents.factor, self.config.image_size, random.Random(index)
        mixture = MaskMixture({mode: 1.0})
        while not bool((mask := mixture.draw(self.config.num_frames, side // factor, side // factor, source.random())).any()):
            pass
        return mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2)

    def export(self, modules: dict[str, nn.Module], out: Path) -> None:
        """Write the pipeline: `out/transformer` with the linear pairs merged, `out/scheduler`, and text encoder and VAE where used."""
        merged = copy.deepcopy(cast(VDTTransformer3DModel, modules["transformer"]))
        merged.merge_temporal()
        pipe = self.pipeline(merged)
        if self.config.export_dtype == "float16":
            pipe.register_modules(
                **{name: copy.deepcopy(part).half() for name, part in pipe.components.items() if isinstance(part, nn.Module)}
            )
        pipe.save_pretrained(out)


def statistics_of(tokenizer: VQModel, data: ClipDataset) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation by channel of a tokenizer's latents, over clips spread over the data."""
    chosen = torch.linspace(0, len(data) - 1, min(STATISTICS_CLIPS, len(data))).long().unique().tolist()
    frames = torch.cat([data[i]["frames"].expand(-1, 3, -1, -1) for i in chosen])
    return latent_statistics(tokenizer, frames)


def open_coder(name: str) -> nn.Module:
    """Open an image tokenizer of a pipeline, or a VAE of diffusers."""
    return load_tokenizer(name) if is_pipeline(name) else AutoencoderKL.from_pretrained(name)


def build(config: Config) -> VDTTask:
    """Build the task of a recipe: open the clips, load text encoder and VAE."""
    c, vae = config, None
    if c.vae is not None:
        vae = open_coder(c.vae).float().eval().requires_grad_(False)
    data = training_clips(c.data, c.sprites, c.image_size, c.num_frames, c.stride, c.sequences, c.seed)
    return VDTTask(c, data, load_text(c.text_encoder, c.tokenizer), vae)
