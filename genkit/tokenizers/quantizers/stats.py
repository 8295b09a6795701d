"""Codebook health over a whole data set: how many codes are used, how evenly, and which are dead."""

from __future__ import annotations

import torch
from torch import Tensor


class CodebookStats:
    """Count codes over data and ranks.

    Args:
        codebook_size: number of codes k.

    Example:
        >>> stats = CodebookStats(4)
        >>> stats.update(torch.tensor([0, 0, 1, 1]))
        >>> stats.compute()["utilisation"], round(stats.compute()["perplexity"], 3)
        (0.5, 2.0)
    """

    def __init__(self, codebook_size: int) -> None:
        if codebook_size < 1:
            raise ValueError(f"CodebookStats: codebook_size must be at least 1, got {codebook_size}.")
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)

    @property
    def codebook_size(self) -> int:
        """Number of codes k."""
        return self.counts.numel()

    def update(self, indices: Tensor) -> None:
        """Add the codes in indices [...] (int64, any device; the counts move there).

        Raises:
            ValueError: if an index lies outside the codebook.
        """
        self.counts = self.counts.to(indices.device)
        counted = torch.bincount(indices.reshape(-1), minlength=self.codebook_size)
        if counted.numel() > self.codebook_size:
            raise ValueError(f"CodebookStats: index {counted.numel() - 1} is outside the codebook of {self.codebook_size} codes.")
        self.counts += counted

    def merge(self, other: CodebookStats) -> None:
        """Add another object's counts.

        Raises:
            ValueError: if the codebook sizes differ.
        """
        if other.codebook_size != self.codebook_size:
            raise ValueError(f"CodebookStats: cannot merge counts of {other.codebook_size} codes into {self.codebook_size}.")
        self.counts = self.counts + other.counts.to(self.counts.device)

    def all_reduce(self) -> None:
        """Add up the counts of all ranks of the default process group; without one there is nothing to do."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.counts)

    def dead_codes(self) -> Tensor:
        """Return the indices [m] of codes never used."""
        return torch.nonzero(self.counts == 0).flatten()

    def compute(self) -> dict[str, float]:
        """Return the health of the codebook.

        Returns:
            utilisation: share of codes used at least once; perplexity: exp of the entropy (k = all equally often, 1 = a single code);
            entropy_bits; dead: codes never used; count: tokens seen.
        """
        counts = self.counts.double().cpu()
        total = counts.sum().item()
        p = counts / max(total, 1.0)
        entropy = -(p * p.clamp_min(1e-300).log()).sum()
        return {
            "utilisation": (counts > 0).double().mean().item(),
            "perplexity": entropy.exp().item() if total else 0.0,
            "entropy_bits": (entropy / torch.log(torch.tensor(2.0, dtype=torch.float64))).item(),
            "dead": float((counts == 0).sum().item()),
            "count": total,
        }
