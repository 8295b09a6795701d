"""The interface of a vector quantizer, and what all quantizers with a codebook share."""

from __future__ import annotations

from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.checks import choose
from genkit.tokenizers.quantizers.gradient import ESTIMATORS
from genkit.tokenizers.quantizers.kmeans import kmeans
from genkit.tokenizers.quantizers.output import QuantizerOutput

FITS = ("kmeans", "moments")


def drawn(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return draws [k, d] from the normal distribution with mean and covariance of points [n, d]."""
    mean, covariance = points.double().mean(0), torch.cov(points.double().T).reshape(points.shape[1], -1)
    values, vectors = torch.linalg.eigh(covariance)
    noise = torch.randn(count, points.shape[1], generator=generator, dtype=torch.float64).to(points.device)
    return (mean + noise * values.clamp_min(0).sqrt() @ vectors.T).float()


class VectorQuantizerBase(nn.Module):
    """Latents [..., d] to the nearest of k codes and back.

    Loss: beta * mean (sg q - z)^2 + mean (q - sg z)^2, means over all elements.

    A subclass says which codes there are: `search` finds the nearest, `lookup` returns codes with their gradient. Where codes are not
    learned by gradient (`learns_by_gradient`), the loss is the commitment term alone.

    Args:
        codebook_size: number of codes k.
        dim: width d of latents and codes.
        beta: weight of one of the two loss terms.
        beta_on: the term that beta weighs: "commitment" (latent towards code, as published) or "codebook" (some official classes' default).
        gradient: "straight_through" or "rotation".

    Raises:
        ValueError: if a size is not positive or an option is unknown.
    """

    learns_by_gradient = True

    def __init__(
        self, codebook_size: int, dim: int, *, beta: float = 0.25, beta_on: str = "commitment", gradient: str = "straight_through"
    ) -> None:
        super().__init__()
        if codebook_size < 1 or dim < 1:
            raise ValueError(f"quantizer: codebook_size and dim must be at least 1, got {codebook_size} and {dim}.")
        self.codebook_size, self.dim, self.beta = codebook_size, dim, beta
        self.beta_on = choose(beta_on, ("commitment", "codebook"), "beta_on")
        self.gradient = choose(gradient, ESTIMATORS, "gradient estimator")

    def search(self, latents: Tensor) -> Tensor:
        """Return the indices [n] of the codes nearest to latents [n, d] (fp32, as `prepare` gives them)."""
        raise NotImplementedError

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codes [..., d] (fp32) of indices [...], with gradient to the parameters that make them.

        Raises:
            IndexError: if an index is outside the codebook (raised by the embedding on CPU).
        """
        raise NotImplementedError

    def codebook(self) -> Tensor:
        """Return all effective codes [k, d]."""
        device = next(chain(self.parameters(), self.buffers())).device
        return self.lookup(torch.arange(self.codebook_size, device=device))

    @torch.no_grad()
    def fit(self, latents: Tensor, generator: torch.Generator, method: str = "kmeans") -> None:
        """Start the codes where latents [n, d] are: at their k-means centres, or drawn from a normal distribution with their moments.

        A codebook that starts from noise while the encoder is still blank loses most of its codes in the first hundred steps: all
        latents are nearest to a few. Train without quantization for a while, then call this.

        Args:
            latents: [n, d] of the data.
            generator: CPU generator; the result depends on it and the latents only.
            method: "kmeans", which needs n well above the number of codes, or "moments" for codebooks of any size.

        Raises:
            ValueError: if there are fewer different latents than k-means has centres, or the method is unknown.
        """
        choose(method, FITS, "way to fit codes")
        start = kmeans if method == "kmeans" else drawn
        self.set_codes(start(self.prepare(latents.float()), self.codebook_size, generator))

    def set_codes(self, codes: Tensor) -> None:
        """Make the effective codes equal to codes [k, d]."""
        raise NotImplementedError

    def prepare(self, latents: Tensor) -> Tensor:
        """Return the latents as they are compared with codes; fp32."""
        return latents

    def draw(self, latents: Tensor, gumbel: Tensor, temperature: float) -> Tensor:
        """Return argmax over codes of -|z - q| / temperature + gumbel for latents [n, d] and noise [n, k]: [n].

        Source: Chen et al. 2024 (MeshAnything, arXiv 2406.10163), for decoders that learn to mend wrong codes.
        """
        distances = torch.cdist(latents, self.codebook().detach().float(), compute_mode="donot_use_mm_for_euclid_dist")
        return (gumbel.reshape(-1, self.codebook_size) - distances / temperature).argmax(1)

    def forward(self, latents: Tensor, gumbel: Tensor | None = None, temperature: float = 1.0) -> QuantizerOutput:
        """Quantize latents [..., d]; search and loss run in fp32, `quantized` has the latents' dtype.

        Args:
            latents: [..., d].
            gumbel: standard Gumbel noise [..., k]: codes are drawn, see `draw`. The nearest ones if None.
            temperature: of the draw, above 0; the lower, the nearer to the nearest code.

        Raises:
            ValueError: if the last axis is not `dim`, the noise has another shape, or the temperature is not positive.
        """
        self.check(latents, gumbel, temperature)
        with torch.autocast(latents.device.type, enabled=False):
            raw = latents.float()
            z = self.prepare(raw)
            flat = z.detach().reshape(-1, self.dim)
            found = self.search(flat) if gumbel is None else self.draw(flat, gumbel, temperature)
            indices = found.view(latents.shape[:-1])
            codes = self.lookup(indices)
            commitment, codebook = F.mse_loss(z, codes.detach()), F.mse_loss(codes, z.detach())
            weights = (self.beta, 1.0) if self.beta_on == "commitment" else (1.0, self.beta)
            loss = weights[0] * commitment + weights[1] * codebook if self.learns_by_gradient else weights[0] * commitment
            quantized = ESTIMATORS[self.gradient](raw, codes).to(latents.dtype)
        return QuantizerOutput(quantized=quantized, indices=indices, loss=loss, terms={"commitment": commitment, "codebook": codebook})

    def check(self, latents: Tensor, gumbel: Tensor | None, temperature: float) -> None:
        """Refuse latents, noise and temperatures that do not fit.

        Raises:
            ValueError: naming them.
        """
        if latents.shape[-1] != self.dim:
            raise ValueError(f"quantizer: latents must be [..., d={self.dim}], got {list(latents.shape)}.")
        wanted = (*latents.shape[:-1], self.codebook_size)
        if gumbel is not None and (tuple(gumbel.shape) != wanted or not temperature > 0):
            raise ValueError(f"quantizer: gumbel must be {list(wanted)} and temperature above 0, got {list(gumbel.shape)}, {temperature}.")
