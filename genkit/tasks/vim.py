"""Train VIM's generator on the codes of a tokenizer, one after the other, from class labels or from nothing.

loss = mean cross entropy of every code, given those before it

Source: Yu et al. 2022 (arXiv 2110.04627), section 3.2.
Letters: b batch, n codes of a picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.data.images import open_dataset
from genkit.generators.vim import VIMTransformer2DModel
from genkit.pipelines.tokenizers import load_tokenizer
from genkit.tasks._codes import CodeConfig, CodeTask
from genkit.tokenizers.vq_model import VQModel
from genkit.training.task import Phase, StepContext


@dataclass
class ModelConfig:
    """Sizes of the generator; see `VIMTransformer2DModel`. Grid, codes and classes follow from the data and its tokenizer."""

    hidden_size: int = 512
    num_heads: int = 8
    depth: int = 8
    mlp_ratio: float = 4.0
    dropout: float = 0.1


@dataclass
class SamplingConfig:
    """How pictures are made while training, and what the exported pipeline does by default; `guidance_scale` 1 is off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance_scale: float = 1.0
    prompts: tuple[str, ...] = ()


@dataclass
class Config(CodeConfig):
    """Settings of the task; see `CodeConfig` for the others.

    Attributes:
        model: sizes of the generator.
        sampling: of the sample grids and the exported pipeline.
        is_conditional: learn from class labels; without, all pictures are of one class.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    is_conditional: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_encoder is not None:
            raise ValueError("vim learns from class labels; leave text_encoder and tokenizer out.")


class VIMTask(CodeTask):
    """Predict every code from those before it. Arguments as `CodeTask`."""

    name = "vim"

    def network(self, sizes: dict[str, Any]) -> nn.Module:
        """Build the generator; labels are dropped where null_probability is above 0."""
        if not self.config.is_conditional:
            self.class_names, self.labels, self.prompts = [""], torch.zeros_like(self.labels), [(0,)] * len(self.prompts)
        dropout = self.config.null_probability if self.config.is_conditional else 0.0
        return VIMTransformer2DModel(**{**sizes, "num_classes": len(self.class_names)}, class_dropout=dropout, **asdict(self.config.model))

    def step(self, batch: dict[str, Tensor], ctx: StepContext) -> Iterator[Phase]:
        """Compute the loss on codes [b, n]."""
        codes = batch["indices"]
        labels = self.labels[batch["index"].cpu()].to(codes.device)
        if self.config.is_conditional and self.config.null_probability:
            labels = self.condition(batch["index"], ctx)["class_labels"]
        logits = self.modules["transformer"](codes[:, :-1], labels[:, None]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())
        accuracy = (logits.detach().argmax(-1) == codes).float().mean()
        yield Phase("main", loss, {"accuracy": accuracy})

    def pipeline(self, transformer: nn.Module) -> Any:
        """Return the pipeline around a generator of this task."""
        from genkit.pipelines.vim import VIMPipeline

        sampling = asdict(self.config.sampling)
        sampling.pop("prompts")
        names = dict(enumerate(self.class_names)) if self.config.is_conditional else None
        return VIMPipeline(cast(VIMTransformer2DModel, transformer), cast(VQModel, self.frozen["vqvae"]), id2label=names, **sampling)


def build(config: Config) -> VIMTask:
    """Build the task of a recipe: open the pictures, load the tokenizer."""
    vqvae = load_tokenizer(config.vqvae).requires_grad_(False)
    return VIMTask(config, open_dataset(config.data, config.image_size), vqvae)
