"""What tasks on the codes of pictures share: the codes, prompts or classes, sample grids, the exported pipeline.

Letters: b batch, n codes of a picture, h w rows and columns.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from genkit.blocks.integer import add_fake_quant, rounded
from genkit.blocks.lora import TARGETS, LoRAWeights, add_lora, merged
from genkit.data.images import ImageFolderDataset
from genkit.data.tokens import TokenCache
from genkit.data.views import ViewDataset
from genkit.paths import cache_dir
from genkit.pipelines.tokenizers import DataTokens
from genkit.tasks._prompts import PromptTable, captions_of, prompts_of, rows_of_views, text_table
from genkit.tokenizers.vq_model import VQModel
from genkit.training.optimizers import block_matrices, muon_with_adamw
from genkit.training.task import StepContext, Task

if TYPE_CHECKING:
    from genkit.pipelines.base import GenPipeline
    from genkit.pipelines.outputs import ImageOutput

NUM_SAMPLES = 16


@dataclass
class LoRAConfig:
    """A low-rank change that is trained in place of the weights, see `genkit.blocks.lora`."""

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = TARGETS


@dataclass
class FakeQuantConfig:
    """Rounding of weights and inputs while training, see `genkit.blocks.integer`."""

    bits: int = 8
    weights: Literal["int", "pow2"] = "int"


@dataclass
class CodeConfig:
    """Settings that tasks on codes share.

    Attributes:
        vqvae: the tokenizer, see `load_tokenizer`.
        text_encoder, tokenizer: folders or hub ids of a CLIP text model with projection and its tokenizer; null trains on classes, one per
            distinct caption (the folder of a picture).
        data: parquet file of views, folder of pictures or hub id.
        image_size: pictures are reduced to this side, in pixels.
        views: turntable views to learn from (0 is the front, then turning about the asset); all if null. Other data have no views.
        start: folder of a generator (`.../export/transformer`) whose weights the training starts from; null starts anew.
        lora: train a low-rank change of `start` and leave its weights as they are; null trains all weights.
        fake_quant: round the weights and inputs of the blocks' linear maps; the export holds the rounded weights. Null rounds nothing.
        prompts_per_picture: prompts encoded per view; a step draws one of them.
        null_probability: how often the condition is left out: the null class or the empty prompt.
        flip: also learn from mirrored pictures (class models only: prompts may name a side).
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
    lora: LoRAConfig | None = None
    fake_quant: FakeQuantConfig | None = None
    prompts_per_picture: int = 8
    null_probability: float = 0.1
    flip: bool = False
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 4e-4
    betas: tuple[float, float] = (0.99, 0.99)
    weight_decay: float = 0.03
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
        if self.lora is not None and self.start is None:
            raise ValueError("lora changes a trained generator: give its folder as start.")
        if self.lora is not None and self.fake_quant is not None:
            raise ValueError("lora and fake_quant exclude each other: one leaves the weights as they are, the other rounds them.")
        if self.flip and self.text_encoder is not None:
            raise ValueError("flip=true mirrors pictures whose prompts may name a side; leave it out for a text model.")


class CodeTask(Task):
    """One optimizer, one network on codes.

    Args:
        config: the settings.
        data: the pictures.
        vqvae: their tokenizer, frozen.
        text: text encoder, frozen, and its tokenizer; None for a class model.
    """

    ema = ("transformer",)
    config: Any

    def __init__(
        self, config: CodeConfig, data: ViewDataset | ImageFolderDataset, vqvae: VQModel, text: tuple[nn.Module, Any] | None = None
    ) -> None:
        self.config, self.data = config, data
        self.frozen = {"vqvae": vqvae} | ({"text_encoder": text[0]} if text else {})
        self.tokenizer = text[1] if text else None
        self.table: PromptTable | None = None
        captions = captions_of(data)
        self.class_names = [] if text else sorted(set(captions))
        ids = {name: i for i, name in enumerate(self.class_names)}
        self.labels = torch.tensor([] if text else [ids[caption] for caption in captions] * (2 if config.flip else 1))
        self.prompts: Sequence[Sequence[Any]] = [(caption,) for caption in captions]
        if text:
            self.prompts = prompts_of(data, config.prompts_per_picture)
        sizes: dict[str, Any] = {"num_classes": len(self.class_names)}
        if text:
            widths = text[0].config
            sizes = {"num_classes": None, "text_dim": widths.hidden_size, "pooled_dim": widths.projection_dim}  # type: ignore[union-attr]
        sizes |= {"sample_size": list(vqvae.grid_for(config.image_size, config.image_size))}
        sizes |= {"codebook_size": vqvae.quantizer.codebook_size}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = self.network(sizes)
        if config.start is not None:
            model.load_state_dict(cast(Any, type(model)).from_pretrained(config.start).state_dict())
        if config.lora is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                add_lora(model, config.lora.rank, config.lora.alpha, config.lora.targets)
        if config.fake_quant is not None:
            add_fake_quant(model, config.fake_quant.bits, config.fake_quant.weights)
        self.modules = {"transformer": model}

    @abstractmethod
    def network(self, sizes: dict[str, Any]) -> nn.Module:
        """Build the generator for a grid, a codebook, and classes or text."""

    @abstractmethod
    def pipeline(self, transformer: nn.Module) -> GenPipeline:
        """Return the pipeline around a generator of this task."""

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
        tokens = DataTokens(cast(VQModel, self.frozen["vqvae"]), self.data, self.config.flip)
        return tokens.write(tokens.folder(folder))

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return one optimizer over all parameters."""
        config, net = self.config, self.modules["transformer"]
        settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
        if config.optimizer == "muon":
            return {"main": muon_with_adamw(*block_matrices(net), **settings)}
        return {"main": torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], **settings)}

    def condition(self, index: Tensor, ctx: StepContext) -> dict[str, Tensor]:
        """Return the condition of pictures index [b], as `prepare_condition` takes it; now and then the null one."""
        is_null = ctx.rand("null", len(index)) < self.config.null_probability
        if self.class_names:
            labels = self.labels[index.cpu()].to(ctx.device)
            return {"class_labels": labels.masked_fill(is_null, len(self.class_names))}
        if self.table is None:
            raise RuntimeError(f"{type(self).__name__}: the prompts are not encoded yet; call dataset() first.")
        picked = self.table.pick(index, ctx.rand("prompt", len(index)), is_null)
        return {name: value.to(ctx.device) for name, value in picked.items()}

    def sample(self, batch: dict[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Return pictures [m, 3, h, w] of the prompts in the settings, else of the batch's own, with fixed seeds."""
        own = [self.prompts[i % len(self.data)][0] for i in batch["index"].tolist()]
        prompts = (list(self.config.sampling.prompts) or own)[:NUM_SAMPLES]
        pipe = cast(Any, self.pipeline(ctx.ema["transformer"]))
        pipe.set_progress_bar_config(disable=True)
        images = cast("ImageOutput", pipe(prompts, generator=list(range(len(prompts))), output_type="pt")).images
        return {"samples": cast(Tensor, images)}

    def generate(self, indices: Sequence[int], ctx: StepContext) -> Tensor:
        """Return pictures [len(indices), 3, h, w] of the averaged weights: the distinct plain prompts in turn, seed i each."""
        pipe = cast(Any, self.pipeline(ctx.ema["transformer"]))
        pipe.set_progress_bar_config(disable=True)
        plain = list(dict.fromkeys(row[0] for row in self.prompts))
        prompts = [plain[i % len(plain)] for i in indices]
        images = pipe(prompts, generator=list(indices), output_type="pt", samples_at_once=len(prompts))
        return cast(Tensor, cast("ImageOutput", images).images)

    def export(self, modules: dict[str, nn.Module], out: Path) -> None:
        """Write the pipeline, its parts in folders of their own (`out/transformer`, `out/vqvae`, ...), and a LoRA alone too, `out/lora`."""
        network, change = modules["transformer"], None
        if self.config.fake_quant is not None:
            network = rounded(network)
        if self.config.lora is not None:
            change, network = LoRAWeights.of(network, str(self.config.start)), merged(network)
        pipe = self.pipeline(network)
        if self.config.export_dtype == "float16":
            halves = {name: copy.deepcopy(part).half() for name, part in pipe.components.items() if isinstance(part, nn.Module)}
            pipe.register_modules(**halves)
        pipe.save_pretrained(out)
        if change is not None:
            change.save(out / "lora")
