"""Per-sample seeds: a sample depends on its own seed, not on its batch or its place in it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

Seeds = int | torch.Generator | Sequence[int | torch.Generator] | None


def resolve_seeds(generator: Seeds, count: int) -> list[int]:
    """Return one seed per sample.

    Args:
        generator: None for fresh seeds; an int or a `torch.Generator` draws one 63-bit seed per sample, one after the other, so that
            more samples do not change the first ones; a list gives the seeds directly (of a generator: its `initial_seed()`).
        count: number of samples, >= 1.

    Returns:
        `count` seeds.

    Raises:
        ValueError: if a list has another length or a seed is out of range.
        TypeError: for anything else.

    Example:
        >>> resolve_seeds([1, 2], 2)
        [1, 2]
        >>> resolve_seeds(7, 3)[:2] == resolve_seeds(torch.Generator().manual_seed(7), 2)
        True
    """
    if generator is None:
        return [secrets.randbits(63) for _ in range(count)]
    if isinstance(generator, torch.Generator):
        return [_draw(generator) for _ in range(count)]
    if isinstance(generator, int):
        source = torch.Generator().manual_seed(_checked(generator))
        return [_draw(source) for _ in range(count)]
    if isinstance(generator, Sequence) and not isinstance(generator, str):
        if len(generator) != count:
            raise ValueError(f"generator: a list needs one seed per sample, expected {count}, got {len(generator)}.")
        return [_checked(item.initial_seed() if isinstance(item, torch.Generator) else item) for item in generator]
    raise TypeError(f"generator must be None, an int, a torch.Generator or a list of these, got {type(generator).__name__}.")


def _draw(generator: torch.Generator) -> int:
    return int(torch.randint(0, 2**63 - 1, (1,), generator=generator, device=generator.device))


def _checked(seed: object) -> int:
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"generator: a seed must be an int or a torch.Generator, got {type(seed).__name__}.")
    if not 0 <= seed < 2**64:
        raise ValueError(f"generator: a seed must lie in 0 .. 2**64 - 1, got {seed}.")
    return seed


class SampleStreams:
    """One stream of random numbers per sample, on the CPU, drawn in shapes that do not depend on the batch.

    Args:
        seeds: one per sample.

    Example:
        >>> alone, together = SampleStreams([5]), SampleStreams([3, 5])
        >>> torch.equal(alone.uniform(4)[0], together.uniform(4)[1])
        True
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = list(seeds)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniform(self, *shape: int) -> Tensor:
        """Return the next uniform numbers in [0, 1) of every sample, [b, *shape] fp32 on the CPU."""
        return torch.stack([torch.rand(shape, generator=generator) for generator in self.generators])

    def normal(self, *shape: int) -> Tensor:
        """Return the next standard normal numbers of every sample, [b, *shape] fp32 on the CPU."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self.generators])


def gumbel(uniforms: Tensor) -> Tensor:
    """Return standard Gumbel noise -log(-log u) of uniforms in [0, 1); finite for u = 0 as well."""
    tiny = torch.finfo(uniforms.dtype).tiny
    return -torch.log(-torch.log(uniforms.clamp(min=tiny)))
