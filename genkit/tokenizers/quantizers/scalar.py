"""Quantizers without a table: every channel is rounded by itself.

FSQ: Mentzer et al. 2023, "Finite Scalar Quantization" (arXiv 2309.15505). LFQ: Yu et al. 2023, "Language Model Beats Diffusion" (MAGVIT-2,
arXiv 2310.05737).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from genkit.tokenizers.quantizers.base import VectorQuantizerBase
from genkit.tokenizers.quantizers.output import QuantizerOutput

MOST_BITS = 18  # of a codebook that is listed, or whose entropies are computed over all codes
SMALL = 1e-5  # least argument of the logarithm in entropies


class FSQ(VectorQuantizerBase):
    """Channel i rounded to one of L_i steps of [-1, 1], straight through; there is nothing to learn and no loss.

    b = tanh(z + atanh(o / h)) h - o, h = (L - 1)(1 + 1e-3) / 2, o = 1/2 for even L, else 0; code = round(b) / floor(L / 2)

    Args:
        levels: L of each channel, at least 2; their number is d, their product k. [8, 5, 5, 5] is 1,000 codes, [8, 8, 8, 5, 5, 5] 64,000.

    Raises:
        ValueError: for fewer than two levels in a channel.

    Example:
        >>> FSQ([8, 5, 5, 5]).codebook_size
        1000
    """

    def __init__(self, levels: Sequence[int]) -> None:
        if not levels or min(levels) < 2:
            raise ValueError(f"fsq: every channel needs at least 2 levels, got {list(levels)}.")
        super().__init__(math.prod(levels), len(levels))
        self.levels = list(levels)
        counts = torch.tensor(self.levels)
        self.register_buffer("halves", (counts - 1) * (1 + 1e-3) / 2, persistent=False)
        self.register_buffer("offsets", torch.where(counts % 2 == 0, 0.5, 0.0), persistent=False)
        self.register_buffer("widths", counts // 2, persistent=False)
        self.register_buffer("radix", torch.cat([torch.ones(1, dtype=torch.long), counts.cumprod(0)[:-1]]), persistent=False)

    def bounded(self, latents: Tensor) -> Tensor:
        """Return latents [..., d] squeezed into the range of their levels, before rounding."""
        halves, offsets = self._buffer("halves"), self._buffer("offsets")
        return torch.tanh(latents + torch.atanh(offsets / halves)) * halves - offsets

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codes [..., d] in [-1, 1] of indices [...]; the first channel changes fastest."""
        widths = self._buffer("widths")
        digits = indices[..., None] // self._buffer("radix") % torch.tensor(self.levels, device=indices.device)
        return (digits - widths) / widths

    def search(self, latents: Tensor) -> Tensor:
        """Return the indices [n] of latents [n, d]."""
        return self._index(self.bounded(latents.float()).round())

    def set_codes(self, codes: Tensor) -> None:
        """Refuse: the codes are a grid.

        Raises:
            ValueError: always.
        """
        raise ValueError("fsq has no table to write; its codes are a grid. Leave out quantize_after.")

    def forward(self, latents: Tensor, gumbel: Tensor | None = None, temperature: float = 1.0) -> QuantizerOutput:
        """Round latents [..., d]; `quantized` are codes in [-1, 1].

        Raises:
            ValueError: if the last axis is not d, or noise is given.
        """
        self.check(latents, None, temperature)
        _no_noise(gumbel, "fsq")
        with torch.autocast(latents.device.type, enabled=False):
            bounded = self.bounded(latents.float())
            steps = bounded.round()
            quantized = (bounded + (steps - bounded).detach()) / self._buffer("widths")
            indices = self._index(steps)
        zero = latents.new_zeros((), dtype=torch.float32)
        return QuantizerOutput(quantized=quantized.to(latents.dtype), indices=indices, loss=zero, terms={"commitment": zero})

    def _index(self, steps: Tensor) -> Tensor:
        return ((steps.long() + self._buffer("widths")) * self._buffer("radix")).sum(-1)

    def _buffer(self, name: str) -> Tensor:
        found: Tensor = self.get_buffer(name)
        return found


class LFQ(VectorQuantizerBase):
    """The sign of every channel, straight through: k = 2^d codes of +-1 without a table.

    Loss: entropy_weight * (mean entropy of a latent's codes - diversity * entropy of the codes in use) + beta * mean (sg q - z)^2, the
    codes of a latent being softmax(2 inverse_temperature z . q) over all of them.

    Args:
        dim: d, bits of a code.
        entropy_weight: of both entropies.
        diversity: weight of the second.
        inverse_temperature: of the softmax.
        group_bits: bits whose entropies are computed together; d if None. The entropies of groups are added, which is exact for those of
            single latents and keeps large codebooks small.
        beta: weight of the commitment.

    Raises:
        ValueError: for groups that do not divide d, or are too large to list.
    """

    learns_by_gradient = False

    def __init__(
        self,
        dim: int,
        *,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        inverse_temperature: float = 100.0,
        group_bits: int | None = None,
        beta: float = 0.25,
    ) -> None:
        super().__init__(2 ** max(dim, 0), dim, beta=beta)
        bits = dim if group_bits is None else group_bits
        if bits < 1 or dim % bits or bits > MOST_BITS:
            raise ValueError(f"lfq: group_bits must divide dim={dim} and be at most {MOST_BITS}, got {bits}.")
        self.entropy_weight, self.diversity, self.inverse_temperature, self.group_bits = (
            entropy_weight,
            diversity,
            inverse_temperature,
            bits,
        )
        self.register_buffer("radix", 2 ** torch.arange(dim - 1, -1, -1), persistent=False)

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codes [..., d] of +-1 of indices [...]; the first channel is the most significant bit."""
        return (indices[..., None] // self.get_buffer("radix") % 2).float() * 2 - 1

    def search(self, latents: Tensor) -> Tensor:
        """Return the indices [n] of latents [n, d]."""
        return ((latents > 0).long() * self.get_buffer("radix")).sum(-1)

    def set_codes(self, codes: Tensor) -> None:
        """Refuse: the codes are signs.

        Raises:
            ValueError: always.
        """
        raise ValueError("lfq has no table to write; its codes are signs. Leave out quantize_after.")

    def forward(self, latents: Tensor, gumbel: Tensor | None = None, temperature: float = 1.0) -> QuantizerOutput:
        """Take the signs of latents [..., d]; terms "commitment", "entropy" (of a latent), "diversity" (of the codes in use), in nats.

        Raises:
            ValueError: if the last axis is not d, or noise is given.
        """
        self.check(latents, None, temperature)
        _no_noise(gumbel, "lfq")
        with torch.autocast(latents.device.type, enabled=False):
            raw = latents.float()
            codes = torch.where(raw > 0, 1.0, -1.0)
            quantized = raw + (codes - raw).detach()
            commitment = (raw - codes).square().mean()
            entropy, diversity = self.entropies(raw.reshape(-1, self.dim))
            loss = self.entropy_weight * (entropy - self.diversity * diversity) + self.beta * commitment
            indices = self.search(raw.detach())
        terms = {"commitment": commitment, "entropy": entropy, "diversity": diversity}
        return QuantizerOutput(quantized=quantized.to(latents.dtype), indices=indices, loss=loss, terms=terms)

    def entropies(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean entropy of the codes of a latent, and the entropy of their mean, for latents [n, d]; nats."""
        logits = 2 * self.inverse_temperature * latents.unflatten(-1, (-1, self.group_bits))
        places = torch.arange(self.group_bits - 1, -1, -1, device=latents.device)
        signs = (torch.arange(2**self.group_bits, device=latents.device)[:, None] >> places & 1).float() * 2 - 1
        p = (logits @ signs.T).softmax(-1)  # n, groups, codes of a group
        return _entropy(p).sum(-1).mean(), _entropy(p.mean(0)).sum()


def _entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp_min(SMALL).log()).sum(-1)


def _no_noise(gumbel: Tensor | None, name: str) -> None:
    if gumbel is not None:
        raise ValueError(f"{name} draws no codes; leave out gumbel.")
