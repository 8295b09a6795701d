"""Memory layers: the signs of a chunk of channels choose a row of a table, in place of a matrix product.

They need many more weights than a linear map (2^B rows of a table for B channels) and are no faster on today's processors; for research and
for published weights.

Source: Ding et al., MemoryFormer: Minimize Transformer Computation by Removing Fully-Connected Layers, NeurIPS 2024, arXiv 2411.12992.
Letters: b batch, n tokens, i inputs, o outputs, T tables, B bits of a code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.caps import Caps, ChannelMixer, MixerConfig, option, refuse_arguments, register
from genkit.blocks.layout import Layout
from genkit.checks import choose

SCORES = ("paper", "released")


class MemoryLayer(nn.Module):
    """sum_t s_t table_t[code_t] + bias: code_t are the signs of chunk t of the input, first channel first, s_t says how sure they are.

    Gradients reach the rows that were read, and the input through the score.

    Args:
        in_features: i.
        out_features: o.
        bits: B.
        tables: T; i / B if None.
        projected: a linear map gives the T B numbers whose signs count; without one they are the input's channels.
        score: "paper": exp(sum |z|) / prod(2 cosh z), in (0, 1]; "released": sum |z| / prod(1 + exp(-2 |z|)), as the public code has it.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int = 8,
        *,
        tables: int | None = None,
        projected: bool = False,
        score: str = "paper",
    ) -> None:
        super().__init__()
        choose(score, SCORES, "score")
        count = in_features // bits if tables is None else tables
        if not 1 <= bits <= 16 or count < 1 or (not projected and count * bits != in_features):
            given = f"bits={bits}, tables={count}"
            raise ValueError(f"MemoryLayer: bits in 1 .. 16 divide the {in_features} inputs (unless projected=True), got {given}.")
        self.bits, self.score_kind = bits, score
        self.projection = nn.Linear(in_features, count * bits) if projected else None
        self.tables = nn.Parameter(torch.randn(count * 2**bits, out_features) * (out_features * count) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes [..., T] int64 and scores [..., T] float32 of x [..., i]."""
        z = (x if self.projection is None else self.projection(x)).float().unflatten(-1, (-1, self.bits))
        places = 2 ** torch.arange(self.bits - 1, -1, -1, device=x.device)
        size = z.abs()
        sure = F.logsigmoid(2 * size).sum(-1).exp()
        return ((z >= 0) * places).sum(-1), sure if self.score_kind == "paper" else size.sum(-1) * sure

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., i] to [..., o]."""
        codes, scores = self.codes(x)
        first = torch.arange(codes.shape[-1], device=x.device) * 2**self.bits
        rows = F.embedding(codes + first, self.tables)
        return (scores[..., None, :].to(rows.dtype) @ rows).squeeze(-2) + self.bias


@register("memory")
@dataclass(frozen=True)
class MemoryConfig(MixerConfig):
    """Options of two memory layers without an activation between them.

    Args:
        bits: B of both.
        ratio: width between the layers as a multiple of d.
        projected, score: see `MemoryLayer`.
    """

    bits: int = option(8, int)
    ratio: float = option(1.0, float, int)
    projected: bool = option(False, bool)
    score: str = option("paper", *SCORES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio <= 0:
            raise ValueError(f"memory: ratio must be positive, got {self.ratio}.")

    @property
    def caps(self) -> Caps:
        """Each token alone: every law of token order holds."""
        return Caps(set_op=True, causal=True, cache=True, mask=True)

    def build(self, dim: int, *, heads: int | None = None, context_dim: int | None = None) -> MemoryMixer:
        """Build the module for width `dim`."""
        return MemoryMixer(dim, self)


class MemoryMixer(ChannelMixer):
    """fc2(fc1(x)) with memory layers.

    Args:
        dim: d.
        config: the options.
    """

    def __init__(self, dim: int, config: MemoryConfig) -> None:
        super().__init__()
        self.config: MemoryConfig = config
        hidden = round(dim * config.ratio)
        shared: dict[str, Any] = {"bits": config.bits, "projected": config.projected, "score": config.score}
        self.fc1, self.fc2 = MemoryLayer(dim, hidden, **shared), MemoryLayer(hidden, dim, **shared)

    def forward(self, x: Tensor, *, layout: Layout | None = None, width: float | None = None) -> Tensor:
        """Map tokens x [b, n, d]; there is no nested width."""
        refuse_arguments(self.config, width=width)
        out: Tensor = self.fc2(self.fc1(x))
        return out
