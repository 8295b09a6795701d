"""Residual vector quantization: each level codes what the levels before it left over.

r_0 = z, r_{l+1} = r_l - sg(c_l), q = sum of c_l; the codes c_l come from one quantizer that all levels share, or from one each.

Source: Zeghidour et al. 2021 (arXiv 2107.03312), Lee et al. 2022 (arXiv 2203.01941) for the shared table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from genkit.checks import choose
from genkit.tokenizers.quantizers.base import VectorQuantizerBase
from genkit.tokenizers.quantizers.gradient import straight_through
from genkit.tokenizers.quantizers.output import QuantizerOutput

PATHS = ("residual", "vit_vqgan")


class ResidualQuantizer(VectorQuantizerBase):
    """Latents [..., d] to indices [..., levels] and back.

    Args:
        build: makes the quantizer of a level.
        num_levels: codes per latent.
        is_shared: one quantizer for all levels.
        path: how gradients go. "residual": the residual stays attached to the latent and is reduced by detached codes, so that the latent
            gets the output's gradient once per level; the loss is the sum over levels. "vit_vqgan": as in its released code the residual
            starts detached and is reduced by attached codes, so that the latent gets no commitment and early codes that of later levels;
            the loss is the mean.

    Raises:
        ValueError: for fewer than one level, or an unknown path.
    """

    def __init__(
        self, build: Callable[[], VectorQuantizerBase], *, num_levels: int = 3, is_shared: bool = True, path: str = "residual"
    ) -> None:
        if num_levels < 1:
            raise ValueError(f"residual quantizer: num_levels must be at least 1, got {num_levels}.")
        levels = [build() for _ in range(1 if is_shared else num_levels)]
        super().__init__(levels[0].codebook_size, levels[0].dim, beta=levels[0].beta)
        self.layers = nn.ModuleList(levels)
        self.num_levels, self.is_shared, self.path = num_levels, is_shared, choose(path, PATHS, "path")

    def level(self, index: int) -> VectorQuantizerBase:
        """Return the quantizer of a level."""
        return cast(VectorQuantizerBase, self.layers[0 if self.is_shared else index])

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the sums of codes [..., d] of indices [..., levels]; a level with index -1 adds nothing.

        Raises:
            ValueError: for another number of levels.
        """
        if indices.shape[-1] != self.num_levels:
            raise ValueError(f"residual quantizer: indices must be [..., levels={self.num_levels}], got {list(indices.shape)}.")
        parts = [self.level(i).lookup(indices[..., i].clamp_min(0)) * (indices[..., i, None] >= 0) for i in range(self.num_levels)]
        return torch.stack(parts).sum(0)

    def codebook(self) -> Tensor:
        """Return the codes of all quantizers, one behind the other [quantizers * k, d]."""
        return torch.cat([cast(VectorQuantizerBase, layer).codebook() for layer in self.layers])

    @torch.no_grad()
    def fit(self, latents: Tensor, generator: torch.Generator, method: str = "kmeans") -> None:
        """Start every level's codes where what the levels before leave over is; shared codes where the latents are."""
        residual = latents.float()
        for layer in self.layers:
            own = cast(VectorQuantizerBase, layer)
            own.fit(residual, generator, method)
            residual = residual - own.lookup(own.search(own.prepare(residual)))

    def forward(self, latents: Tensor, gumbel: Tensor | None = None, temperature: float = 1.0) -> QuantizerOutput:
        """Quantize latents [..., d].

        Args:
            latents: [..., d].
            gumbel: noise [levels, ..., k] to draw codes with, see `VectorQuantizerBase.draw`; the nearest ones if None.
            temperature: of the draw.

        Returns:
            `indices` [..., levels]; `terms` holds those of all levels together, and of each ("commitment_0", ...).

        Raises:
            ValueError: if the last axis is not `dim`, the noise has another shape, or the temperature is not positive.
        """
        if gumbel is not None and len(gumbel) != self.num_levels:
            raise ValueError(f"quantizer: gumbel must be [levels={self.num_levels}, ..., k], got {list(gumbel.shape)}.")
        is_official = self.path == "vit_vqgan"
        residual = latents.float().detach() if is_official else latents.float()
        total, outputs = torch.zeros_like(residual), []
        for i in range(self.num_levels):
            out: QuantizerOutput = self.level(i)(residual, None if gumbel is None else gumbel[i], temperature)
            outputs.append(out)
            if is_official:
                codes = self.level(i).lookup(out.indices)
                total, residual = total + codes.detach(), residual - codes
            else:
                total, residual = total + out.quantized, residual - out.quantized.detach()
        quantized = straight_through(latents.float(), total) if is_official else total
        terms: dict[str, Tensor] = {}
        for name in outputs[0].terms:
            own = torch.stack([out.terms[name] for out in outputs])
            terms |= {name: own.sum()} | {f"{name}_{i}": value for i, value in enumerate(own)}
        losses = torch.stack([out.loss for out in outputs])
        return QuantizerOutput(
            quantized=quantized.to(latents.dtype),
            indices=torch.stack([out.indices for out in outputs], dim=-1),
            loss=losses.mean() if is_official else losses.sum(),
            terms=terms,
        )
