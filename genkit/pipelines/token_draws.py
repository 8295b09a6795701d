"""How the next token of a sequence is chosen from its logits.

Letters: b samples, k tokens to choose from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DrawRule:
    """Temperature, top-k and top-p.

    Args:
        temperature: divides the logits, above 0.
        top_k: only so many most probable tokens, and those that equal the last of them; 0 for all.
        top_p: of those only the smallest set whose probability exceeds it, in (0, 1].

    Raises:
        ValueError: for values out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            given = f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}"
            raise ValueError(f"temperature must be above 0, top_k at least 0 (all), top_p in (0, 1], got {given}.")

    def cut(self, logits: Tensor) -> Tensor:
        """Return logits [b, k] divided by the temperature, -inf where top-k leaves nothing."""
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        return logits

    def filtered(self, logits: Tensor) -> Tensor:
        """Return logits [b, k] divided by the temperature, -inf where top-k and top-p leave nothing."""
        logits = self.cut(logits)
        if self.top_p < 1:
            ordered, order = logits.sort(dim=-1)
            is_tail = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
            is_tail[:, -1] = False
            logits = logits.masked_fill(is_tail.scatter(1, order, is_tail), -torch.inf)
        return logits


def inverse_cdf(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Return the first token [b] whose cumulative probability exceeds a uniform [b]; float64, in the order of the tokens."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    found = (cumulative <= uniforms.double()[:, None] * cumulative[:, -1:]).sum(-1)
    last = (logits > -torch.inf).long().cumsum(-1).argmax(-1)  # of rounding at the far end
    return torch.minimum(found, last)
