"""Points of a set that lie far from each other.

Letters: b sets, p points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.checks import check_shape


@torch.no_grad()
def farthest_points(points: Tensor, count: int, start: Tensor) -> Tensor:
    """Pick points greedily, each the farthest from all picked before; the first index where several are as far.

    Args:
        points: [b, p, 3].
        count: how many, at most p.
        start: [b] int64, the first pick.

    Returns:
        [b, count] int64.

    Raises:
        ValueError: if there are fewer points.
    """
    sizes = check_shape(points, "farthest_points: points", "b p d")
    if not 1 <= count <= sizes["p"]:
        raise ValueError(f"farthest_points: count must lie in 1 .. {sizes['p']} (the points), got {count}.")
    picked = torch.empty(sizes["b"], count, dtype=torch.long, device=points.device)
    nearest = points.new_full(points.shape[:2], float("inf"))
    current = start.to(points.device)
    for i in range(count):
        picked[:, i] = current
        here = points.gather(1, current[:, None, None].expand(-1, 1, sizes["d"]))
        nearest = torch.minimum(nearest, (points - here).square().sum(-1))
        current = nearest.argmax(dim=1)
    return picked
