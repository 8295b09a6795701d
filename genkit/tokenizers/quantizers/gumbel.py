"""Gumbel-softmax codes: in training a mixture of codes, whose weights sharpen as the temperature falls.

y = softmax((l + noise) / tau), l_j = -|z - e_j|^2 of unit vectors, q = sum of y_j e_j; loss = KL(softmax l || uniform)

Source: Jang et al. 2016 (arXiv 1611.01144), in the form of the ViT-VQGAN code. Its released code draws noise in evaluation too, so that a
picture's codes vary; here noise is drawn in training only.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.tokenizers.quantizers.base import VectorQuantizerBase
from genkit.tokenizers.quantizers.output import QuantizerOutput
from genkit.tokenizers.quantizers.search import nearest_codes


class GumbelQuantizer(VectorQuantizerBase):
    """Unit codes, mixed in training and picked in evaluation.

    Args:
        codebook_size: number of codes k.
        dim: width d.
        temperature: tau; lower it while training by assigning `temperature`.
        kl_weight: of the loss.

    Raises:
        ValueError: for a temperature that is not positive.
    """

    def __init__(self, codebook_size: int, dim: int, *, temperature: float = 1.0, kl_weight: float = 1.0) -> None:
        super().__init__(codebook_size, dim)
        if not temperature > 0:
            raise ValueError(f"gumbel quantizer: temperature must be above 0, got {temperature}.")
        self.temperature, self.kl_weight = temperature, kl_weight
        self.embedding = nn.Embedding(codebook_size, dim)

    @torch.no_grad()
    def set_codes(self, codes: Tensor) -> None:
        """Write codes [k, d] into the table."""
        self.embedding.weight.copy_(codes)

    def prepare(self, latents: Tensor) -> Tensor:
        """Return unit latents [..., d]."""
        return F.normalize(latents, dim=-1)

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the unit codes [..., d] of indices [...]."""
        return self.prepare(F.embedding(indices, self.embedding.weight.float()))

    @torch.no_grad()
    def search(self, latents: Tensor) -> Tensor:
        """Return the indices [n] of the codes nearest to unit latents [n, d]."""
        return nearest_codes(latents, self.embedding.weight, project=self.prepare)

    def forward(self, latents: Tensor, gumbel: Tensor | None = None, temperature: float | None = None) -> QuantizerOutput:
        """Quantize latents [..., d].

        Args:
            latents: [..., d].
            gumbel: standard Gumbel noise [..., k]; if None drawn from torch's default generator in training, and none in evaluation.
            temperature: tau of this call; the quantizer's own if None.

        Raises:
            ValueError: if shapes do not fit, or the temperature is not positive.
        """
        tau = self.temperature if temperature is None else temperature
        self.check(latents, gumbel, tau)
        with torch.autocast(latents.device.type, enabled=False):
            z, codes = self.prepare(latents.float()), self.prepare(self.embedding.weight.float())
            logits = 2 * z @ codes.T - z.square().sum(-1, keepdim=True) - codes.square().sum(-1)
            if gumbel is None and self.training:
                gumbel = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-20, 1 - 1e-7)))
            weights = ((logits if gumbel is None else logits + gumbel) / tau).softmax(-1)
            indices = weights.argmax(-1)
            if not self.training:
                weights = F.one_hot(indices, self.codebook_size) - weights.detach() + weights
            log_p = logits.log_softmax(-1)
            divergence = (log_p.exp() * (log_p + math.log(self.codebook_size))).sum(-1).mean()
        return QuantizerOutput(
            quantized=(weights @ codes).to(latents.dtype), indices=indices, loss=self.kl_weight * divergence, terms={"kl": divergence}
        )
