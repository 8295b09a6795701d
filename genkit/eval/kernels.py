"""Maximum mean discrepancies: kernel inception distance (KID) and CMMD, in float64.

KID is the unbiased squared MMD under k(x, y) = (x.y / d + 1)^3, averaged over random subsets; slightly negative values are legal. CMMD is
the biased one under exp(-|x - y|^2 / (2 sigma^2)) on unit CLIP embeddings, times 1000.

Tools draw their subsets in different ways from different generators; `SUBSETS` names them.

Source: Binkowski et al. 2018 (arXiv 1801.01401); Jayasumana et al. 2024 (arXiv 2401.09603).
Letters: n, m samples, d features, s subsets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.checks import check_shape, choose
from genkit.eval.distances import distance_blocks

Kernel = Callable[[Tensor, Tensor], Tensor]
Draws = Iterator[tuple[Tensor, Tensor]]


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """Return (x.y / d + 1)^3 for rows [n, d] and [m, d]: [n, m]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(sigma: float) -> Kernel:
    """Return the kernel exp(-|x - y|^2 / (2 sigma^2))."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([(-block.square() / (2 * sigma**2)).exp() for _, block in distance_blocks(x, y)])

    return kernel


def unbiased_mmd(x: Tensor, y: Tensor, kernel: Kernel = polynomial) -> float:
    """Return the unbiased squared MMD of rows [n, d] and [m, d]; each set's own sum leaves the diagonal out."""
    x, y = x.double(), y.double()
    own = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y))]
    return float(own[0] + own[1] - 2 * kernel(x, y).mean())


def _numpy_draws(seed: int, first_is_fake: bool, limit: bool) -> Callable[[int, int, int, int], Draws]:
    def draw(num_fake: int, num_real: int, subsets: int, size: int) -> Draws:
        rng = np.random.RandomState(seed)
        size = min(num_fake, num_real, size) if limit else size
        for _ in range(subsets):
            counts = (num_fake, num_real) if first_is_fake else (num_real, num_fake)
            first, second = (torch.from_numpy(rng.choice(count, size, replace=False)) for count in counts)
            yield (first, second) if first_is_fake else (second, first)

    return draw


def _torch_draws(seed: int) -> Callable[[int, int, int, int], Draws]:
    def draw(num_fake: int, num_real: int, subsets: int, size: int) -> Draws:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(subsets):
            real = torch.randperm(num_real, generator=generator)[:size]
            yield torch.randperm(num_fake, generator=generator)[:size], real

    return draw


# How a tool draws (subset of fake, subset of real), given its seed.
SUBSETS: dict[str, Callable[[int], Callable[[int, int, int, int], Draws]]] = {
    "torch-fidelity": lambda seed: _numpy_draws(seed, first_is_fake=True, limit=False),
    "clean-fid": lambda seed: _numpy_draws(seed, first_is_fake=True, limit=True),
    "dgm-eval": lambda seed: _numpy_draws(seed, first_is_fake=False, limit=False),
    "torchmetrics": _torch_draws,
}


def kid(
    real: Tensor,
    fake: Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    *,
    draws: str = "torch-fidelity",
    seed: int = 2020,
    kernel: Kernel = polynomial,
) -> Tensor:
    """Compute the kernel inception distance on random subsets.

    Args:
        real: features [n, d].
        fake: features [m, d].
        subsets: s.
        subset_size: samples of each set in a subset.
        draws: whose way of drawing subsets, a key of `SUBSETS`; clean-fid shrinks the subset to the smaller set.
        seed: of the draws.
        kernel: function of two sets of rows.

    Returns:
        [s] float64, one value per subset; the figure is their mean.

    Raises:
        ValueError: if a set is smaller than a subset.
    """
    dim = check_shape(real, "kid: real", "n d")["d"]
    check_shape(fake, "kid: fake", "m d", d=dim)
    choose(draws, SUBSETS, "way to draw KID subsets")
    least = min(len(real), len(fake))
    if (draws != "clean-fid" and least < subset_size) or least < 2:
        raise ValueError(
            f"kid: each set needs at least subset_size={subset_size} samples, got {len(real)} real and {len(fake)} fake; lower it."
        )
    pairs = SUBSETS[draws](seed)(len(fake), len(real), subsets, subset_size)
    return torch.tensor([unbiased_mmd(fake[i], real[j], kernel) for i, j in pairs], dtype=torch.float64)


def cmmd(real: Tensor, fake: Tensor, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """Compute CMMD on embeddings [n, d] and [m, d], which are scaled to unit length here.

    Each mean of exp(-z) is taken as 1 + mean of expm1(-z): the three means are near 1 and differ from the fourth digit on.
    """
    x, y = F.normalize(real.double(), dim=1), F.normalize(fake.double(), dim=1)

    def below_one(a: Tensor, b: Tensor) -> Tensor:
        total = sum((-block.square() / (2 * sigma**2)).expm1().sum() for _, block in distance_blocks(a, b))
        return torch.as_tensor(total) / (len(a) * len(b))

    return float(scale * (below_one(x, x) + below_one(y, y) - 2 * below_one(x, y)))
