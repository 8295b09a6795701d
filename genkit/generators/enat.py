"""ENAT: a masked-token image transformer that encodes visible tokens only and only once.

Rethinking Spatial-temporal Interactions in Token-based Image Synthesis (NeurIPS 2024, arXiv 2411.06959). Computes the numbers of the
official ENAT-L checkpoints for 256 and 512 pixels (`genkit.convert`).

- a deep encoder sees visible tokens only; a shallow decoder predicts masked tokens that attend to the visible ones
- tokens revealed in earlier steps are not encoded again: their last features, through a small residual MLP, serve as keys and values
- the state that links the steps is an argument and a result, never a module attribute
- everything that depends on the condition alone is computed once per image (`prepare_condition`), not in every block and step
- with the token indices given, an evaluation has static shapes and never waits for the device
- text instead of classes (ours): text tokens are permanently visible tokens in front of the grid, the pooled text is the condition

Legend: b batch, n tokens of the grid, m text tokens, d width, K codes, k masked, v newly revealed, p reused tokens, L blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from genkit.blocks.attention import AttentionConfig
from genkit.blocks.branch import Block, Branch
from genkit.blocks.caps import Caps, MixerConfig
from genkit.blocks.fast_linear import with_fast_linear
from genkit.blocks.mlp import MLPConfig
from genkit.blocks.modulation import Modulation
from genkit.blocks.norms import build_norm
from genkit.blocks.stack import Stack, parse
from genkit.blocks.stack import build as build_stack
from genkit.checks import check_shape, choose
from genkit.generators.enat_context import project, stack_weights
from genkit.generators.enat_index import TokenIndex, split_grid, take
from genkit.generators.enat_parts import LOGITS_AT, CodeHead, TokenEmbedding, grid_of
from genkit.generators.enat_state import ENATCondition, ENATOutput, ENATState

__all__ = ["SIZES", "ENATCondition", "ENATOutput", "ENATState", "ENATTransformer2DModel"]

CHANNEL_MIXERS = ("mlp", "bn_mlp", "memory")
SIZES: dict[str, dict[str, Any]] = {
    "enat_l_256": {"sample_size": 16, "hidden_size": 1024, "num_heads": 16, "num_encoder_layers": 22, "num_decoder_layers": 2},
    "enat_l_512": {"sample_size": 32, "hidden_size": 1024, "num_heads": 16, "num_encoder_layers": 22, "num_decoder_layers": 2},
    "enat_b_256": {"sample_size": 16, "hidden_size": 768, "num_heads": 12, "num_encoder_layers": 14, "num_decoder_layers": 2},
    "enat_s_256": {"sample_size": 16, "hidden_size": 512, "num_heads": 8, "num_encoder_layers": 14, "num_decoder_layers": 2},
    "enat_xs_256": {"sample_size": 16, "hidden_size": 384, "num_heads": 6, "num_encoder_layers": 10, "num_decoder_layers": 2},
}
"""Published sizes (L), the published width with an assumed split (B), and two small ones of ours; all with codebook_size=1024."""

NUM_VECTORS = 8


class ENATTransformer2DModel(ModelMixin, ConfigMixin):
    """ENAT for classes or text.

    Args:
        sample_size: side of the token grid, or [rows, columns].
        hidden_size: d.
        num_heads: attention heads, a divisor of d.
        num_encoder_layers: blocks for visible tokens.
        num_decoder_layers: blocks for masked tokens.
        codebook_size: K; id K is the mask.
        num_classes: classes without the null class, which is number num_classes; None for a text model.
        mlp_ratio: hidden width of the block MLPs as a multiple of d.
        dropout: on embedded tokens, in training.
        class_dropout: probability with which `drop_labels` replaces a label in training.
        text_dim: width of text tokens; None for a class model.
        pooled_dim: width of the pooled text; None for a class model.
        shared_modulation: one modulation Linear for all blocks and a learned offset per block (for small models), in place of the
            published Linear per block.
        stack: stack string of all blocks in place of the published ones. Every block attends first, `attention(keys='both')`, and has one
            channel mixer: "(attention(keys='both') + mlp(ratio=2)) * 6".

    Raises:
        ValueError: if the sizes do not fit together, a stack has other blocks, or not exactly one of classes and text is chosen.

    Example:
        >>> sizes = {"sample_size": 4, "hidden_size": 32, "num_heads": 4, "num_encoder_layers": 2, "num_decoder_layers": 1}
        >>> model = ENATTransformer2DModel(**sizes, codebook_size=16, num_classes=3).eval()
        >>> condition = model.prepare_condition(torch.tensor([0, model.null_class]))
        >>> model(torch.full((2, 16), model.mask_token_id), condition).logits.shape
        torch.Size([2, 16, 16])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _repeated_blocks: ClassVar[list[str]] = ["Block"]

    @register_to_config
    def __init__(
        self,
        *,  # diffusers forgets values passed by position when a model is rebuilt from its config
        sample_size: int | Sequence[int],
        hidden_size: int,
        num_heads: int,
        num_encoder_layers: int,
        num_decoder_layers: int,
        codebook_size: int = 1024,
        num_classes: int | None = 1000,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        class_dropout: float = 0.1,
        text_dim: int | None = None,
        pooled_dim: int | None = None,
        shared_modulation: bool = False,
        stack: str | None = None,
    ) -> None:
        super().__init__()
        self._check_config()
        self.grid = grid_of(sample_size)
        self.num_tokens = self.grid[0] * self.grid[1]
        self.mask_token_id = codebook_size
        self.embedding = TokenEmbedding(codebook_size + 1, self.num_tokens, hidden_size, dropout)
        if text_dim is None or pooled_dim is None:
            self.class_embedding = nn.Embedding((num_classes or 0) + 1, hidden_size)
        else:
            self.text_proj = nn.Linear(text_dim, hidden_size)
            self.pooled_proj = nn.Linear(pooled_dim, hidden_size)
        num_blocks = num_encoder_layers + num_decoder_layers
        if shared_modulation:
            self.modulation = Modulation(hidden_size, NUM_VECTORS)
            self.modulation_offset = nn.Parameter(torch.zeros(num_blocks, NUM_VECTORS, hidden_size))
        published = f"(attention(keys='both', context_kv='own') + mlp(ratio={mlp_ratio}, act='gelu_tanh')) * {num_blocks}"
        if stack is not None:
            self._check_stack(stack, num_blocks)
        self.blocks = build_stack(
            published if stack is None else stack,
            hidden_size,
            heads=num_heads,
            norm="ln_noaffine",
            eps=1e-6,
            modulated="given" if shared_modulation else True,
            context_norm="ln_noaffine",
            modulate_context=True,
            needs=Caps(set_op=True, context=True, mask=True),
        )
        self.reuse = Branch(MLPConfig(act="gelu_tanh").build(hidden_size), hidden_size, "ln", eps=1e-6)
        self.norm = build_norm("ln", hidden_size, eps=1e-5)
        self.head = CodeHead(hidden_size, codebook_size + 1)
        self.gradient_checkpointing = False
        self.init_weights()

    @staticmethod
    def _check_stack(text: str, num_blocks: int) -> None:
        """Check that blocks have the vectors and the context that the reuse of features needs."""
        blocks = parse(text)
        wrong = [block for block in blocks if len(block) != 2 or not _attends_to_both(block[0]) or block[1].name not in CHANNEL_MIXERS]
        if wrong or len(blocks) != num_blocks:
            given = str(Stack([wrong[0]])) if wrong else f"{len(blocks)} blocks"
            raise ValueError(
                f"ENATTransformer2DModel: a stack is {num_blocks} blocks of attention(keys='both') and a channel mixer, got {given}."
            )

    def _check_config(self) -> None:
        config = self.config
        sides = [config.sample_size] * 2 if isinstance(config.sample_size, int) else list(config.sample_size)
        counts = {name: config[name] for name in ("hidden_size", "num_heads", "num_decoder_layers", "codebook_size")}
        low = [f"{name}={value}" for name, value in counts.items() if value < 1]
        if low or config.num_encoder_layers < 0 or len(sides) != 2 or min(sides) < 1:
            raise ValueError(
                f"ENATTransformer2DModel: sizes must be positive and sample_size one or two sides, got {', '.join(low) or 'sizes'} "
                f"with num_encoder_layers={config.num_encoder_layers}, sample_size={config.sample_size}."
            )
        if config.hidden_size % config.num_heads:
            raise ValueError(
                f"ENATTransformer2DModel: hidden_size must be divisible by num_heads, got {config.hidden_size} and {config.num_heads}."
            )
        if (config.num_classes is None) == (config.text_dim is None) or (config.text_dim is None) != (config.pooled_dim is None):
            raise ValueError(
                "ENATTransformer2DModel: give num_classes for a class model, or num_classes=None with text_dim and pooled_dim for a text "
                f"model; got num_classes={config.num_classes}, text_dim={config.text_dim}, pooled_dim={config.pooled_dim}."
            )
        if not (0 <= config.dropout < 1 and 0 <= config.class_dropout < 1):
            raise ValueError(
                f"ENATTransformer2DModel: dropout and class_dropout must lie in [0, 1), got {config.dropout} and {config.class_dropout}."
            )

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set the published start values: Xavier-uniform Linears, tables normal 0.02, modulation zero (each block is the identity)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.embedding.position, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                module.reset_parameters()

    @property
    def null_class(self) -> int:
        """Label of the unconditional branch."""
        if self.config.num_classes is None:
            raise ValueError("ENATTransformer2DModel.null_class: a text model has no classes; its null condition is the empty prompt.")
        return int(self.config.num_classes)

    def drop_labels(self, labels: Tensor, uniforms: Tensor) -> Tensor:
        """Replace labels [b] by the null class where uniforms [b] in [0, 1) fall below `class_dropout`."""
        return torch.where(uniforms < self.config.class_dropout, self.null_class, labels)

    def prepare_condition(
        self,
        class_labels: Tensor | None = None,
        *,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        stack_context: bool | None = None,
    ) -> ENATCondition:
        """Compute what depends on the condition alone, for all steps of a batch.

        Args:
            class_labels: [b] int64 in 0 .. num_classes (the null class), for a class model.
            text: [b, m, text_dim], for a text model.
            text_mask: [b, m] bool, True = real token; None if all are.
            pooled: [b, pooled_dim], for a text model.
            stack_context: copy the context projections of all blocks into one tensor, so that they run as one batched product. None:
                on an accelerator without gradients, where launches count; on a CPU the product gains nothing and the copy costs.

        Raises:
            ValueError: if the arguments are not those of this kind of model.
        """
        if self.config.text_dim is None:
            if class_labels is None or text is not None or pooled is not None or text_mask is not None:
                raise ValueError("ENATTransformer2DModel.prepare_condition: a class model takes class_labels and nothing else.")
            check_shape(class_labels, "ENATTransformer2DModel.prepare_condition: class_labels", "b")
            vector, tokens = self.class_embedding(class_labels), None
        else:
            if class_labels is not None or text is None or pooled is None:
                raise ValueError("ENATTransformer2DModel.prepare_condition: a text model takes text and pooled, and no class_labels.")
            where = "ENATTransformer2DModel.prepare_condition"
            sizes = check_shape(text, f"{where}: text", "b m c", c=self.config.text_dim)
            check_shape(pooled, f"{where}: pooled", "b c", b=sizes["b"], c=self.config.pooled_dim)
            if text_mask is not None:
                check_shape(text_mask, f"{where}: text_mask", "b m", b=sizes["b"], m=sizes["m"])
            vector, tokens = self.pooled_proj(pooled), self.text_proj(text)
        if self.config.shared_modulation:
            vectors = self.modulation(vector)[:, None] + self.modulation_offset
        else:
            vectors = torch.stack([cast(Modulation, block.modulation)(vector) for block in self.blocks], dim=1)
        if stack_context is None:
            stack_context = vector.device.type != "cpu" and not torch.is_grad_enabled()
        weights = stack_weights(cast(Sequence[Block], self.blocks)) if stack_context else None
        return ENATCondition(vector, vectors, tokens, text_mask, weights)

    @with_fast_linear
    def forward(
        self,
        ids: Tensor,
        condition: ENATCondition | Mapping[str, Any],
        state: ENATState | None = None,
        *,
        masked_index: Tensor | None = None,
        new_index: Tensor | None = None,
        logits_at: str = "all",
        embedding_keep: Tensor | None = None,
    ) -> ENATOutput:
        """Evaluate the network on a partly masked grid.

        Args:
            ids: [b, n] int64 in 0 .. K, K = masked; all samples with equally many masked tokens.
            condition: from `prepare_condition`, or its arguments by name.
            state: of an earlier evaluation of a grid with the same and more masked tokens.
            masked_index: [b, k] int64, the masked positions in raster order; found from `ids` if None, which waits for the device.
            new_index: [b, v] int64, positions that are visible now and were masked in `state`; likewise.
            logits_at: 'all' tokens, the 'masked' ones, or 'none', which also skips the decoder.
            embedding_keep: [b, n, d] bool, the values that the embedding dropout keeps (training).

        Returns:
            Logits and the next state.

        Raises:
            ValueError: for wrong shapes, unequal counts of masked tokens, or a grid that does not follow the state.
        """
        choose(logits_at, LOGITS_AT, "value of logits_at:")
        check_shape(ids, "ENATTransformer2DModel: ids", "b n", n=self.num_tokens)
        if isinstance(condition, Mapping):
            condition = self.prepare_condition(**condition)
        index = split_grid(ids, self.mask_token_id, None if state is None else state.is_masked, masked_index, new_index)
        embedded = self.embedding(ids, embedding_keep)

        new, masked = take(embedded, index.new), take(embedded, index.masked)
        reused = None
        if state is not None:
            reused = self._reused(state.feat, index.old)
        elif condition.tokens is not None:
            new = torch.cat([condition.tokens.to(new.dtype), new], dim=1)
        split = self.config.num_encoder_layers
        if new.shape[1]:
            new = self._run(0, split, new, reused, condition)
        visible = new if reused is None else torch.cat([reused, new], dim=1)
        if masked.shape[1] and logits_at != "none":
            masked = self._run(split, len(self.blocks), masked, visible, condition)

        feat = _restore(visible, masked, index)
        logits = None
        if logits_at != "none":
            wanted = masked if logits_at == "masked" else feat[:, feat.shape[1] - self.num_tokens :]
            logits = self.head(self.norm(wanted), self.embedding.word.weight)
        return ENATOutput(logits=logits, state=ENATState(feat, index.is_masked))

    def _reused(self, feat: Tensor, old: Tensor) -> Tensor | None:
        """Return the reuse projection of text and old tokens [b, m + p, d] of an earlier evaluation, or None if there are none."""
        num_text = feat.shape[1] - self.num_tokens
        kept = take(feat[:, num_text:], old)
        if num_text:
            kept = torch.cat([feat[:, :num_text], kept], dim=1)
        reused: Tensor | None = self.reuse(kept.detach()) if kept.shape[1] else None
        return reused

    def _run(self, start: int, end: int, x: Tensor, context: Tensor | None, condition: ENATCondition) -> Tensor:
        """Run blocks start .. end - 1 on tokens x [b, n, d] that also attend to context [b, p, d], the same in every block."""
        blocks = cast(Sequence[Block], self.blocks[start:end])
        vectors = condition.modulation[:, start:end]
        contexts: Sequence[Any] = [None] * len(blocks)
        if context is not None and context.shape[1] and blocks:
            weights = condition.context_weights
            contexts = project(blocks, context, vectors, None if weights is None else weights.part(start, end))
        mask = _key_mask(condition, x.shape[1] + (0 if context is None else context.shape[1]))
        for i, block in enumerate(blocks):
            step = partial(block, cond=vectors[:, i], context=contexts[i], mask=mask)
            x = self._gradient_checkpointing_func(step, x) if self.gradient_checkpointing and torch.is_grad_enabled() else step(x)
        return x


def _key_mask(condition: ENATCondition, num_keys: int) -> Tensor | None:
    """Return which keys [b, num_keys] are real; text tokens always come first, grid tokens all count."""
    real = condition.token_mask
    if real is None:
        return None
    return torch.cat([real, real.new_ones(real.shape[0], num_keys - real.shape[1])], dim=1)


def _restore(visible: Tensor, masked: Tensor, index: TokenIndex) -> Tensor:
    """Bring text, old and new tokens (visible [b, m + p + v, d]) and masked ones [b, k, d] into the order of `ENATState.feat`."""
    order = torch.cat([index.old, index.new, index.masked], dim=1)
    tokens = torch.cat([visible, masked], dim=1)
    num_text = tokens.shape[1] - order.shape[1]
    if num_text:
        text = torch.arange(num_text, device=order.device).expand(order.shape[0], -1)
        order = torch.cat([text, order + num_text], dim=1)
    return torch.empty_like(tokens).scatter(1, order[..., None].expand_as(tokens), tokens)


def _attends_to_both(config: MixerConfig) -> bool:
    """Tell whether a mixer is attention to its own tokens and others by two projections."""
    return isinstance(config, AttentionConfig) and (config.keys, config.context_kv) == ("both", "own")
