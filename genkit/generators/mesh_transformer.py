"""MeshTransformer: the next token of a mesh, given a shape.

MeshAnything (Chen et al. 2024, arXiv 2406.10163) and MeshAnything V2 (arXiv 2408.02555): a decoder-only transformer of OPT's form, which
writes a mesh after a prefix of shape tokens. Loads both official checkpoints (`genkit.convert.meshanything`).

- post-norm blocks, learned positions counted over prefix and tokens, no norm at the end
- every token also carries its place in face or strip; which that is follows from the tokens alone
- caches of a fixed length: a step costs what its context costs, nothing is copied

Legend: b meshes, m prefix tokens, n tokens, d width, w width of shape tokens, c width of codes, k ids.
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

from genkit.blocks import stack
from genkit.blocks.branch import Block
from genkit.blocks.caps import Cache, Caps
from genkit.blocks.fast_linear import with_fast_linear
from genkit.blocks.init import normal_init
from genkit.checks import check_shape, choose
from genkit.tokenizers.mesh_tokens import LAYOUTS, SPECIALS, FaceTokens, TokenLayout
from genkit.tokenizers.point_encoder import PointFeatures

OFFSET = 2  # OPT's tables of positions start with two rows that nothing uses
SIZES: dict[str, dict[str, Any]] = {
    "meshanything_v1": {"layout": "faces", "num_codes": 8192, "code_dim": 1024, "max_tokens": 7202, "num_positions": 18259},
    "meshanything_v2": {"layout": "adjacent", "max_tokens": 10083},
}
MeshCaches = Sequence[list[Cache | None]]


@dataclass
class MeshTransformerOutput(BaseOutput):
    """Result of one evaluation.

    Attributes:
        logits: [b, m + n, k] of the id after each place.
    """

    logits: Tensor


class MeshTransformer(ModelMixin, ConfigMixin):
    """Prefix and ids so far to the logits of the next id.

    Args:
        layout: "adjacent" or "faces", see `genkit.tokenizers.mesh_tokens`.
        bins: steps a side, where tokens are coordinates.
        num_codes, code_dim: of the codebook, where the tokens of "faces" are codes.
        width: d.
        depth: blocks.
        heads: of each attention.
        hidden: width of the feed-forward layers.
        dropout: of each branch, in training.
        point_width: w.
        num_points: m, the global and the local shape tokens.
        max_tokens: ids of a sequence, bos and eos included.
        num_positions: m + max_tokens if None.

    Raises:
        ValueError: if sizes do not fit together.

    Example:
        >>> model = MeshTransformer(width=8, depth=1, heads=2, hidden=16, point_width=4, num_points=3, max_tokens=20)
        >>> model(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 3, 8)).logits.shape
        torch.Size([1, 3, 132])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _repeated_blocks: ClassVar[list[str]] = ["Block"]

    @register_to_config
    def __init__(
        self,
        *,
        layout: str = "adjacent",
        bins: int = 128,
        num_codes: int | None = None,
        code_dim: int | None = None,
        width: int = 1024,
        depth: int = 24,
        heads: int = 16,
        hidden: int = 4096,
        dropout: float = 0.0,
        point_width: int = 768,
        num_points: int = 257,
        max_tokens: int = 10083,
        num_positions: int | None = None,
    ) -> None:
        super().__init__()
        choose(layout, LAYOUTS, "token layout")
        if width % heads or (num_codes is None) != (code_dim is None) or (num_codes is not None and layout != "faces"):
            raise ValueError(
                "MeshTransformer: heads must divide width, and num_codes and code_dim come together, with layout 'faces', got "
                f"heads={heads}, width={width}, num_codes={num_codes}, code_dim={code_dim}, layout={layout!r}."
            )
        places = num_points + max_tokens if num_positions is None else num_positions
        if places < num_points + max_tokens:
            raise ValueError(f"MeshTransformer: num_positions={places} are fewer than num_points + max_tokens = {num_points + max_tokens}.")
        self.tokens: TokenLayout = FaceTokens(bins, num_codes) if layout == "faces" else LAYOUTS[layout](bins)
        self.num_ids = SPECIALS + self.tokens.num_tokens
        self.cond_head_proj = nn.Linear(point_width, width)
        self.cond_proj = nn.Linear(2 * point_width, width)
        self.lm_head = nn.Linear(width, self.num_ids, bias=False)
        self.special_embed, self.codebook, self.code_proj = None, None, None
        if num_codes is not None and code_dim is not None:
            self.special_embed = nn.Embedding(SPECIALS, width)
            self.codebook = nn.Parameter(torch.empty(num_codes, code_dim))
            self.code_proj = nn.Linear(code_dim, width)
        self.slot_embed = nn.Embedding(self.tokens.num_slots, width)
        self.segment_embed = nn.Embedding(2, width)
        self.position_embed = nn.Embedding(places + OFFSET, width)
        blocks = f"(attention(causal=True) + mlp(hidden={hidden}, act='relu')) * {depth}"
        needs = Caps(causal=True, cache=True)
        self.blocks = stack.build(blocks, width, heads=heads, residual="post", dropout=dropout, needs=needs)
        self.gradient_checkpointing = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw matrices and tables from N(0, 0.02^2), biases 0, as OPT does; the codebook from N(0, 1/c)."""
        normal_init(self)
        if self.codebook is not None:
            nn.init.normal_(self.codebook, std=self.codebook.shape[1] ** -0.5)

    def prefix(self, features: PointFeatures) -> Tensor:
        """Return the prefix [b, m, d] of a shape's tokens.

        Raises:
            ValueError: if the tokens are of another number or width.
        """
        config = self.config
        check_shape(features.tokens, "MeshTransformer: tokens", "b m w", m=config["num_points"], w=config["point_width"])
        both = torch.cat([features.tokens[:, 1:], features.shape_tokens], dim=-1)
        return torch.cat([self.cond_head_proj(features.tokens[:, :1]), self.cond_proj(both)], dim=1)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embedded ids [b, n, d], without places."""
        if self.special_embed is None or self.codebook is None or self.code_proj is None:
            return nn.functional.embedding(ids, self.lm_head.weight)
        codes = self.code_proj(nn.functional.embedding((ids - SPECIALS).clamp_min(0), self.codebook))
        return torch.where((ids < SPECIALS)[..., None], self.special_embed(ids.clamp_max(SPECIALS - 1)), codes)

    def new_cache(self, batch: int, max_len: int) -> MeshCaches:
        """Return empty caches for so many places, one per block."""
        like = self.lm_head.weight
        return [cast(Block, block).new_cache(batch, max_len, device=like.device, dtype=like.dtype) for block in self.blocks]

    @with_fast_linear
    def forward(
        self,
        ids: Tensor,
        prefix: Tensor | None = None,
        *,
        slots: Tensor | None = None,
        start: int = 0,
        cache: MeshCaches | None = None,
        last_only: bool = False,
        return_dict: bool = True,
    ) -> MeshTransformerOutput | tuple[Tensor]:
        """Evaluate the network.

        Args:
            ids: [b, n]; padding stands on the right and is seen by nothing before it.
            prefix: [b, m, d] from `prefix`, in the first call of a sequence.
            slots: [b, n] places of the ids; of a whole sequence they follow from it and may be left out.
            start: place of the first row given: 0 with a prefix, else how many rows (prefix and ids) the cache holds.
            cache: from `new_cache`.
            last_only: logits of the last place only.
            return_dict: False returns a tuple.

        Raises:
            ValueError: if shapes do not fit, slots are missing, or the positions do not suffice.
        """
        check_shape(ids, "MeshTransformer: ids", "b n")
        if slots is None and prefix is None and ids.shape[1]:
            raise ValueError("MeshTransformer: ids without prefix go on a sequence; give their slots too.")
        slots = self.tokens.slots(ids) if slots is None else slots
        rows = [self.embed(ids) + self.slot_embed(slots) + self.segment_embed.weight[1]]
        if prefix is not None:
            check_shape(prefix, "MeshTransformer: prefix", "b m d", b=len(ids), d=self.config["width"])
            rows.insert(0, prefix + self.segment_embed.weight[0])
        x = torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]
        end = start + x.shape[1] + OFFSET
        if end > len(self.position_embed.weight):
            raise ValueError(
                f"MeshTransformer: {end - OFFSET} places are asked for, the model has {len(self.position_embed.weight) - OFFSET}."
            )
        x = x + self.position_embed.weight[start + OFFSET : end]
        for i, block in enumerate(self.blocks):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x)
            else:
                x = block(x, cache=None if cache is None else cache[i])
        logits = self.lm_head(x[:, -1:] if last_only else x)
        return MeshTransformerOutput(logits=logits) if return_dict else (logits,)
