"""Training masks of ENAT and NAT, and the loss on masked tokens; pure functions of the draws, which are arguments.

Legend: b batch, n tokens of the grid, k masked tokens, K codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genkit.checks import check_shape


def mask_count(ratio: float, num_tokens: int) -> int:
    """Return clamp(round(n ratio), 1, n - 1): how many tokens of every sample are masked."""
    return min(max(round(num_tokens * ratio), 1), num_tokens - 1)


def mask_counts(ratios: Tensor, num_tokens: int) -> Tensor:
    """Return max(1, round(n ratio)) for every sample [b, 1] of ratios [b] in [0, 1]: NAT's samples are masked one by one."""
    return (ratios.double() * num_tokens).round().clamp_min(1).long()[:, None]


def random_mask(uniforms: Tensor, count: int | Tensor) -> Tensor:
    """Choose `count` random positions per row: those j with argsort(uniforms)[j] < count.

    The sort order itself is compared, not each position's rank, as published: the distribution is the same, a stored draw is not.

    Args:
        uniforms: [b, n].
        count: k, or [b, 1] one for each row.

    Returns:
        [b, n] bool, True at k positions of each row.
    """
    return uniforms.argsort(dim=1) < count


def mask_more(ids: Tensor, uniforms: Tensor, count: int, mask_token_id: int) -> Tensor:
    """Mask `count` more visible tokens per row, those with the smallest uniforms: the grid of an earlier step.

    Args:
        ids: [b, n] int64 with equally many visible tokens per row.
        uniforms: [b, n] in [0, 1).
        count: at most the number of visible tokens; 0 gives the grid back.
        mask_token_id: id of masked tokens.

    Returns:
        [b, n] int64.
    """
    order = uniforms.masked_fill(ids == mask_token_id, torch.inf).argsort(dim=1)
    return ids.scatter(1, order[:, :count], mask_token_id)


def masked_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross entropy over masked tokens, in fp32, with the smoothed part spread over all K codes.

    Args:
        logits: [b, k, K] at the masked positions.
        targets: [b, k] int64.
        label_smoothing: in [0, 1).

    Returns:
        Scalar.
    """
    sizes = check_shape(logits, "masked_cross_entropy: logits", "b k K")
    check_shape(targets, "masked_cross_entropy: targets", "b k", b=sizes["b"], k=sizes["k"])
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), label_smoothing=label_smoothing)
