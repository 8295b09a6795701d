"""Train an ENAT generator on the codes of a tokenizer, from class labels or from text.

One step, as published: mask the same number of tokens in every sample, a share r ~ Beta(12, 3) of the grid; predict them from the visible
ones. With probability 1/2 the step is taught to reuse: some more visible tokens are masked, the averaged model encodes that earlier grid,
and its features are the state from which the trained model continues.

loss = cross entropy over masked tokens, label smoothing spread over the codes

Source: Ni et al. 2024 (arXiv 2411.06959), section 3 and appendix; the mask distribution is that of AutoNAT (arXiv 2406.05478).
Letters: b batch, n tokens of the grid, k masked tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from genkit.data.images import open_dataset
from genkit.generators.enat import ENATState, ENATTransformer2DModel
from genkit.generators.enat_index import positions_where
from genkit.pipelines.tokenizers import load_tokenizer
from genkit.schedulers.masked_token import MaskedTokenScheduler
from genkit.tasks._codes import CodeConfig, CodeTask
from genkit.tasks._enat_masking import mask_count, mask_more, masked_cross_entropy, random_mask
from genkit.tasks._prompts import load_text
from genkit.tokenizers.vq_model import VQModel
from genkit.training.task import Phase, StepContext

if TYPE_CHECKING:
    from genkit.pipelines.enat import ENATPipeline


@dataclass
class ModelConfig:
    """Sizes and blocks of the generator; see `ENATTransformer2DModel`. The rest follows from the data and the other networks."""

    hidden_size: int = 384
    num_heads: int = 6
    num_encoder_layers: int = 10
    num_decoder_layers: int = 2
    mlp_ratio: float = 4.0
    dropout: float = 0.1
    class_dropout: float = 0.1
    shared_modulation: bool = False
    stack: str | None = None


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
class Config(CodeConfig):
    """Settings of the task; see `CodeConfig` for the others.

    Attributes:
        model: sizes of the generator.
        sampling: of the sample grids and the exported pipeline.
        mask_beta: parameters of the Beta distribution of the masked share.
        reuse_probability: how often a step continues from the averaged model's features.
        label_smoothing: in [0, 1).
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    mask_beta: tuple[float, float] = (12.0, 3.0)
    reuse_probability: float = 0.5
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.reuse_probability <= 1:
            raise ValueError(f"reuse_probability must lie in [0, 1], got {self.reuse_probability}.")
        check_masking(self.mask_beta, self.label_smoothing)


def check_masking(mask_beta: tuple[float, float], label_smoothing: float) -> None:
    """Refuse parameters of masks and loss that cannot be used.

    Raises:
        ValueError: naming them.
    """
    if min(mask_beta) <= 0 or not 0 <= label_smoothing < 1:
        raise ValueError(f"mask_beta must be above 0 and label_smoothing in [0, 1), got {mask_beta} and {label_smoothing}.")


class ENATTask(CodeTask):
    """Predict masked codes. Arguments as `CodeTask`."""

    name = "enat"
    find_unused_parameters = True  # a step without reuse leaves the reuse path alone

    def network(self, sizes: dict[str, Any]) -> nn.Module:
        """Build the generator."""
        return ENATTransformer2DModel(**sizes, **asdict(self.config.model))

    def step(self, batch: dict[str, Tensor], ctx: StepContext) -> Iterator[Phase]:
        """Compute the loss on codes [b, n]."""
        config, net = self.config, cast(ENATTransformer2DModel, self.raw("transformer"))
        codes, (b, n), mask_id = batch["indices"], batch["indices"].shape, net.mask_token_id
        seed = int(torch.randint(2**63 - 1, (), generator=ctx.generator("mask_ratio")))
        count = mask_count(draw_beta(config.mask_beta, seed), n)
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

    def pipeline(self, transformer: nn.Module) -> ENATPipeline:
        """Return the pipeline around a generator of this task."""
        return masked_pipeline(self, transformer)


def masked_pipeline(task: CodeTask, transformer: nn.Module) -> ENATPipeline:
    """Return the pipeline around a masked-token generator, ENAT or NAT, with the sampling of a task's settings."""
    from genkit.pipelines.enat import ENATPipeline

    sampling, net = task.config.sampling, cast(ENATTransformer2DModel, transformer)
    return ENATPipeline(
        transformer=net,
        vqvae=cast(VQModel, task.frozen["vqvae"]),
        scheduler=MaskedTokenScheduler(
            mask_token_id=net.mask_token_id,
            guidance=sampling.guidance,
            token_temperature=sampling.token_temperature,
            mask_temperature=sampling.mask_temperature,
        ),
        text_encoder=task.frozen.get("text_encoder"),
        tokenizer=task.tokenizer,
        id2label=dict(enumerate(task.class_names)) or None,
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
    )


def draw_beta(parameters: tuple[float, float], seed: int) -> float:
    """Draw from a Beta distribution with a seed of ours (torch's Beta takes no generator)."""
    return float(np.random.default_rng(seed).beta(*parameters))


def build(config: Config) -> ENATTask:
    """Build the task of a recipe: open the pictures, load the tokenizer and the text encoder."""
    vqvae = load_tokenizer(config.vqvae).requires_grad_(False)
    return ENATTask(config, open_dataset(config.data, config.image_size), vqvae, load_text(config.text_encoder, config.tokenizer))
