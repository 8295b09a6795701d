"""NAT: the plain masked-token image transformer, every token through every block at every step.

AutoNAT (Ni et al., CVPR 2024, arXiv 2406.05478) after MaskGIT (Chang et al., CVPR 2022, arXiv 2202.04200), on a U-shaped transformer.
Computes the numbers of the official AutoNAT checkpoints (`genkit.convert.autonat`).

- half of the blocks hand their results to the other half, last in first out (`skip`)
- the class is a token of its own in front of the grid; nothing is modulated, no state links the steps
- takes the place of ENAT in `ENATPipeline`: the same condition, arguments and results
- text instead of classes (ours): the pooled text is that token, the text's tokens follow it

Legend: b batch, n tokens of the grid, m condition tokens, d width, K codes, k masked tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from genkit.blocks.caps import Caps
from genkit.blocks.fast_linear import with_fast_linear
from genkit.blocks.layout import Layout
from genkit.blocks.nested import Width, check_width, copy_cut, cut_stack, nested_widths
from genkit.blocks.norms import build_norm
from genkit.blocks.stack import Stack, parse
from genkit.blocks.stack import build as build_stack
from genkit.checks import check_shape, choose
from genkit.generators.enat_index import take
from genkit.generators.enat_parts import LOGITS_AT, CodeHead, TokenEmbedding, grid_of
from genkit.generators.enat_state import ENATCondition, ENATOutput, ENATState

SIZES: dict[str, dict[str, Any]] = {
    "autonat_l_256": {"sample_size": 16, "hidden_size": 768, "num_heads": 8, "depth": 24},
    "autonat_s_256": {"sample_size": 16, "hidden_size": 512, "num_heads": 8, "depth": 12},
}
"""Published sizes, codebook_size=1024."""

STRATEGIES: dict[str, dict[str, Any]] = {
    "autonat_l_256": {
        "gen_steps": 8,
        "manual_ratios": [
            0.9531645174140464, 0.8795409806037042, 0.7940230737075623, 0.745995860948045, 0.6249785820461957, 0.407321956652571,
            0.260658917067054,
        ],
        "manual_temp": [
            2.404912789740805, 2.477616274962803, 1.191696577294597, 0.7685444738649722, 1.0673489052089495, 0.9353720330515827,
            0.7843839537838292,
        ],
        "manual_samp_temp": [
            2.8999037830310685, 1.867261830931786, 1.1443729673819831, 1.3796334226014182, 1.4699896959810144, 1.3760684112198358,
            1.7082165405200722, 0.7133060703601533,
        ],
        "manual_cfg": [
            0.0001, 0.0001, 0.0001, 0.9151274967591447, 1.6160182878189675, 1.1945509026838659, 1.38322370140345, 1.22678520936251,
        ],
    },
}  # fmt: skip
"""Searched strategies as published, for `MaskedTokenScheduler.from_strategy`."""


class NATTransformer2DModel(ModelMixin, ConfigMixin):
    """NAT for classes or text.

    Args:
        sample_size: side of the token grid, or [rows, columns].
        hidden_size: d.
        num_heads: attention heads, a divisor of d.
        depth: blocks beside the middle one, an even number.
        codebook_size: K; id K is the mask.
        num_classes: classes without the null class, which is number num_classes; None for a text model.
        mlp_ratio: hidden width of the block MLPs as a multiple of d.
        qkv_bias: biases of the query, key and value projections.
        skip: whether blocks of the second half see those of the first.
        dropout: on embedded tokens, in training.
        class_dropout: probability with which `drop_labels` replaces a label in training; the official data set does it.
        text_dim, pooled_dim: widths of text tokens and of the pooled text; None for a class model.
        stack: stack string of depth + 1 blocks in place of the published ones, "(attention + mlp) * (depth + 1)".

    Raises:
        ValueError: if the sizes do not fit together, or not exactly one of classes and text is chosen.

    Example:
        >>> model = NATTransformer2DModel(sample_size=4, hidden_size=32, num_heads=4, depth=2, codebook_size=16, num_classes=3).eval()
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
        depth: int,
        codebook_size: int = 1024,
        num_classes: int | None = 1000,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        skip: bool = True,
        dropout: float = 0.1,
        class_dropout: float = 0.0,
        text_dim: int | None = None,
        pooled_dim: int | None = None,
        stack: str | None = None,
    ) -> None:
        super().__init__()
        self.grid = grid_of(sample_size)
        if min(hidden_size, num_heads, codebook_size, *self.grid) < 1 or depth < 0 or depth % 2 or hidden_size % num_heads:
            raise ValueError(
                "NATTransformer2DModel: sizes must be positive, depth even and hidden_size divisible by num_heads, got "
                f"hidden_size={hidden_size}, num_heads={num_heads}, depth={depth}, codebook_size={codebook_size} and "
                f"sample_size={sample_size}."
            )
        if (num_classes is None) == (text_dim is None) or (text_dim is None) != (pooled_dim is None):
            raise ValueError(
                "NATTransformer2DModel: give num_classes for a class model, or num_classes=None with text_dim and pooled_dim for a text "
                f"model; got num_classes={num_classes}, text_dim={text_dim}, pooled_dim={pooled_dim}."
            )
        self.num_tokens = self.grid[0] * self.grid[1]
        self.mask_token_id = codebook_size
        self.embedding = TokenEmbedding(codebook_size + 1, self.num_tokens, hidden_size, dropout)
        if text_dim is None or pooled_dim is None:
            self.class_embedding = TokenEmbedding((num_classes or 0) + 1, 1, hidden_size, 0.0)
        else:
            self.text_proj = nn.Linear(text_dim, hidden_size)
            self.pooled_proj = nn.Linear(pooled_dim, hidden_size)
        self.blocks = build_stack(self._stack, hidden_size, heads=num_heads, norm="ln", needs=Caps(mask=text_dim is not None))
        if len(self.blocks) != depth + 1:
            raise ValueError(f"NATTransformer2DModel: depth={depth} means {depth + 1} blocks, got {len(self.blocks)} in {stack!r}.")
        self.skips = nn.ModuleList(nn.Linear(2 * hidden_size, hidden_size) for _ in range(depth // 2 if skip else 0))
        self.norm = build_norm("ln", hidden_size, eps=1e-5)
        self.head = CodeHead(hidden_size, codebook_size + 1)
        self.gradient_checkpointing = False
        self.init_weights()

    @property
    def _stack(self) -> Stack:
        """The blocks, as published unless the config names others."""
        config = self.config
        published = f"(attention(qkv_bias={config['qkv_bias']}) + mlp(ratio={config['mlp_ratio']})) * {config['depth'] + 1}"
        return parse(published if config["stack"] is None else config["stack"])

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set the published start values: Linears and tables truncated normal 0.02, biases zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, TokenEmbedding):
                nn.init.trunc_normal_(module.position, std=0.02)

    @property
    def null_class(self) -> int:
        """Label of the unconditional branch."""
        if self.config["num_classes"] is None:
            raise ValueError("NATTransformer2DModel.null_class: a text model has no classes; its null condition is the empty prompt.")
        return int(self.config["num_classes"])

    def drop_labels(self, labels: Tensor, uniforms: Tensor) -> Tensor:
        """Replace labels [b] by the null class where uniforms [b] in [0, 1) fall below `class_dropout`."""
        return torch.where(uniforms < self.config["class_dropout"], self.null_class, labels)

    def prepare_condition(
        self,
        class_labels: Tensor | None = None,
        *,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> ENATCondition:
        """Compute the tokens [b, m, d] in front of the grid: the class, or the pooled text and the text.

        Args:
            class_labels: [b] int64 in 0 .. num_classes (the null class), for a class model.
            text: [b, t, text_dim], for a text model.
            text_mask: [b, t] bool, True = real token; None if all are.
            pooled: [b, pooled_dim], for a text model.

        Raises:
            ValueError: if the arguments are not those of this kind of model.
        """
        where = "NATTransformer2DModel.prepare_condition"
        if self.config["text_dim"] is None:
            if class_labels is None or text is not None or pooled is not None or text_mask is not None:
                raise ValueError(f"{where}: a class model takes class_labels and nothing else.")
            check_shape(class_labels, f"{where}: class_labels", "b")
            tokens, mask = self.class_embedding(class_labels[:, None]), None
        else:
            if class_labels is not None or text is None or pooled is None:
                raise ValueError(f"{where}: a text model takes text and pooled, and no class_labels.")
            sizes = check_shape(text, f"{where}: text", "b t c", c=self.config["text_dim"])
            check_shape(pooled, f"{where}: pooled", "b c", b=sizes["b"], c=self.config["pooled_dim"])
            tokens = torch.cat([self.pooled_proj(pooled)[:, None], self.text_proj(text)], dim=1)
            mask = None
            if text_mask is not None:
                check_shape(text_mask, f"{where}: text_mask", "b t", b=sizes["b"], t=sizes["t"])
                mask = torch.cat([text_mask.new_ones(sizes["b"], 1), text_mask], dim=1)
        return ENATCondition(tokens[:, 0], tokens[:, :0], tokens, mask)

    @property
    def widths(self) -> tuple[float, ...]:
        """Nested widths that all blocks have."""
        return nested_widths(cast(Sequence[nn.Module], self.blocks))

    def cut(self, width: float | Sequence[float]) -> NATTransformer2DModel:
        """Return a smaller network that computes what this one does at a nested width, and has no others.

        Args:
            width: as in `forward`.

        Raises:
            ValueError: for a width that the blocks do not have.
        """
        blocks = cast(Sequence[nn.Module], self.blocks)
        widths = check_width(width, blocks, "NATTransformer2DModel")
        config = {key: value for key, value in self.config.items() if not key.startswith("_")}
        small = NATTransformer2DModel(**{**config, "stack": str(cut_stack(self._stack, blocks, widths))})
        copy_cut(self, small)
        return nn.Module.to(small, self.device, self.dtype).train(self.training)

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
        width: Width = None,
    ) -> ENATOutput:
        """Evaluate the network on a partly masked grid.

        Args:
            ids: [b, n] int64 in 0 .. K, K = masked.
            condition: from `prepare_condition`, or its arguments by name.
            state, new_index: taken for ENAT's sake; every evaluation is whole.
            masked_index: [b, k] int64, the masked positions; needed for logits_at='masked'.
            logits_at: 'all' tokens, the 'masked' ones, or 'none'.
            embedding_keep: [b, n, d] bool, the values that the embedding dropout keeps (training).
            width: nested width of the MLPs, one for all blocks or one for each; the full one if None.

        Returns:
            Logits, and a state without features.

        Raises:
            ValueError: for wrong shapes, or masked logits without their positions.
        """
        choose(logits_at, LOGITS_AT, "value of logits_at:")
        check_shape(ids, "NATTransformer2DModel: ids", "b n", n=self.num_tokens)
        if logits_at == "masked" and masked_index is None:
            raise ValueError("NATTransformer2DModel: logits_at='masked' needs masked_index.")
        if isinstance(condition, Mapping):
            condition = self.prepare_condition(**condition)
        assert condition.tokens is not None, "NAT's condition is tokens"
        empty = ENATState(condition.tokens[:, :0], ids == self.mask_token_id)
        if logits_at == "none":
            return ENATOutput(logits=None, state=empty)
        x = torch.cat([condition.tokens, self.embedding(ids, embedding_keep)], dim=1)
        mask, real = None, condition.token_mask
        if real is not None:
            mask = torch.cat([real, real.new_ones(len(real), self.num_tokens)], dim=1)
        widths = check_width(width, cast(Sequence[nn.Module], self.blocks), "NATTransformer2DModel")
        layout = Layout(grid=self.grid, prefix=condition.tokens.shape[1])
        half = len(self.blocks) // 2
        kept: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i > half and self.skips:
                x = self.skips[i - half - 1](torch.cat([x, kept.pop()], dim=-1))
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, None, layout, None, mask, None, widths[i])
            else:
                x = block(x, layout=layout, mask=mask, width=widths[i])
            if i < half:
                kept.append(x)
        x = self.norm(x)[:, condition.tokens.shape[1] :]
        wanted = take(x, masked_index) if logits_at == "masked" and masked_index is not None else x
        return ENATOutput(logits=self.head(wanted, self.embedding.word.weight), state=empty)
