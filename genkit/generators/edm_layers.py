"""Layers of the EDM networks: convolutions that resample, the residual block with its attention.

Letters: b batch, c channels, h w rows and columns, d width of the embedding, hd head width, k kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.blocks.attend import attend
from genkit.blocks.forward_mode import has_tangent

Resampling = Literal["up", "down"]


class GroupNorm(nn.GroupNorm):
    """Group norm that is written out in forward mode, where PyTorch's refuses tangents that do not lie in memory as their tensor does."""

    def forward(self, x: Tensor) -> Tensor:
        if not has_tangent(x):
            return super().forward(x)
        rows = x.reshape(len(x), self.num_groups, -1)
        centred = rows - rows.mean(-1, keepdim=True)
        normed = centred * (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return normed.reshape(x.shape) * self.weight[:, None, None] + self.bias[:, None, None]


def group_norm(channels: int, eps: float) -> GroupNorm:
    """Return a norm over at most 32 groups of at least 4 channels.

    Raises:
        ValueError: if the channels do not divide into these groups.
    """
    groups = min(32, channels // 4)
    if groups < 1 or channels % groups:
        raise ValueError(
            f"EDM network: {channels} channels (of a level, or of two that the decoder joins) do not divide into min(32, channels // 4) = "
            f"{groups} groups of the norms; choose other model_channels or channel_mult."
        )
    return GroupNorm(groups, channels, eps=eps)


class Resample(nn.Module):
    """Double or halve a picture with a separable low-pass filter.

    Args:
        resampling: "up" or "down".
        taps: one axis of the filter; [1, 1] repeats pixels or averages 2x2 squares, which needs no convolution.
    """

    def __init__(self, resampling: Resampling, taps: Sequence[float] = (1, 1)) -> None:
        super().__init__()
        self.resampling = resampling
        self.is_box = tuple(taps) == (1, 1)
        line = torch.tensor(taps, dtype=torch.float32)
        self.register_buffer("resample_filter", (torch.outer(line, line) / line.sum() ** 2)[None, None], persistent=False)

    def forward(self, x: Tensor, pad: bool = True) -> Tensor:
        """Resample [b, c, h, w]; without `pad` the borders are those that a convolution before it left for the filter."""
        if self.is_box:
            return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resampling == "up" else F.avg_pool2d(x, 2)
        taps = cast(Tensor, self.resample_filter).to(x.dtype)
        padding, channels = (taps.shape[-1] - 1) // 2 if pad else 0, x.shape[1]
        if self.resampling == "up":
            return F.conv_transpose2d(x, (taps * 4).expand(channels, 1, -1, -1), stride=2, padding=padding, groups=channels)
        return F.conv2d(x, taps.expand(channels, 1, -1, -1), stride=2, padding=padding, groups=channels)


class ResampleConv2d(nn.Conv2d):
    """Convolution of odd kernel with resampling before it.

    Args:
        dim_in, dim_out: channels.
        kernel: odd.
        resampling: "up" or "down".
        taps: filter.
        fused: convolve with a border of half the filter first, then filter without padding (NCSN++'s auxiliary branch).
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        kernel: int,
        resampling: Resampling,
        taps: Sequence[float] = (1, 1),
        fused: bool = False,
    ) -> None:
        super().__init__(dim_in, dim_out, kernel, padding=kernel // 2)
        self.resample = Resample(resampling, taps)
        self.border = (len(taps) - 1) // 2
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            half = self.kernel_size[0] // 2 + self.border
            return self.resample(F.conv2d(x, self.weight, padding=half), pad=False) + cast(Tensor, self.bias)[:, None, None]
        if self.kernel_size == (1, 1) and self.resample.is_box and self.resample.resampling == "up":
            return self.resample(super().forward(x))  # pixels are repeated: the same numbers at a quarter of the work
        return super().forward(self.resample(x))


def convolution(dim_in: int, dim_out: int, kernel: int, resampling: Resampling | None = None, taps: Sequence[float] = (1, 1)) -> nn.Conv2d:
    """Return a convolution that keeps the size, or one with resampling before it."""
    if resampling is None:
        return nn.Conv2d(dim_in, dim_out, kernel, padding=kernel // 2)
    return ResampleConv2d(dim_in, dim_out, kernel, resampling, taps)


class UNetBlock(nn.Module):
    """Residual block with noise-level embedding, optional resampling and optional self-attention over pixels.

    h = conv1(dropout(silu(norm1(conv0(silu(norm0 x))) with the embedding))), x <- (h + skip x) * skip_scale, then
    x <- (proj(attention(norm2 x)) + x) * skip_scale.

    Args:
        dim_in, dim_out: channels.
        emb_dim: width of the embedding.
        resampling: "up", "down" or None; happens in conv0 and the skip.
        taps: filter of the resampling.
        heads: of the attention; 0 = none.
        dropout: in [0, 1).
        skip_scale: after each residual sum.
        eps: of the norms.
        project_resampled: a resampling skip has a 1x1 convolution even if the channels agree.
        adaptive_scale: the embedding scales and shifts behind norm1 (ADM) instead of being added before it.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        emb_dim: int,
        *,
        resampling: Resampling | None = None,
        taps: Sequence[float] = (1, 1),
        heads: int = 0,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        project_resampled: bool = False,
        adaptive_scale: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.skip_scale, self.adaptive_scale = heads, skip_scale, adaptive_scale
        self.norm0 = group_norm(dim_in, eps)
        self.conv0 = convolution(dim_in, dim_out, 3, resampling, taps)
        self.affine = nn.Linear(emb_dim, dim_out * (2 if adaptive_scale else 1))
        self.norm1 = group_norm(dim_out, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = convolution(dim_out, dim_out, 3)
        self.skip: nn.Module | None = None
        if dim_in != dim_out or (resampling and project_resampled):
            self.skip = convolution(dim_in, dim_out, 1, resampling, taps)
        elif resampling:
            self.skip = Resample(resampling, taps)
        if heads:
            self.norm2 = group_norm(dim_out, eps)
            self.qkv = convolution(dim_out, dim_out * 3, 1)
            self.proj = convolution(dim_out, dim_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Compute the block on x [b, c, h, w] with the embedding [b, d]."""
        h = self.conv0(F.silu(self.norm0(x)))
        vector = self.affine(emb)[:, :, None, None].to(h.dtype)
        if self.adaptive_scale:
            scale, shift = vector.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + vector))
        h = self.conv1(self.dropout(h))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        return (self.proj(self.attention(self.norm2(x))) + x) * self.skip_scale if self.heads else x

    def attention(self, x: Tensor) -> Tensor:
        """Attend over the pixels of [b, c, h, w]."""
        qkv = self.qkv(x).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(-1, -2)  # b 3 heads n hd
        q, k, v = qkv.unbind(1)
        return attend(q, k, v).transpose(-1, -2).reshape(x.shape)
