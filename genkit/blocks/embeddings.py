"""Positions and times: fixed sine-cosine tables, rotary embeddings of one, two or three axes, timestep embeddings.

Letters: b batch, n tokens, d width, h w rows and columns, hd head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sincos_2d(height: int, width: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the fixed table [h*w, d] of a grid, column first: [sin(c o), cos(c o), sin(r o), cos(r o)].

    r and c are the token's row and column, o_i = 10000^(-i / q), i = 0 .. q-1, q = d / 4. Computed in float64.

    Args:
        height: rows.
        width: columns.
        dim: d, a multiple of 4.
        dtype: of the result.

    Raises:
        ValueError: if dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sincos_2d: dim must be a multiple of 4 (sine and cosine of two axes), got {dim}.")
    quarter = dim // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    rows = torch.arange(height, dtype=torch.float64, device="cpu")[:, None, None] * omega
    columns = torch.arange(width, dtype=torch.float64, device="cpu")[None, :, None] * omega
    parts = [columns.sin(), columns.cos(), rows.sin(), rows.cos()]
    return torch.cat([part.expand(height, width, quarter) for part in parts], dim=-1).reshape(height * width, dim).to(dtype)


def sincos_1d(length: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the fixed table [length, d] of positions 0, 1, ...: [sin(p o), cos(p o)], o_i = 10000^(-i / q), q = d / 2, in float64.

    Args:
        length: positions.
        dim: d, even.
        dtype: of the result.

    Raises:
        ValueError: if dim is odd.
    """
    if dim % 2:
        raise ValueError(f"sincos_1d: dim must be even (sine and cosine), got {dim}.")
    half = dim // 2
    omega = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device="cpu") / half)
    angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(dtype)


def point_sincos(pos: Tensor, dim: int, base: float = 10000.0) -> Tensor:
    """Return sines and cosines in turn of coordinates, axis after axis, zeros behind: [..., n, d] of points [..., n, axes], fp32.

    Of the L = 2 (d // (2 axes)) numbers of an axis, numbers 2 i and 2 i + 1 are sine and cosine of pos * base^(-2 i / L).

    Args:
        pos: coordinates.
        dim: d.
        base: wavelength base.
    """
    pairs = dim // (2 * pos.shape[-1])
    frequencies = base ** (-torch.arange(pairs, device=pos.device, dtype=torch.float32) / max(pairs, 1))
    angles = pos.float()[..., None] * frequencies
    found = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)
    return F.pad(found, (0, dim - found.shape[-1]))


def rotary(pos: Tensor, width: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the rotation angles, for `rotate`.

    The head is cut in one slice per axis; in a slice of width s, channel pair i turns by pos * base^(-2 i / s).

    Args:
        pos: coordinates [b|1, n, axes] float32.
        width: hd, a multiple of 2 * axes.
        base: wavelength base.

    Returns:
        cos and sin, each [b|1, 1, n, hd / 2] float32.
    """
    axes = pos.shape[-1]
    pairs = width // (2 * axes)
    frequencies = base ** (-torch.arange(pairs, device=pos.device, dtype=torch.float32) / pairs)
    angles = (pos[..., None] * frequencies).flatten(-2)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, axes: int) -> Tensor:
    """Rotate heads x [b, heads, n, hd] by the angles of `rotary`; in each axis slice, channel i pairs with i + half the slice."""
    first, second = x.float().unflatten(-1, (axes, 2, -1)).unbind(-2)
    cos, sin = cos.unflatten(-1, (axes, -1)), sin.unflatten(-1, (axes, -1))
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-2)
    return turned.flatten(-3).to(x.dtype)


def timestep_embedding(timestep: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Return [cos, sin] of timesteps [b] at frequencies max_period^(-i / half), a column of zeros behind for odd widths, fp32."""
    half = width // 2
    frequencies = torch.exp(-torch.log(torch.tensor(max_period)) * torch.arange(half, dtype=torch.float32) / half).to(timestep.device)
    angles = timestep.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))


class TimestepMLP(nn.Module):
    """Sinusoid of 256, two layers; the sinusoid is fp32 whatever the layers are.

    Args:
        dim: d of the result.
        max_period: of the sinusoid.
        multiplier: timesteps are multiplied by it first.
    """

    def __init__(self, dim: int, max_period: float = 10000.0, multiplier: float = 1.0) -> None:
        super().__init__()
        self.max_period, self.multiplier = max_period, multiplier
        self.fc1, self.fc2 = nn.Linear(256, dim), nn.Linear(dim, dim)

    def forward(self, timestep: Tensor) -> Tensor:
        """Return [b, d] of timesteps [b]."""
        embedded = timestep_embedding(timestep.float() * self.multiplier, 256, self.max_period)
        return self.fc2(F.silu(self.fc1(embedded.to(self.fc1.weight.dtype))))


def interleaved_sincos_2d(height: int, width: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the fixed table [h*w, d] of coordinates that run to 2 pi on any grid: rows, then columns, sine and cosine in turn.

    The coordinate of row r is 2 pi (r + 1) / h; frequency i of q = d / 4 is 10000^(-i / q). Computed in float64.

    Args:
        height: rows.
        width: columns.
        dim: d, a multiple of 4.
        dtype: of the result.

    Raises:
        ValueError: if dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"interleaved_sincos_2d: dim must be a multiple of 4 (sine and cosine of two axes), got {dim}.")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    tables = []
    for length in (height, width):
        place = torch.arange(1, length + 1, dtype=torch.float64, device="cpu") * (2 * math.pi / (length + 1e-6))
        angles = place[:, None] * omega
        tables.append(torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1))
    rows, columns = tables[0][:, None].expand(-1, width, -1), tables[1][None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).to(dtype)


class ConvPositions(nn.Module):
    """Positions for grids of any size: the table of `interleaved_sincos_2d` behind a depthwise 3 x 3 convolution.

    Source: Tian et al., ResFormer: Scaling ViTs with Multi-Resolution Training, CVPR 2023, arXiv 2212.00776.

    Args:
        dim: d, a multiple of 4.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.filters = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """Return what is added to the tokens [1, h*w, d] of a grid (h, w)."""
        weight = self.filters.weight
        table = interleaved_sincos_2d(*grid, len(weight)).to(weight)
        pixels = self.filters(table.T.unflatten(1, grid)[None])
        return pixels.flatten(2).transpose(1, 2)
