"""Further scores on features and embeddings: CLIP score, Vendi score, memorisation-informed FID, sliced distances.

Letters: n real, m generated samples, d features, p directions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.checks import check_shape


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """Return the cosine of each pair of embeddings [n, d] and [n, d]: [n] float64."""
    sizes = check_shape(images, "cosines: images", "n d")
    check_shape(texts, "cosines: texts", "n d", **sizes)
    return (F.normalize(images.double(), dim=1) * F.normalize(texts.double(), dim=1)).sum(1)


def clip_score(images: Tensor, texts: Tensor) -> float:
    """Return 100 times the mean cosine of picture and text, cut at 0 after the mean (as torchmetrics)."""
    return max(100 * float(cosines(images, texts).mean()), 0.0)


def clipscore_pairs(images: Tensor, texts: Tensor, weight: float = 2.5) -> Tensor:
    """Return weight * max(cosine, 0) of each pair [n] (Hessel et al. 2021, arXiv 2104.08718)."""
    return weight * cosines(images, texts).clamp_min(0)


def vendi_score(features: Tensor) -> float:
    """Return the Vendi score of order 1 under the cosine kernel: exp of the entropy of the eigenvalues of K / n.

    Source: Friedman and Dieng 2022 (arXiv 2210.02410). 1 if all samples are equal, n if all are orthogonal.
    """
    check_shape(features, "vendi_score: features", "n d")
    x = F.normalize(features.double(), dim=1) / len(features) ** 0.5
    values = torch.linalg.svdvals(x).square()
    values = values[values > 0]
    return float((-(values * values.log()).sum()).exp())


def least_cosine_distances(queries: Tensor, references: Tensor) -> Tensor:
    """Return min over references of 1 - |cos| for each query; rows of zeros are left out of both."""
    x, y = (rows.double()[rows.abs().sum(1) > 0] for rows in (queries, references))
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    return torch.cat([1 - (part @ y.T).abs().amax(1) for part in x.split(4096)])


def memorisation_informed_fid(fid: float, real: Tensor, fake: Tensor, eps: float = 0.1, *, over_real: bool = False) -> float:
    """Return FID / d, d the mean distance to the nearest training sample, or 1 where that is at least eps.

    Args:
        fid: Frechet distance of the two sets.
        real: features [n, d] of the training samples.
        fake: features [m, d].
        eps: distance from which a set counts as not memorised.
        over_real: average over real samples the distance to the nearest generated one, as torchmetrics does; the paper averages over
            generated samples.

    Source: Bai et al. 2021 (arXiv 2106.03062).
    """
    distance = float((least_cosine_distances(real, fake) if over_real else least_cosine_distances(fake, real)).mean())
    return fid / ((distance if distance < eps else 1.0) + 1e-14)


def sliced_distance(real: Tensor, fake: Tensor, num_directions: int = 1000, seed: int = 2020) -> float:
    """Return 3 d times the mean squared difference of sorted projections on random directions (torch-fidelity's MIND).

    The larger set is first cut to the size of the smaller by a random choice of rows; the directions come from the same generator.
    """
    dim = check_shape(real, "sliced_distance: real", "n d")["d"]
    check_shape(fake, "sliced_distance: fake", "m d", d=dim)
    generator = torch.Generator().manual_seed(seed)
    size = min(len(real), len(fake))
    x, y = fake, real
    if len(x) > size:
        x = x[torch.randperm(len(x), generator=generator)[:size]]
    if len(y) > size:
        y = y[torch.randperm(len(y), generator=generator)[:size]]
    directions = F.normalize(torch.randn(num_directions, dim, generator=generator), dim=1).double()
    total = 0.0
    for part in directions.split(64):
        first, second = ((rows.double() @ part.T).sort(0).values for rows in (x, y))
        total += float((first - second).square().mean(0).sum())
    return 3 * dim * total / num_directions


def approximate_sliced_wasserstein(real: Tensor, fake: Tensor) -> float:
    """Return sqrt(|m1 - m2|^2 / d + (s1 - s2)^2), s^2 the mean squared distance to the mean over d (dgm-eval)."""
    dim = real.shape[1]
    means = [rows.double().mean(0) for rows in (real, fake)]
    spreads = [((rows.double() - mean).square().sum(1).mean() / dim).sqrt() for rows, mean in zip((real, fake), means, strict=True)]
    return float(((means[0] - means[1]).square().sum() / dim + (spreads[0] - spreads[1]) ** 2).sqrt())
