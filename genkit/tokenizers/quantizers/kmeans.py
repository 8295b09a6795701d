"""k-means with distance-weighted seeding: codes that start where the latents are.

Letters: n points, k centres, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.checks import check_shape
from genkit.tokenizers.quantizers.search import nearest_codes


@torch.no_grad()
def kmeans(points: Tensor, count: int, generator: torch.Generator, iterations: int = 10) -> Tensor:
    """Return cluster centres of points.

    Args:
        points: [n, d].
        count: number of centres k.
        generator: CPU generator of the seeding; the result depends on it and the points only.
        iterations: rounds of assignment and averaging.

    Returns:
        [k, d] fp32 on the points' device; a centre that loses all its points stays where it was.

    Raises:
        ValueError: if there are fewer different points than centres.

    Source: Lloyd 1982; seeding: Arthur and Vassilvitskii 2007, section 2.2.
    """
    check_shape(points, "kmeans: points", "n d")
    points = points.float()
    distance = torch.full((len(points),), torch.inf, dtype=torch.float32)
    chosen = int(torch.randint(len(points), (1,), generator=generator))
    centres = torch.empty(count, points.shape[1], device=points.device)
    for i in range(count):
        centres[i] = points[chosen]
        distance = torch.minimum(distance, (points - points[chosen]).square().sum(1).cpu())
        if i + 1 == count:
            break
        if not distance.any():
            raise ValueError(
                f"kmeans: {count} centres need as many different points, got {i + 1} different ones of {len(points)}; give more data."
            )
        chosen = int(torch.multinomial(distance, 1, generator=generator))
    for _ in range(iterations):
        nearest = nearest_codes(points, centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
    return centres
