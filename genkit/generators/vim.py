"""VIM stage 2: the codes of a picture one after the other, in raster order.

Yu et al. 2022, "Vector-quantized Image Modeling with Improved VQGAN" (arXiv 2110.04627), as the public PyTorch re-implementation has it:
a decoder-only transformer whose attention sees each token mixed with the one before it. Loads its checkpoints (`genkit.convert.vim`).

- classes, or one class for unconditional models; a null class for guidance where `class_dropout` is above 0 (ours)
- condition tokens see each other, codes see what is before them
- a cache keeps keys, values and the last token of every block: cached and whole evaluations agree. The released sampler forgets that
  token; `forgetful_cache` does so too

Legend: b batch, t codes so far, T codes of a picture, m condition tokens, d width, K codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from genkit.blocks.attention import AttentionConfig
from genkit.blocks.branch import Block, Branch
from genkit.blocks.caches import ShiftCache
from genkit.blocks.caps import Cache
from genkit.blocks.fast_linear import fast_linear, with_fast_linear
from genkit.blocks.init import normal_init
from genkit.blocks.mlp import MLPConfig
from genkit.blocks.norms import build_norm
from genkit.blocks.one_token import StepLayers
from genkit.blocks.wrappers import TokenShift, TokenShiftConfig
from genkit.checks import check_shape
from genkit.generators.enat_parts import grid_of

SIZES: dict[str, dict[str, Any]] = {
    "vim_base": {"sample_size": 32, "codebook_size": 8192, "hidden_size": 1536, "depth": 24, "num_heads": 16},
    "vim_large": {"sample_size": 32, "codebook_size": 8192, "hidden_size": 2048, "depth": 36, "num_heads": 32},
}
"""Sizes of the paper; no weights were released."""

VIMCaches = list[list[Cache | None]]


@dataclass
class VIMOutput(BaseOutput):
    """Result of one evaluation.

    Attributes:
        logits: [b, n, K] of the code after each place: the last condition token, if given, and every code.
    """

    logits: Tensor


class VIMTransformer2DModel(ModelMixin, ConfigMixin):
    """VIM's generator.

    Args:
        sample_size: side of the token grid, or [rows, columns].
        codebook_size: K.
        hidden_size: d.
        num_heads: of each attention.
        depth: blocks.
        mlp_ratio: hidden width of the block MLPs as a multiple of d.
        num_classes: classes without the null class; 1 for an unconditional model.
        num_cond_tokens: m.
        class_dropout: how often training takes the null class, number num_classes; 0 leaves it out, as released.
        qkv_bias: biases of the attention's projections, the output's too.
        dropout: of each branch, in training.
        forgetful_cache: see above.

    Raises:
        ValueError: if the sizes do not fit together.

    Example:
        >>> model = VIMTransformer2DModel(sample_size=2, codebook_size=8, hidden_size=16, num_heads=2, depth=1, num_classes=3).eval()
        >>> model(torch.zeros(1, 3, dtype=torch.long), torch.tensor([[2]])).logits.shape
        torch.Size([1, 4, 8])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _repeated_blocks: ClassVar[list[str]] = ["Block"]

    @register_to_config
    def __init__(
        self,
        *,  # diffusers forgets values passed by position when a model is rebuilt from its config
        sample_size: int | Sequence[int],
        codebook_size: int,
        hidden_size: int,
        num_heads: int,
        depth: int,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        num_cond_tokens: int = 1,
        class_dropout: float = 0.0,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        forgetful_cache: bool = False,
    ) -> None:
        super().__init__()
        self.grid = grid_of(sample_size)
        counts = (codebook_size, hidden_size, num_heads, depth, num_classes, num_cond_tokens, *self.grid)
        if min(counts) < 1 or hidden_size % num_heads or not 0 <= class_dropout < 1:
            raise ValueError(
                "VIMTransformer2DModel: sizes must be positive, hidden_size divisible by num_heads and class_dropout in [0, 1), got "
                f"codebook_size={codebook_size}, hidden_size={hidden_size}, num_heads={num_heads}, depth={depth}, "
                f"num_classes={num_classes}, num_cond_tokens={num_cond_tokens}, sample_size={sample_size}, class_dropout={class_dropout}."
            )
        self.num_tokens = self.grid[0] * self.grid[1]
        self.code_embed = nn.Embedding(codebook_size, hidden_size)
        self.class_embed = nn.Embedding(num_classes + (1 if class_dropout > 0 else 0), hidden_size)
        self.code_position = nn.Parameter(torch.zeros(self.num_tokens, hidden_size))
        self.class_position = nn.Parameter(torch.zeros(num_cond_tokens, hidden_size))
        attention = TokenShiftConfig(AttentionConfig(qkv_bias=qkv_bias, out_bias=qkv_bias, causal=True), forgetful=forgetful_cache)
        mixers = (attention, MLPConfig(ratio=mlp_ratio, act="relu2"))

        def block() -> Block:
            branches = [Branch(mixer.build(hidden_size, heads=num_heads), hidden_size, "ln", dropout=dropout) for mixer in mixers]
            return Block(branches, hidden_size)

        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.norm = build_norm("ln", hidden_size, eps=1e-5)
        self.head = nn.Linear(hidden_size, codebook_size, bias=False)
        self.gradient_checkpointing = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set the published start values: matrices and tables normal 0.02, biases and positions zero, shifts rising over the channels."""
        normal_init(self)
        for module in self.modules():
            if isinstance(module, TokenShift):
                module.reset_parameters()

    @property
    def null_class(self) -> int:
        """Label of the unconditional branch.

        Raises:
            ValueError: if the model has none.
        """
        if not self.config["class_dropout"]:
            raise ValueError("VIMTransformer2DModel.null_class: this model was trained without a null class (class_dropout=0).")
        return int(self.config["num_classes"])

    def new_cache(self, batch: int) -> VIMCaches:
        """Return empty caches for a whole picture, one list per block."""
        like, places = self.head.weight, self.num_tokens + len(self.class_position)
        return [cast(Block, block).new_cache(batch, places, device=like.device, dtype=like.dtype) for block in self.blocks]

    @with_fast_linear
    def forward(
        self,
        codes: Tensor,
        conds: Tensor | None = None,
        *,
        cache: VIMCaches | None = None,
        last_only: bool = False,
        return_dict: bool = True,
    ) -> VIMOutput | tuple[Tensor]:
        """Evaluate the network.

        Args:
            codes: [b, t] int64, those that follow what the cache holds; t may be 0 beside conds.
            conds: [b, m] int64 labels, at the start of a picture.
            cache: from `new_cache`; needed where no conds are given.
            last_only: logits of the last place only.
            return_dict: False returns a tuple.

        Raises:
            ValueError: if shapes do not fit, or codes go on without a cache.
        """
        sizes, m = check_shape(codes, "VIMTransformer2DModel: codes", "b t"), len(self.class_position)
        held = 0 if cache is None else cast(ShiftCache, cache[0][0]).length
        start = max(held - m, 0)
        if (conds is None) == (held == 0) or start + sizes["t"] > self.num_tokens:
            raise ValueError(
                f"VIMTransformer2DModel: a picture of {self.num_tokens} codes begins with conds and goes on with its cache, "
                f"got conds {'missing' if conds is None else 'given'}, {start} codes in the cache and {sizes['t']} more."
            )
        x = self.code_embed(codes) + self.code_position[start : start + sizes["t"]]
        mask = None
        if conds is not None:
            check_shape(conds, "VIMTransformer2DModel: conds", "b m", b=sizes["b"], m=m)
            x = torch.cat([self.class_embed(conds) + self.class_position, x], dim=1)
            mask = self._mask(x.shape[1], x.device)
        for i, block in enumerate(self.blocks):
            own = None if cache is None else cache[i]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, None, None, None, mask)
            else:
                x = block(x, mask=None if mask is None else [mask, None], cache=own)
        x = x[:, -1:] if last_only else x if conds is None else x[:, m - 1 :]
        logits = self.head(self.norm(x))
        return VIMOutput(logits=logits) if return_dict else (logits,)

    @torch.no_grad()
    def features(self, codes: Tensor, conds: Tensor, block: int) -> Tensor:
        """Return features [b, d] for linear probes: the mean over all codes [b, T] of what a block puts out.

        Args:
            codes: [b, t] int64.
            conds: [b, m] int64.
            block: counted from 0; about the middle is best.

        Raises:
            ValueError: if there is no such block.

        Source: Yu et al. 2022, section 3.3: logits of a linear layer on the averaged activations of one block.
        """
        if not 0 <= block < len(self.blocks):
            raise ValueError(f"VIMTransformer2DModel.features: block must lie in 0 .. {len(self.blocks) - 1}, got {block}.")
        kept: list[Tensor] = []
        hook = self.blocks[block].register_forward_hook(lambda module, arguments, output: kept.append(output))
        try:
            self(codes, conds)
        finally:
            hook.remove()
        return kept[0][:, len(self.class_position) :].mean(1)

    def _mask(self, n: int, device: torch.device) -> Tensor | None:
        """Return who sees whom [1, 1, n, n] where several condition tokens see each other; None where order alone decides."""
        m = len(self.class_position)
        if m == 1:
            return None
        places = torch.arange(n, device=device)
        return ((places[:, None] >= places) | (places < m) & (places[:, None] < m))[None, None]


class CodeStepper:
    """Evaluates one code per picture, behind what the caches hold.

    Args:
        transformer: its weights are used as they are.
    """

    def __init__(self, transformer: VIMTransformer2DModel) -> None:
        self.transformer = transformer
        self.layers = [StepLayers.of(cast(Block, block)) for block in transformer.blocks]
        self.is_forgetful = bool(transformer.config["forgetful_cache"])

    @torch.no_grad()
    def __call__(self, codes: Tensor, cache: VIMCaches) -> Tensor:
        """Return logits [b, K] of the code after codes [b, 1]; the caches grow by them."""
        net = self.transformer
        place = cast(ShiftCache, cache[0][0]).length - len(net.class_position)
        x = net.code_embed.weight.detach()[codes] + net.code_position.detach()[place]
        for own, block in zip(self.layers, cache, strict=True):
            held, normed = cast(ShiftCache, block[0]), own.normed(x, own.norm1)
            before = torch.zeros_like(normed) if self.is_forgetful else held.previous
            held.previous = normed
            x = x + own.attended(torch.lerp(before, normed, cast(Tensor, own.time_mix)), held.inner)
            x = x + own.fed(own.normed(x, own.norm2))
        norm = cast(Any, net.norm)
        x = torch.nn.functional.layer_norm(x[:, -1], x.shape[-1:], norm.weight.detach(), norm.bias.detach(), norm.eps)
        return fast_linear(x, net.head.weight.detach(), None)
