"""Data order and random streams as pure functions of (seed, step): a resumed run needs no saved position."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler


def fold_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that is a function of all parts: nearby parts give unrelated streams."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class GlobalBatchSampler(Sampler[list[int]]):
    """Batches cut from an endless row of permutations, one permutation per pass over the data.

    The batch of step s holds places s*B .. (s+1)*B - 1 of that row, so every sample comes exactly once per pass, no sample is
    dropped, and the batch is a function of (seed, s) alone. Process r takes the r-th of `world` contiguous slices.

    Args:
        length: samples in the data set.
        batch_size: B, samples per step over all processes.
        seed: of the permutations.
        step0: first step to give.
        stop: step to end before; None for no end.
        rank: process index.
        world: number of processes; must divide batch_size.

    Raises:
        ValueError: if the data set is empty or the batch cannot be divided.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, step0: int = 0, stop: int | None = None, rank: int = 0, world: int = 1
    ) -> None:
        if length < 1:
            raise ValueError("GlobalBatchSampler: the data set is empty; check its path and split.")
        if batch_size % world:
            raise ValueError(f"GlobalBatchSampler: batch_size must be a multiple of the number of processes ({world}), got {batch_size}.")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.step0, self.stop, self.rank, self.world = step0, stop, rank, world
        self._epochs: dict[int, Tensor] = {}

    def _permutation(self, epoch: int) -> Tensor:
        """Return the order of one pass [length], keeping the two latest."""
        if epoch not in self._epochs:
            self._epochs = {e: order for e, order in self._epochs.items() if e == epoch - 1}
            generator = torch.Generator().manual_seed(fold_seed(self.seed, "epoch", epoch))
            self._epochs[epoch] = torch.randperm(self.length, generator=generator)
        return self._epochs[epoch]

    def indices(self, step: int) -> Tensor:
        """Return the sample indices [batch_size] of the whole batch of a step, int64."""
        place, end = step * self.batch_size, (step + 1) * self.batch_size
        parts = []
        while place < end:
            epoch, offset = divmod(place, self.length)
            part = self._permutation(epoch)[offset : offset + end - place]
            parts.append(part)
            place += len(part)
        return torch.cat(parts)

    def __iter__(self) -> Iterator[list[int]]:
        step, local = self.step0, self.batch_size // self.world
        while self.stop is None or step < self.stop:
            yield self.indices(step)[self.rank * local : (self.rank + 1) * local].tolist()
            step += 1
