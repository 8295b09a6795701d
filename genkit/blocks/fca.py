"""FcaFormer's block: tokens attend to themselves and to summaries of what earlier blocks of the stage made, all by one projection.

Source: Zhang et al., FcaFormer: Forward Cross Attention in Hybrid Vision Transformer, ICCV 2023, arXiv 2211.07198. Its vectors fix the size
of the grid and the number of summaries; new models write `attention(keys='both', context_kv='shared')` and hand the summaries as context.
Letters: b batch, n tokens of a grid h w, m summaries, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genkit.blocks.attend import attend
from genkit.blocks.bias_table import BiasTable
from genkit.blocks.branch import Branch
from genkit.blocks.conv import ConvConfig, to_map, to_tokens
from genkit.blocks.heads import head_count, join_heads, split_heads
from genkit.blocks.layout import Layout
from genkit.blocks.mlp import MLPConfig
from genkit.checks import check_shape


class FcaBlock(nn.Module):
    """x + g attention([x, s]); its summary; a depthwise convolution in place of x; x + g mlp(x) behind two norms.

    Args:
        dim: d, a multiple of heads.
        heads: attention heads.
        grid: (h, w).
        summaries: m, tokens s that come from earlier blocks; 0 in the first of a stage.
        hidden: of the MLP.
        summarises: whether later blocks get a summary of this one.
    """

    def __init__(self, dim: int, heads: int, grid: tuple[int, int], summaries: int, hidden: int, summarises: bool = True) -> None:
        super().__init__()
        self.heads, self.grid, self.summaries = head_count("FcaBlock", heads, None, dim), grid, summaries
        self.norm = nn.LayerNorm(dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.bias_table = BiasTable("table_abs", heads, grid)
        self.gain = nn.Parameter(torch.ones(dim))
        self.context_norm = nn.LayerNorm(dim) if summaries else None
        self.context_scale = nn.Parameter(torch.ones(1, summaries, 1)) if summaries else None
        self.context_bias = nn.Parameter(torch.zeros(1, heads, 1, summaries)) if summaries else None
        self.summary = nn.Conv2d(dim, dim, 7, stride=4, padding=3, groups=dim, bias=False) if summarises else None
        self.conv = Branch(ConvConfig("dw", norm="bn", bias=False).build(dim), dim, "none", residual="none")
        self.mlp = Branch(MLPConfig(hidden=hidden).build(dim), dim, "ln", layer_scale=1.0)
        self.mlp.norm = nn.Sequential(nn.LayerNorm(dim), nn.LayerNorm(dim))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return tokens [b, n, d] and their summary [b, m', d], None without one.

        Args:
            x: [b, n, d] of the grid.
            context: [b, m, d], summaries of earlier blocks, one behind the other; None if m is 0.

        Raises:
            ValueError: for other numbers of tokens or summaries.
        """
        h, w = self.grid
        check_shape(x, "FcaBlock: x", "b n d", n=h * w, d=self.q.in_features)
        if (context is None) != (self.summaries == 0):
            raise ValueError(
                f"FcaBlock: context must be {self.summaries} summaries, got {None if context is None else list(context.shape)}."
            )
        x = x + self.gain * self._attention(self.norm(x), context)
        layout, summary = Layout(grid=self.grid), None
        if self.summary is not None:
            summary = to_tokens(self.summary(to_map(x, (1, h, w))), len(x))
        return self.mlp(self.conv(x, layout=layout)), summary

    def _attention(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Attend to own tokens and summaries in one softmax."""
        keys, bias = x, self.bias_table(self.grid)
        if context is not None:
            assert self.context_norm is not None and self.context_scale is not None and self.context_bias is not None
            check_shape(context, "FcaBlock: context", "b m d", b=len(x), m=self.summaries, d=x.shape[-1])
            keys = torch.cat([x, self.context_norm(context * self.context_scale)], dim=1)
            bias = torch.cat([bias, self.context_bias.expand(-1, -1, x.shape[1], -1)], dim=-1)
        k, v = (split_heads(part, self.heads) for part in self.kv(keys).chunk(2, dim=-1))
        return self.proj(join_heads(attend(split_heads(self.q(x), self.heads), k, v, bias=bias)))
