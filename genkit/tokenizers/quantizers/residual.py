"""Residual vector quantization: each level codes what the levels before it left over.

r_0 = z, r_{l+1} = r_l - sg(c_l), q = sum of c_l; the codes c_l come from one table that all levels share, or from one each.

Source: Zeghidour et al. 2021 (arXiv 2107.03312), Lee et al. 2022 (arXiv 2203.01941) for the shared table; Chen et al. 2024 (MeshAnything,
arXiv 2406.10163) for codes drawn with Gumbel noise, on which a decoder learns to mend wrong codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.tokenizers.quantizers.base import VectorQuantizerBase
from genkit.tokenizers.quantizers.gradient import ESTIMATORS
from genkit.tokenizers.quantizers.output import QuantizerOutput
from genkit.tokenizers.quantizers.search import nearest_codes


class ResidualVQ(VectorQuantizerBase):
    """Latents [..., d] to indices [..., levels] and back.

    Loss: the sum over levels of beta * mean (sg c - r)^2 + mean (c - sg r)^2. The residual stays attached to the latent, so the latent gets
    the output's gradient once per level, as published.

    Args:
        codebook_size: number of codes k of a table.
        dim: width d.
        num_levels: codes per latent.
        is_shared: one table for all levels.
        **options: beta, beta_on, gradient; see `VectorQuantizerBase`.

    Raises:
        ValueError: if a size is not positive.
    """

    def __init__(self, codebook_size: int, dim: int, *, num_levels: int = 3, is_shared: bool = True, **options: object) -> None:
        super().__init__(codebook_size, dim, **options)  # type: ignore[arg-type]
        if num_levels < 1:
            raise ValueError(f"residual quantizer: num_levels must be at least 1, got {num_levels}.")
        self.num_levels, self.is_shared = num_levels, is_shared
        self.embedding = nn.Parameter(torch.empty(1 if is_shared else num_levels, codebook_size, dim))
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the tables from N(0, 1/d)."""
        nn.init.normal_(self.embedding, std=self.dim**-0.5)

    def table(self, level: int) -> Tensor:
        """Return the codes [k, d] of a level."""
        return self.embedding[0 if self.is_shared else level].float()

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the sums of codes [..., d] of indices [..., levels]; a level with index -1 adds nothing.

        Raises:
            ValueError: for another number of levels.
        """
        if indices.shape[-1] != self.num_levels:
            raise ValueError(f"residual quantizer: indices must be [..., levels={self.num_levels}], got {list(indices.shape)}.")
        parts = [F.embedding(indices[..., i].clamp_min(0), self.table(i)) for i in range(self.num_levels)]
        is_valid = indices >= 0
        return torch.stack([part * is_valid[..., i, None] for i, part in enumerate(parts)]).sum(0)

    def codebook(self) -> Tensor:
        """Return all rows of all tables [tables * k, d]."""
        return self.embedding.flatten(0, 1)

    @torch.no_grad()
    def set_codes(self, codes: Tensor) -> None:
        """Write codes [k, d] into every table."""
        self.embedding.copy_(codes.expand_as(self.embedding))

    def forward(self, latents: Tensor, gumbel: Tensor | None = None, temperature: float = 1.0) -> QuantizerOutput:
        """Quantize latents [..., d].

        Args:
            latents: [..., d].
            gumbel: standard Gumbel noise [levels, ..., k]: a level takes argmax of -|r - c| / temperature + gumbel. The nearest if None.
            temperature: above 0; the lower, the nearer to the nearest code.

        Returns:
            `indices` [..., levels]; `terms` has those of all levels, and "commitment_0", ... of each.

        Raises:
            ValueError: if the last axis is not `dim`, the noise has another shape, or the temperature is not positive.
        """
        if latents.shape[-1] != self.dim:
            raise ValueError(f"quantizer: latents must be [..., d={self.dim}], got {list(latents.shape)}.")
        wanted = (self.num_levels, *latents.shape[:-1], self.codebook_size)
        if gumbel is not None and (tuple(gumbel.shape) != wanted or not temperature > 0):
            raise ValueError(f"quantizer: gumbel must be {list(wanted)} and temperature above 0, got {list(gumbel.shape)}, {temperature}.")
        with torch.autocast(latents.device.type, enabled=False):
            residual, total = latents.float(), torch.zeros_like(latents, dtype=torch.float32)
            indices, terms = [], {}
            for level in range(self.num_levels):
                table = self.table(level)
                flat = residual.detach().reshape(-1, self.dim)
                if gumbel is None:
                    found = nearest_codes(flat, table)
                else:
                    distances = torch.cdist(flat, table.detach(), compute_mode="donot_use_mm_for_euclid_dist")
                    found = (gumbel[level].reshape(-1, self.codebook_size) - distances / temperature).argmax(1)
                indices.append(found.view(latents.shape[:-1]))
                codes = F.embedding(indices[-1], table)
                terms[f"commitment_{level}"] = F.mse_loss(residual, codes.detach())
                terms[f"codebook_{level}"] = F.mse_loss(codes, residual.detach())
                total = total + ESTIMATORS[self.gradient](residual, codes)
                residual = residual - codes.detach()
            sums = {name: torch.stack([terms[f"{name}_{i}"] for i in range(self.num_levels)]).sum() for name in ("commitment", "codebook")}
            weights = {"commitment": self.beta if self.beta_on == "commitment" else 1.0}
            weights["codebook"] = 1.0 if self.beta_on == "commitment" else self.beta
            loss = sum(weights[name] * sums[name] for name in weights)
        return QuantizerOutput(
            quantized=total.to(latents.dtype), indices=torch.stack(indices, dim=-1), loss=torch.as_tensor(loss), terms=sums | terms
        )
