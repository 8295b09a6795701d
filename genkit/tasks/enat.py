"""Train an ENAT generator on the codes of a tokenizer, from class labels or from text.

One step, as published: mask the same number of tokens in every sample, a share r ~ Beta(12, 3) of the grid; predict them from the visible
ones. With probability 1/2 the step is taught to reuse: some more visible tokens are masked, the averaged model encodes that earlier grid,
and its features are the state from which the trained model continues.

loss = cross entropy over masked tokens, label smoothing spread over the codes

Source: Ni et al. 2024 (arXiv 2411.06959), section 3 and appendix; the mask distribution is that of AutoNAT (arXiv 2406.05478).
Letters: b batch, n tokens of the grid, k masked tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import Subset

from genkit.data.images import ImageFolderDataset, open_dataset
from genkit.data.tokens import TokenCache, TokenMeta, build_cache
from genkit.data.views import ViewDataset
from genkit.generators.enat import ENATState, ENATTransformer2DModel
from genkit.generators.enat_index import positions_where
from genkit.paths import cache_dir
from genkit.pipelines.tokenizers import load_tokenizer
from genkit.schedulers.masked_token import MaskedTokenScheduler
from genkit.tasks._enat_masking import mask_count, mask_more, masked_cross_entropy, random_mask
from genkit.tasks._prompts import PromptTable, captions_of, load_text, prompts_of, rows_of_views, text_table, weights_hash
from genkit.tokenizers.vq_model import VQModel
from genkit.training.optimizers import block_matrices, muon_with_adamw
from genkit.training.task import Phase, StepContext, Task

if TYPE_CHECKING:
    from genkit.pipelines.enat import ENATPipeline
    from genkit.pipelines.outputs import ImageOutput

NUM_SAMPLES = 16


@dataclass
class ModelConfig:
    """Sizes of the generator; see `ENATTransformer2DModel`. Grid, codes, classes and text widths follow from the data and its networks."""

    hidden_size: int = 384
    num_heads: int = 6
    num_encoder_layers: int = 10
    num_decoder_layers: int = 2
    mlp_ratio: float = 4.0
    dropout: float = 0.1
    class_dropout: float = 0.1
    shared_modulation: bool = False


@dataclass
class SamplingConfig:
    """How pictures are made while training, and what the exported pipeline does by default.

    `guidance_scale` 1 is off; `guidance` says how it goes over the steps, see `MaskedTokenScheduler`.
    """

    num_inference_steps: int = 8
    guidance_scale: float = 3.5
    guidance: Literal["linear", "constant"] = "linear"
    token_temperature: float = 6.0
    mask_temperature: float = 1.5
    prompts: tuple[str, ...] = ()


@dataclass
class Config:
    """Settings of the task.

    Attributes:
        vqvae: the tokenizer, see `load_tokenizer`.
        text_encoder, tokenizer: folders or hub ids of a CLIP text model with projection and its tokenizer; null trains on classes, one per
            distinct caption (the folder of a picture).
        data: parquet file of views, folder of pictures or hub id.
        image_size: pictures are reduced to this side, in pixels.
        views: turntable views to learn from (0 is the front, then turning about the asset); all if null. Other data have no views.
        start: folder of a generator (`.../export/transformer`) whose weights the training starts from; null starts anew.
        prompts_per_picture: prompts encoded per view; a step draws one of them.
        null_probability: how often the condition is left out: the null class or the empty prompt.
        flip: also learn from mirrored pictures (class models only: prompts may name a side).
        model: sizes of the generator.
        sampling: of the sample grids and the exported pipeline.
        mask_beta: parameters of the Beta distribution of the masked share.
        reuse_probability: how often a step continues from the averaged model's features.
        label_smoothing: in [0, 1).
        optimizer: "adamw" as published, or "muon": Muon for the matrices of the blocks, AdamW for the rest.
        lr, betas, weight_decay: of the optimizer, on every parameter.
        export_dtype: floating type of the exported weights.
        seed: of the initial weights.
        cache: folder of the tokens and encoded prompts; the user's cache folder if null.
    """

    vqvae: str
    text_encoder: str | None = None
    tokenizer: str | None = None
    data: str = "data/lowpoly/train.parquet"
    image_size: int = 64
    views: tuple[int, ...] | None = None
    start: str | None = None
    prompts_per_picture: int = 8
    null_probability: float = 0.1
    flip: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    mask_beta: tuple[float, float] = (12.0, 3.0)
    reuse_probability: float = 0.5
    label_smoothing: float = 0.1
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 4e-4
    betas: tuple[float, float] = (0.99, 0.99)
    weight_decay: float = 0.03
    export_dtype: Literal["float32", "float16"] = "float32"
    seed: int = 0
    cache: str | None = None

    def __post_init__(self) -> None:
        for key in ("null_probability", "reuse_probability"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} must lie in [0, 1], got {getattr(self, key)}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}.")
        if self.lr <= 0 or min(self.mask_beta) <= 0 or self.prompts_per_picture < 1:
            given = f"lr={self.lr}, mask_beta={self.mask_beta}, prompts_per_picture={self.prompts_per_picture}"
            raise ValueError(f"lr, mask_beta and prompts_per_picture must be above 0, got {given}.")
        if (self.text_encoder is None) != (self.tokenizer is None):
            raise ValueError(f"text needs text_encoder and tokenizer, got {self.text_encoder!r} and {self.tokenizer!r}; give both or none.")
        if self.flip and self.text_encoder is not None:
            raise ValueError("flip=true mirrors pictures whose prompts may name a side; leave it out for a text model.")


class ENATTask(Task):
    """One optimizer, one network: predict masked codes.

    Args:
        config: the settings.
        data: the pictures.
        vqvae: their tokenizer, frozen.
        text: text encoder, frozen, and its tokenizer; None for a class model.
    """

    name = "enat"
    ema = ("transformer",)
    find_unused_parameters = True  # a step without reuse leaves the reuse path alone

    def __init__(
        self, config: Config, data: ViewDataset | ImageFolderDataset, vqvae: VQModel, text: tuple[nn.Module, Any] | None = None
    ) -> None:
        self.config, self.data = config, data
        self.frozen = {"vqvae": vqvae} | ({"text_encoder": text[0]} if text else {})
        self.tokenizer = text[1] if text else None
        self.table: PromptTable | None = None
        captions = captions_of(data)
        self.class_names = [] if text else sorted(set(captions))
        ids = {name: i for i, name in enumerate(self.class_names)}
        self.num_rows = len(captions) * (2 if config.flip else 1)
        self.labels = torch.tensor([] if text else [ids[caption] for caption in captions] * (2 if config.flip else 1))
        self.prompts = prompts_of(data, config.prompts_per_picture) if text else [(caption,) for caption in captions]
        sizes: dict[str, Any] = {"num_classes": len(self.class_names)}
        if text:
            widths = text[0].config
            sizes = {"num_classes": None, "text_dim": widths.hidden_size, "pooled_dim": widths.projection_dim}  # type: ignore[union-attr]
        grid = vqvae.grid_for(config.image_size, config.image_size)
        codes = vqvae.quantizer.codebook_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = ENATTransformer2DModel(sample_size=list(grid), codebook_size=codes, **asdict(config.model), **sizes)
        if config.start is not None:
            model.load_state_dict(ENATTransformer2DModel.from_pretrained(config.start).state_dict())
        self.modules = {"transformer": model}

    def dataset(self) -> TokenCache | Subset[dict[str, Tensor]]:
        """Return the codes of the pictures, {"indices": [n], "index"}; they and the encoded prompts are written at the first call."""
        cache = self._token_cache()
        if self.config.views is None:
            return cache
        chosen = set(rows_of_views(self.data, self.config.views, self.config.data))
        return Subset(cache, [row for row in range(len(cache)) if row % len(self.data) in chosen])

    def _token_cache(self) -> TokenCache:
        """Return the codes of all pictures."""
        folder = Path(self.config.cache).expanduser() if self.config.cache else cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
        if self.tokenizer is not None:
            self.table = text_table(folder, self.prompts, self.tokenizer, self.frozen["text_encoder"])
        vqvae = cast(VQModel, self.frozen["vqvae"])
        meta = TokenMeta(
            rows=self.num_rows,
            grid=vqvae.grid_for(self.config.image_size, self.config.image_size),
            codebook_size=vqvae.quantizer.codebook_size,
            data_hash=self.data.data_hash,
            tokenizer_hash=weights_hash(vqvae),
        )
        path = folder / f"tokens-{meta.data_hash}-{meta.tokenizer_hash}{'-flip' if self.config.flip else ''}"
        with FileLock(f"{path}.lock"):  # one process writes, the others wait
            return build_cache(path, meta, self._encode)

    @torch.no_grad()
    def _encode(self, rows: range) -> Tensor:
        """Return the codes [b, n] of pictures; rows behind the last picture are the mirrored ones."""
        vqvae = cast(VQModel, self.frozen["vqvae"])
        images = torch.stack(
            [self.data[row % len(self.data)]["image"].flip(-1) if row >= len(self.data) else self.data[row]["image"] for row in rows]
        )
        return vqvae.encode(images.to(next(vqvae.parameters()).device)).indices.flatten(1)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return one optimizer over all parameters."""
        config, net = self.config, self.modules["transformer"]
        settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
        if config.optimizer == "muon":
            return {"main": muon_with_adamw(*block_matrices(net), **settings)}
        return {"main": torch.optim.AdamW(net.parameters(), **settings)}

    def step(self, batch: dict[str, Tensor], ctx: StepContext) -> Iterator[Phase]:
        """Compute the loss on codes [b, n]."""
        config, net = self.config, cast(ENATTransformer2DModel, self.raw("transformer"))
        codes, (b, n), mask_id = batch["indices"], batch["indices"].shape, net.mask_token_id
        count = mask_count(draw_beta(config.mask_beta, ctx.generator("mask_ratio")), n)
        is_masked = random_mask(ctx.rand("mask", b, n), count)
        ids = codes.masked_fill(is_masked, mask_id)
        masked_index = positions_where(is_masked, count)

        condition = self.condition(batch["index"], ctx)
        state = self.earlier_state(ids, condition, count, ctx)

        if net.config.num_classes is not None:  # this second drop is the trained network's alone
            condition["class_labels"] = net.drop_labels(condition["class_labels"], ctx.rand("class_dropout", b))
        dropout = net.config.dropout
        keep = ctx.rand("dropout", b, n, net.config.hidden_size) >= dropout if dropout else None
        out = self.modules["transformer"](ids, condition, state, masked_index=masked_index, logits_at="masked", embedding_keep=keep)
        targets = codes.gather(1, masked_index)
        loss = masked_cross_entropy(out.logits, targets, config.label_smoothing)
        accuracy = (out.logits.detach().argmax(-1) == targets).float().mean()
        yield Phase("main", loss, {"accuracy": accuracy, "masked": count / n, "reuse": float(state is not None)})

    def earlier_state(self, ids: Tensor, condition: dict[str, Tensor], count: int, ctx: StepContext) -> ENATState | None:
        """Return, as often as configured, the averaged model's features of a grid with more masked tokens, to continue from.

        Args:
            ids: [b, n] grid.
            condition: of the samples.
            count: masked tokens of the grid.
            ctx: of the step.
        """
        if ctx.draw("reuse") >= self.config.reuse_probability:
            return None
        net, (b, n) = cast(ENATTransformer2DModel, self.raw("transformer")), ids.shape
        num_new = round((n - count) * ctx.draw("num_new"))
        previous = mask_more(ids, ctx.rand("new", b, n), num_new, net.mask_token_id)
        with torch.no_grad():
            return cast(ENATState, ctx.ema["transformer"](previous, condition, logits_at="none").state)

    def condition(self, index: Tensor, ctx: StepContext) -> dict[str, Tensor]:
        """Return the condition of pictures index [b], as `prepare_condition` takes it; now and then the null one."""
        is_null = ctx.rand("null", len(index)) < self.config.null_probability
        if self.class_names:
            labels = self.labels[index.cpu()].to(ctx.device)
            return {"class_labels": labels.masked_fill(is_null, len(self.class_names))}
        if self.table is None:
            raise RuntimeError("ENATTask: the prompts are not encoded yet; call dataset() first.")
        picked = self.table.pick(index, ctx.rand("prompt", len(index)), is_null)
        return {name: value.to(ctx.device) for name, value in picked.items()}

    def pipeline(self, transformer: nn.Module) -> ENATPipeline:
        """Return the pipeline around a generator of this task."""
        from genkit.pipelines.enat import ENATPipeline

        sampling = self.config.sampling
        net = cast(ENATTransformer2DModel, transformer)
        return ENATPipeline(
            transformer=net,
            vqvae=cast(VQModel, self.frozen["vqvae"]),
            scheduler=MaskedTokenScheduler(
                mask_token_id=net.mask_token_id,
                guidance=sampling.guidance,
                token_temperature=sampling.token_temperature,
                mask_temperature=sampling.mask_temperature,
            ),
            text_encoder=self.frozen.get("text_encoder"),
            tokenizer=self.tokenizer,
            id2label=dict(enumerate(self.class_names)) or None,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
        )

    def sample(self, batch: dict[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Return pictures [m, 3, h, w] of the prompts in the settings, else of the batch's own, with fixed seeds."""
        own = [self.prompts[i % len(self.data)][0] for i in batch["index"].tolist()]
        prompts = (list(self.config.sampling.prompts) or own)[:NUM_SAMPLES]
        pipe = self.pipeline(ctx.ema["transformer"])
        pipe.set_progress_bar_config(disable=True)
        images = cast("ImageOutput", pipe(prompts, generator=list(range(len(prompts))), output_type="pt")).images
        return {"samples": cast(Tensor, images)}

    def generate(self, indices: Sequence[int], ctx: StepContext) -> Tensor:
        """Return pictures [len(indices), 3, h, w] of the averaged weights: the distinct plain prompts in turn, seed i each."""
        pipe = self.pipeline(ctx.ema["transformer"])
        pipe.set_progress_bar_config(disable=True)
        plain = list(dict.fromkeys(row[0] for row in self.prompts))
        prompts = [plain[i % len(plain)] for i in indices]
        images = pipe(prompts, generator=list(indices), output_type="pt", samples_at_once=len(prompts))
        return cast(Tensor, cast("ImageOutput", images).images)

    def export(self, modules: dict[str, nn.Module], out: Path) -> None:
        """Write the pipeline: `out/transformer`, `out/scheduler`, `out/vqvae`, and for text `out/text_encoder` and `out/tokenizer`."""
        pipe = self.pipeline(modules["transformer"])
        if self.config.export_dtype == "float16":
            halves = {name: copy.deepcopy(part).half() for name, part in pipe.components.items() if isinstance(part, nn.Module)}
            pipe.register_modules(**halves)
        pipe.save_pretrained(out)


def draw_beta(parameters: tuple[float, float], generator: torch.Generator) -> float:
    """Draw from a Beta distribution with a generator of ours (torch's Beta takes none)."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return float(np.random.default_rng(seed).beta(*parameters))


def build(config: Config) -> ENATTask:
    """Build the task of a recipe: open the pictures, load the tokenizer and the text encoder."""
    vqvae = load_tokenizer(config.vqvae).requires_grad_(False)
    return ENATTask(config, open_dataset(config.data, config.image_size), vqvae, load_text(config.text_encoder, config.tokenizer))
