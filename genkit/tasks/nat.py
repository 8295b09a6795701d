"""Train a plain masked-token transformer (NAT) on the codes of a tokenizer, from class labels or from text.

Every sample masks a share r ~ Beta(12, 3) of its own; the loss is the mean over all masked tokens of the batch.

loss = cross entropy over masked tokens, label smoothing spread over the codes

Source: Ni et al. 2024 (AutoNAT, arXiv 2406.05478).
Letters: b batch, n tokens of the grid, k masked tokens, K codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from genkit.data.images import open_dataset
from genkit.generators.nat import NATTransformer2DModel
from genkit.pipelines.tokenizers import load_tokenizer
from genkit.tasks import enat
from genkit.tasks._codes import CodeConfig, CodeTask
from genkit.tasks._enat_masking import mask_counts, masked_cross_entropy, random_mask
from genkit.tasks._prompts import load_text
from genkit.training.task import Phase, StepContext


@dataclass
class ModelConfig:
    """Sizes and blocks of the generator; see `NATTransformer2DModel`. The rest follows from the data and the other networks."""

    hidden_size: int = 512
    num_heads: int = 8
    depth: int = 12
    mlp_ratio: float = 4.0
    skip: bool = True
    dropout: float = 0.1
    stack: str | None = None


@dataclass
class Config(CodeConfig):
    """Settings of the task; see `CodeConfig` for the others.

    Attributes:
        model: sizes of the generator.
        sampling: of the sample grids and the exported pipeline.
        mask_beta: parameters of the Beta distribution of the masked share.
        label_smoothing: in [0, 1).
        widths: nested widths that training draws from, one a step, all equally often; the model's stack names them too, as in
            "(attention + mlp(nested=(0.25, 0.5, 1))) * 13". None: the full width.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: enat.SamplingConfig = field(default_factory=enat.SamplingConfig)
    mask_beta: tuple[float, float] = (12.0, 3.0)
    label_smoothing: float = 0.1
    widths: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.widths is not None and not self.widths:
            raise ValueError("widths must name at least one width, or be left out.")
        enat.check_masking(self.mask_beta, self.label_smoothing)


class NATTask(CodeTask):
    """Predict masked codes. Arguments as `CodeTask`."""

    name = "nat"

    def network(self, sizes: dict[str, Any]) -> nn.Module:
        """Build the generator."""
        net = NATTransformer2DModel(**sizes, **asdict(self.config.model))
        missing = set(self.config.widths or ()) - set(net.widths)
        if missing:
            raise ValueError(f"widths: the generator has {net.widths}, got {self.config.widths}; name them in model.stack, nested=(...).")
        return net

    def step(self, batch: dict[str, Tensor], ctx: StepContext) -> Iterator[Phase]:
        """Compute the loss on codes [b, n]."""
        config, net = self.config, cast(NATTransformer2DModel, self.raw("transformer"))
        codes, (b, n), dropout = batch["indices"], batch["indices"].shape, config.model.dropout
        ratios = torch.tensor([enat.draw_beta(config.mask_beta, u) for u in (ctx.rand("mask_ratio", b) * 2**24).long().tolist()])
        is_masked = random_mask(ctx.rand("mask", b, n), mask_counts(ratios, n).to(codes.device))
        ids = codes.masked_fill(is_masked, net.mask_token_id)
        keep = ctx.rand("dropout", b, n, config.model.hidden_size) >= dropout if dropout else None
        widths = config.widths or (None,)
        width = widths[int(ctx.rand("width", 1) * len(widths))]
        out = self.modules["transformer"](ids, self.condition(batch["index"], ctx), embedding_keep=keep, width=width)
        logits, targets = out.logits[is_masked], codes[is_masked]
        loss = masked_cross_entropy(logits[None], targets[None], config.label_smoothing)
        accuracy = (logits.detach().argmax(-1) == targets).float().mean()
        yield Phase("main", loss, {"accuracy": accuracy, "masked": is_masked.float().mean()})

    def pipeline(self, transformer: nn.Module) -> Any:
        """Return the pipeline around a generator of this task."""
        return enat.masked_pipeline(self, transformer)


def build(config: Config) -> NATTask:
    """Build the task of a recipe: open the pictures, load the tokenizer and the text encoder."""
    vqvae = load_tokenizer(config.vqvae).requires_grad_(False)
    return NATTask(config, open_dataset(config.data, config.image_size), vqvae, load_text(config.text_encoder, config.tokenizer))
