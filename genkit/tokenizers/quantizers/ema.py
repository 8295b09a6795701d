"""VQ whose codes are running means of the latents they were chosen for, with codes that nobody chooses moved to where latents are.

N_i <- g N_i + (1 - g) n_i, m_i <- g m_i + (1 - g) sum of z, e_i = m_i / N~_i, N~ = (N + eps) / (sum N + k eps) sum N

Source: van den Oord et al. 2017, appendix A.1 (arXiv 1711.00937); Razavi et al. 2019 (arXiv 1906.00446); revival as in Dhariwal et al. 2020
(Jukebox, arXiv 2005.00341).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.tokenizers.quantizers.base import VectorQuantizerBase
from genkit.tokenizers.quantizers.output import QuantizerOutput
from genkit.tokenizers.quantizers.search import nearest_codes


class EMAVectorQuantizer(VectorQuantizerBase):
    """Nearest row of a table that follows the latents.

    A step in training mode uses the codes as they were and moves them afterwards. Loss: beta * mean (sg q - z)^2.

    Args:
        codebook_size: number of codes k.
        dim: width d.
        decay: g in [0, 1).
        eps: of the smoothing.
        revive_below: codes chosen less than this often (in the running count) are moved to latents of the batch; 0 never.
        **options: beta, gradient; see `VectorQuantizerBase`.

    Raises:
        ValueError: for a decay outside [0, 1).
    """

    learns_by_gradient = False
    embedding: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(
        self, codebook_size: int, dim: int, *, decay: float = 0.99, eps: float = 1e-5, revive_below: float = 0.0, **options: object
    ) -> None:
        super().__init__(codebook_size, dim, **options)  # type: ignore[arg-type]
        if not 0 <= decay < 1:
            raise ValueError(f"ema quantizer: decay must lie in [0, 1), got {decay}.")
        self.decay, self.eps, self.revive_below = decay, eps, revive_below
        self.register_buffer("embedding", torch.empty(codebook_size, dim))
        self.register_buffer("counts", torch.ones(codebook_size))
        self.register_buffer("sums", torch.empty(codebook_size, dim))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the codes from N(0, 1/d); each counts once."""
        nn.init.normal_(self.embedding, std=self.dim**-0.5)
        self.counts.fill_(1)
        self.sums.copy_(self.embedding)

    @torch.no_grad()
    def set_codes(self, codes: Tensor) -> None:
        """Write codes [k, d]; each counts once."""
        self.embedding.copy_(codes)
        self.counts.fill_(1)
        self.sums.copy_(codes)

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codes [..., d] of indices [...]."""
        return F.embedding(indices, self.embedding.float())

    def codebook(self) -> Tensor:
        """Return all codes [k, d]."""
        return self.embedding.float()

    @torch.no_grad()
    def search(self, latents: Tensor) -> Tensor:
        """Return the indices [n] of the codes nearest to latents [n, d]."""
        return nearest_codes(latents, self.embedding)

    def forward(self, latents: Tensor, gumbel: Tensor | None = None, temperature: float = 1.0) -> QuantizerOutput:
        """Quantize latents [..., d], and in training mode let the codes follow them; see `VectorQuantizerBase.forward`."""
        out = super().forward(latents, gumbel, temperature)
        if self.training:
            self.follow(latents.detach().float().reshape(-1, self.dim), out.indices.reshape(-1))
        return out

    @torch.no_grad()
    def follow(self, latents: Tensor, indices: Tensor) -> None:
        """Move the codes towards the latents [n, d] that chose them [n]; of all processes, where there are several."""
        counts = torch.bincount(indices, minlength=self.codebook_size).to(latents.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, indices, latents.to(self.sums.dtype))
        _add_up(counts, sums)
        self.counts.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        self.sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        total = self.counts.sum()
        smoothed = (self.counts + self.eps) / (total + self.codebook_size * self.eps) * total
        self.embedding.copy_(self.sums / smoothed[:, None])
        if self.revive_below > 0:
            self._revive(latents)

    def _revive(self, latents: Tensor) -> None:
        """Move codes that are hardly chosen to latents drawn from the batch (with torch's default generator; of the first process)."""
        dead = (self.counts < self.revive_below).nonzero().flatten()
        if not len(dead):
            return
        chosen = latents[torch.randint(len(latents), (len(dead),), device="cpu").to(latents.device)].to(self.embedding.dtype)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(chosen, 0)
        self.embedding[dead] = chosen
        self.counts[dead] = self.revive_below
        self.sums[dead] = chosen * self.revive_below


def _add_up(*tensors: Tensor) -> None:
    """Add up tensors over all processes, in place; alone there is nothing to do."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
