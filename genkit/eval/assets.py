"""What the model card of a packaged picture model reports, as functions of pictures: faithfulness, caption retrieval, distances.

All features are EfficientNet-Lite0's; the tokenizers are trained against Lite1. Uncertainty comes from a bootstrap over objects (the 16
views of one object are not independent), 95 %.

Letters: n pictures, d features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genkit.data.views import ViewDataset
from genkit.eval.features import FeatureNetwork
from genkit.eval.frechet import GaussianStatistics, frechet_distance
from genkit.eval.reconstruction import psnr_per_image, ssim_per_image
from genkit.eval.retrieval import nearest

Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval and the number of objects behind it."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] over {self.count} objects"


def bootstrap_mean(values: Tensor, groups: Sequence[int], draws: int = 1000, seed: int = 0) -> Estimate:
    """Estimate the mean of values [n] with an interval that respects groups.

    Args:
        values: one number per picture.
        groups: the object each belongs to; whole objects are drawn again.
        draws: bootstrap samples.
        seed: of the draws.

    Raises:
        ValueError: if there is no value, or not one group per value.
    """
    if not len(values) or len(groups) != len(values):
        raise ValueError(f"bootstrap_mean: one group per value is needed, got {len(values)} values and {len(groups)} groups.")
    _, member = torch.tensor(list(groups)).unique(return_inverse=True)
    count = int(member.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, member, values.double())
    sizes = torch.bincount(member, minlength=count).double()
    drawn = torch.randint(count, (draws, count), generator=torch.Generator().manual_seed(seed))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate((sums.sum() / sizes.sum()).item(), low, high, count)


def batches(views: ViewDataset, size: int = 64) -> Iterator[Tensor]:
    """Yield all pictures of a data set in order, [b, 3, h, w] in [-1, 1]."""
    for start in range(0, len(views), size):
        yield torch.stack([views[i]["image"] for i in range(start, min(start + size, len(views)))])


def caption_hits(
    queries: Tensor, captions: Sequence[str], references: Tensor, views: ViewDataset, left_out: Tensor | None = None
) -> Tensor:
    """Tell for each query whether its nearest real view carries its caption.

    Args:
        queries: features [q, d].
        captions: what each query should show.
        references: features [n, d] of all views, in order.
        views: the data set of the references.
        left_out: view that each query must not find [q] int64, -1 for none.

    Returns:
        [q] of 0 and 1, float64.
    """
    found = nearest(queries, references, left_out).tolist()
    return torch.tensor([float(views.captions[views.object_of(j)] == c) for j, c in zip(found, captions, strict=True)], dtype=torch.float64)


@torch.no_grad()
def reconstruction_features(
    network: FeatureNetwork, views: ViewDataset, reconstruct: Reconstruct
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pass every view through a tokenizer.

    Args:
        network: the judging features.
        views: the pictures.
        reconstruct: pictures [b, 3, h, w] -> (reconstructions [b, 3, h, w], indices [b, h, w]).

    Returns:
        Features of the views and of their reconstructions [n, d], indices [n, h, w], PSNR [n] in dB, SSIM [n].
    """
    real, fake, codes, psnr, ssim = [], [], [], [], []
    for x in batches(views):
        sample, indices = reconstruct(x)
        sample = sample.float().clamp(-1, 1)
        real.append(network.features(x))
        fake.append(network.features(sample))
        codes.append(indices)
        psnr.append(psnr_per_image(sample, x))
        ssim.append(ssim_per_image(sample, x))
    return torch.cat(real), torch.cat(fake), torch.cat(codes), torch.cat(psnr), torch.cat(ssim)


def statistics_of(features: Tensor, source: str) -> GaussianStatistics:
    """Return the moments of features [n, d]."""
    stats = GaussianStatistics(features.shape[1], source)
    stats.update(features)
    return stats


def half_distance(features: Tensor, objects: Sequence[int], source: str, seed: int = 0) -> float:
    """Return the Frechet distance between the views of two random halves of the objects: what unlike content of one sort costs."""
    names = sorted(set(objects))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    first = {names[i] for i in order[: len(names) // 2]}
    is_first = torch.tensor([o in first for o in objects])
    return frechet_distance(statistics_of(features[is_first], source), statistics_of(features[~is_first], source))
