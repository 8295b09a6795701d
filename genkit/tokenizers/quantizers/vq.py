"""Vector quantization with a learned codebook, plain (VQ-VAE) or on the unit sphere (ViT-VQGAN)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.tokenizers.quantizers.base import VectorQuantizerBase
from genkit.tokenizers.quantizers.search import nearest_codes


class VectorQuantizer(VectorQuantizerBase):
    """Nearest row of a table that is learned by gradient.

    Args:
        codebook_size: number of codes k.
        dim: width d.
        normalize: compare and return unit vectors: z/|z| against e/|e|, so the nearest code is the one of largest cosine. The
            gradient estimator still hands the decoder's gradient to the un-normalised latent, as published.
        **options: beta, beta_on, gradient; see `VectorQuantizerBase`.

    Source: plain: van den Oord et al. 2017 (arXiv 1711.00937); normalised: Yu et al. 2022, section 3.2 (arXiv 2110.04627).
    """

    def __init__(self, codebook_size: int, dim: int, *, normalize: bool = False, **options: object) -> None:
        super().__init__(codebook_size, dim, **options)  # type: ignore[arg-type]
        self.normalize = normalize
        self.embedding = nn.Embedding(codebook_size, dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the table: N(0, 1) on the sphere (only directions matter), U(-1/k, 1/k) otherwise."""
        if self.normalize:
            nn.init.normal_(self.embedding.weight)
        else:
            nn.init.uniform_(self.embedding.weight, -1 / self.codebook_size, 1 / self.codebook_size)

    @torch.no_grad()
    def set_codes(self, codes: Tensor) -> None:
        """Write codes [k, d] into the table."""
        self.embedding.weight.copy_(codes)

    def prepare(self, latents: Tensor) -> Tensor:
        """Return latents [..., d], of unit norm if this quantizer normalises."""
        return F.normalize(latents, dim=-1) if self.normalize else latents

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codes [..., d] of indices [...]."""
        return self.prepare(F.embedding(indices, self.embedding.weight.float()))

    @torch.no_grad()
    def search(self, latents: Tensor) -> Tensor:
        """Return the indices [n] of the codes nearest to latents [n, d]."""
        return nearest_codes(latents, self.embedding.weight, project=self.prepare)
