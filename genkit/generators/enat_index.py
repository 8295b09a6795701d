"""Which tokens of a grid one ENAT evaluation encodes, reuses and predicts, as index tensors of known sizes.

Legend: b batch, n tokens of the grid, k masked, v newly revealed, p reused (visible now and before); n = k + v + p.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genkit.checks import check_shape


@dataclass(frozen=True)
class TokenIndex:
    """The three parts of a grid; together each position once, inside a part in raster order.

    Args:
        masked: [b, k] int64, to be predicted.
        new: [b, v] int64, visible and not yet encoded.
        old: [b, p] int64, visible and encoded in the state.
        is_masked: [b, n] bool.
    """

    masked: Tensor
    new: Tensor
    old: Tensor
    is_masked: Tensor


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Return tokens [b, k, d] at the positions index [b, k] of tokens [b, n, d]."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def positions_where(chosen: Tensor, count: int) -> Tensor:
    """Return the positions [b, count] in raster order at which chosen [b, n] (bool) holds; each row must have `count` of them."""
    return chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]


def mark(index: Tensor, num_tokens: int) -> Tensor:
    """Return bool [b, n] that is True at the positions index [b, k]."""
    return torch.zeros(index.shape[0], num_tokens, dtype=torch.bool, device=index.device).scatter(1, index, True)


def _equal_count(chosen: Tensor, what: str) -> int:
    """Return how many positions each row of chosen [b, n] has. Waits for the device.

    Raises:
        ValueError: if the rows differ.
    """
    counts = chosen.sum(1).tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"ENAT: all samples of a batch must have the same number of {what} tokens, got {counts}; run samples with other counts apart."
        )
    return int(counts[0]) if counts else 0


def split_grid(
    ids: Tensor, mask_token_id: int, was_masked: Tensor | None, masked_index: Tensor | None = None, new_index: Tensor | None = None
) -> TokenIndex:
    """Split a grid into masked, new and reused tokens. With all indices given nothing waits for the device.

    Args:
        ids: [b, n] int64.
        mask_token_id: id of masked tokens.
        was_masked: [b, n] bool, the masked tokens when the state was made; None without a state (every visible token is new).
        masked_index: [b, k] int64 in raster order; found from `ids` if None.
        new_index: [b, v] int64; found from the masks if None.

    Raises:
        ValueError: if the counts differ between samples, or a token is masked that was visible in the state.
    """
    b, n = ids.shape
    if masked_index is None:
        is_masked = ids == mask_token_id
        masked_index = positions_where(is_masked, _equal_count(is_masked, "masked"))
    else:
        check_shape(masked_index, "ENAT: masked_index", "b k", b=b)
        is_masked = mark(masked_index, n)
    num_visible = n - masked_index.shape[1]
    if was_masked is None:
        if new_index is None:
            new_index = positions_where(~is_masked, num_visible)
        elif new_index.shape[1] != num_visible:
            raise ValueError(f"ENAT: without a state all {num_visible} visible tokens are new, got a new_index of {new_index.shape[1]}.")
        return TokenIndex(masked_index, new_index, new_index[:, :0], is_masked)
    if new_index is None:
        if bool((is_masked & ~was_masked).any()):
            raise ValueError("ENAT: a token is masked that was visible when the state was made; leave the state out to start anew.")
        is_new = was_masked & ~is_masked
        new_index = positions_where(is_new, _equal_count(is_new, "newly revealed"))
    check_shape(new_index, "ENAT: new_index", "b v", b=b)
    num_old = num_visible - new_index.shape[1]
    if num_old < 0:
        raise ValueError(f"ENAT: new_index has {new_index.shape[1]} tokens, but only {num_visible} of {n} are visible.")
    old_index = positions_where(~(is_masked | mark(new_index, n)), num_old)
    return TokenIndex(masked_index, new_index, old_index, is_masked)
