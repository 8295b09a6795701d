"""PredFormer: given frames to as many future frames, by gated transformer units over space and time.

Video Prediction Transformers without Recurrence or Convolution (Tang et al. 2024, arXiv 2410.04733), all nine published layouts and any
other order of units: a layout such as "TSST" is one layer, T a unit over the frames of each patch, S over the patches of each frame.

- every unit ends in a norm and has no skip around it, as published
- attention through `attend`: no map of all tokens is kept
- clips of any length by rolling out; the fixed table of positions is made where it is needed

Legend: b clips, f frames, c channels, h w rows and columns, n patches of a frame, d width, p patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.blocks.attention import AttentionConfig
from genkit.blocks.branch import Branch
from genkit.blocks.fast_linear import with_fast_linear
from genkit.blocks.mlp import MLPConfig
from genkit.checks import check_shape, choose

WHOLE = ("full", "fac_st", "fac_ts")
SIZES: dict[str, dict[str, Any]] = {
    "moving_mnist_tsst": {"sample_size": 64, "in_channels": 1, "num_frames": 10, "patch_size": 8, "layout": "TSST", "num_layers": 6},
    "moving_mnist_ts": {"sample_size": 64, "in_channels": 1, "num_frames": 10, "patch_size": 8, "layout": "TS", "num_layers": 12},
}
"""Published Moving-MNIST sizes of the two-letter and four-letter layouts; 24 units of width 256 in each."""


@dataclass
class FramesOutput(BaseOutput):
    """What a predictor returns.

    Attributes:
        frames: [b, f, c, h, w] future frames, about [-1, 1].
    """

    frames: Tensor


def interleaved_sines(count: int, dim: int) -> Tensor:
    """Return the table [count, d] of angles q / 10000^(2 floor(i/2) / d), sine at even and cosine at odd channels i."""
    exponents = 2 * torch.div(torch.arange(dim, dtype=torch.float64), 2, rounding_mode="floor") / dim
    angles = torch.arange(count, dtype=torch.float64)[:, None] / 10000.0**exponents
    return torch.where(torch.arange(dim) % 2 == 0, angles.sin(), angles.cos()).float()


class GatedTransformer(nn.Module):
    """`depth` pairs of attention and gated MLP with residuals, and a norm behind them all: one unit.

    Args:
        dim: d.
        depth: pairs.
        heads: attention heads.
        dim_head: width of a head.
        hidden: hidden width of both gates.
        dropout: of hidden and output units of the MLP.
        attn_dropout: of the attention's output.
        drop_path: probability with which a sample skips a branch, in training.
    """

    def __init__(
        self, dim: int, depth: int, heads: int, dim_head: int, hidden: int, dropout: float, attn_dropout: float, drop_path: float
    ) -> None:
        super().__init__()
        self.dropouts, self.drop_path = (attn_dropout, dropout), drop_path
        attention = AttentionConfig(heads=heads, key_dim=dim_head, qkv_bias=False, out_proj=not (heads == 1 and dim_head == dim))
        mlp = MLPConfig(hidden=hidden, act="silu", gated=True, dropout=dropout)
        self.pairs = nn.ModuleList(
            nn.ModuleList([Branch(attention.build(dim), dim, residual="none"), Branch(mlp.build(dim), dim, residual="none")])
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens [b, n, d]."""
        for pair in self.pairs:
            for branch, dropout in zip(cast(Iterable[nn.Module], pair), self.dropouts, strict=True):
                x = x + self.drop(F.dropout(branch(x), dropout, self.training))
        return self.norm(x)

    def drop(self, x: Tensor) -> Tensor:
        """Zero a branch of some samples [b, n, d] in training, and scale the others up."""
        if not self.training or not self.drop_path:
            return x
        keep = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.drop_path)
        return x * keep / (1 - self.drop_path)


class PredFormer(ModelMixin, ConfigMixin):
    """Frames to frames.

    Args:
        sample_size: side of a frame, or [h, w].
        in_channels: c.
        num_frames: frames given and predicted at once.
        patch_size: p.
        dim: d.
        heads: attention heads.
        dim_head: width of a head.
        scale_dim: hidden width of the MLPs as a multiple of d.
        layout: letters T and S in the order of the units of a layer; or "fac_st", "fac_ts" (all units of one kind, then all of the other),
            "full" (one unit over all tokens).
        num_layers: layers; for the whole layouts, pairs of a unit.
        depth: pairs of a unit, of layouts of letters.
        dropout, attn_dropout, drop_path: see `GatedTransformer`.
        official_fac_st: "fac_st" as published, which hands the head its tokens in the wrong order (and what was trained so needs it).
        official_range: the network works on [0, 1], as published; the interface is [-1, 1] all the same.

    Raises:
        ValueError: if the sizes do not fit, or the layout is unknown.

    Example:
        >>> model = PredFormer(sample_size=8, in_channels=1, num_frames=2, patch_size=4, dim=8, heads=2, dim_head=4, num_layers=1)
        >>> model(torch.zeros(1, 2, 1, 8, 8), num_frames=5).frames.shape
        torch.Size([1, 5, 1, 8, 8])
    """

    @register_to_config
    def __init__(
        self,
        *,  # diffusers forgets values passed by position when a model is rebuilt from its config
        sample_size: int | Sequence[int] = 64,
        in_channels: int = 1,
        num_frames: int = 10,
        patch_size: int = 8,
        dim: int = 256,
        heads: int = 8,
        dim_head: int = 32,
        scale_dim: float = 4,
        layout: str = "TSST",
        num_layers: int = 6,
        depth: int = 1,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        drop_path: float = 0.0,
        official_fac_st: bool = True,
        official_range: bool = True,
    ) -> None:
        super().__init__()
        size = (sample_size, sample_size) if isinstance(sample_size, int) else (int(sample_size[0]), int(sample_size[1]))
        if any(side % patch_size for side in size):
            raise ValueError(f"PredFormer: patch_size={patch_size} must divide both sides of sample_size={list(size)}.")
        if set(layout) - set("TS") or not layout:
            choose(layout, (*WHOLE, "TS", "ST", "TST", "STS", "TSST", "STTS"), "layout")
        self.grid = (size[0] // patch_size, size[1] // patch_size)
        pixels, is_whole = in_channels * patch_size**2, layout in WHOLE
        self.embed = nn.Linear(pixels, dim)
        kinds = {"full": "A", "fac_st": "ST", "fac_ts": "TS"}.get(layout, layout)

        def unit() -> GatedTransformer:
            pairs = num_layers if is_whole else depth
            return GatedTransformer(dim, pairs, heads, dim_head, int(dim * scale_dim), dropout, attn_dropout, drop_path)

        self.kinds = kinds
        self.layers = nn.ModuleList(nn.ModuleList(unit() for _ in kinds) for _ in range(1 if is_whole else num_layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, pixels)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Truncated normal of 0.02 and biases 0 inside the units; embedding and head as PyTorch starts them."""
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, sample: Tensor, num_frames: int | None = None, return_dict: bool = True) -> FramesOutput | tuple[Tensor]:
        """Predict.

        Args:
            sample: [b, f, c, h, w] in [-1, 1], f the trained number of frames.
            num_frames: frames to predict; as many as given if None, more by feeding predictions back.
            return_dict: False returns a tuple.

        Raises:
            ValueError: if shapes do not fit, or nothing is asked for.
        """
        f = self.config["num_frames"]
        wanted = f if num_frames is None else num_frames
        sizes = {"f": f, "c": self.config["in_channels"], "h": self.grid[0] * self.patch, "w": self.grid[1] * self.patch}
        check_shape(sample, "PredFormer: sample", "b f c h w", **sizes)
        if wanted < 1:
            raise ValueError(f"PredFormer: num_frames must be at least 1, got {wanted}.")
        unit = self.config["official_range"]
        x, parts = (sample + 1) / 2 if unit else sample, []
        for _ in range(math.ceil(wanted / f)):
            x = self.next_frames(x)
            parts.append(x)
        frames = torch.cat(parts, dim=1)[:, :wanted]
        frames = frames * 2 - 1 if unit else frames
        return FramesOutput(frames=frames) if return_dict else (frames,)

    @property
    def patch(self) -> int:
        """Side of a patch."""
        return int(self.config["patch_size"])

    @with_fast_linear
    def next_frames(self, x: Tensor) -> Tensor:
        """Return the next frames [b, f, c, h, w] of frames in the network's own range."""
        p, (rows, columns) = self.patch, self.grid
        tokens = self.embed(rearrange(x, "b f c (h p) (w q) -> b f (h w) (p q c)", p=p, q=p))
        b, f, n, d = tokens.shape
        tokens = tokens + interleaved_sines(f * n, d).to(tokens).view(1, f, n, d)
        for layer in self.layers:
            for kind, unit in zip(self.kinds, cast(Iterable[nn.Module], layer), strict=True):
                tokens = self.run(kind, unit, tokens)
        if self.config["layout"] == "fac_st" and self.config["official_fac_st"]:
            tokens = tokens.transpose(1, 2).reshape(b, f, n, d)  # the published order of what the temporal unit returns
        out = self.head(self.norm(tokens))
        return rearrange(out, "b f (h w) (c p q) -> b f c (h p) (w q)", h=rows, w=columns, p=p, q=p)

    def run(self, kind: str, unit: nn.Module, x: Tensor) -> Tensor:
        """Apply a unit to tokens [b, f, n, d]: T over frames, S over patches, A over all."""
        b, f, n, _ = x.shape
        if kind == "S":
            return unit(x.flatten(0, 1)).unflatten(0, (b, f))
        if kind == "A":
            return unit(x.flatten(1, 2)).unflatten(1, (f, n))
        return unit(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (b, n)).transpose(1, 2)
