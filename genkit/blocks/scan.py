"""Linear recurrences over tokens, chunk by chunk: within a chunk a small matrix, between chunks a state.

S_t = g_t S_{t-1} + k_t v_t^T and y_t = q_t S_t, in float32, so that a long sum loses nothing.
Source: the chunkwise form of retention (Sun et al. 2023, arXiv 2307.08621).
Letters: b batch, n tokens, hd width of a query or key head, vd of a value head, c tokens of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, chunk: int = 64, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run the recurrence over all tokens.

    Args:
        q, k: [b, heads, n, hd].
        v: [b, heads, n, vd].
        log_decay: log g, at most 0: [heads], the same for all tokens, or [b, heads, n].
        chunk: c.
        state: [b, heads, hd, vd] float32 before the first token; zero if None.

    Returns:
        y [b, heads, n, vd] float32, and the state after the last token.
    """
    b, heads, n, _ = q.shape
    q, k, v = q.float(), k.float(), v.float()
    log_decay = log_decay.float()
    steps = log_decay.view(1, heads, 1).expand(b, heads, n) if log_decay.ndim == 1 else log_decay
    size = min(chunk, n)
    missing = -n % size
    if missing:  # tokens without decay and without weight leave the state as it is
        q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
        steps = F.pad(steps, (0, missing))
    q, k, v = (x.unflatten(2, (-1, size)) for x in (q, k, v))
    reached = steps.unflatten(2, (-1, size)).cumsum(-1)
    triangle = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    decays = (reached[..., :, None] - reached[..., None, :]).masked_fill(~triangle, float("-inf")).exp()
    inside = ((q @ k.transpose(-2, -1)) * decays) @ v
    to_end = (reached[..., -1:] - reached).exp()[..., None]
    added = (k * to_end).transpose(-2, -1) @ v
    whole = reached[..., -1].exp()[..., None, None]
    state = q.new_zeros(b, heads, k.shape[-1], v.shape[-1]) if state is None else state
    before = []
    for i in range(q.shape[2]):
        before.append(state)
        state = state * whole[:, :, i] + added[:, :, i]
    across = (q * reached.exp()[..., None]) @ torch.stack(before, dim=2)
    return (inside + across).flatten(2, 3)[:, :, :n], state
