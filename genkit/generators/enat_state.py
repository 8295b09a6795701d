"""What passes between ENAT evaluations: the prepared condition, the state, the output.

Legend: b batch, n tokens of the grid, m text tokens, d width, K codes, k masked tokens, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genkit.generators.enat_context import ContextWeights


@dataclass(frozen=True)
class ENATCondition:
    """What the condition contributes to every block and step.

    Args:
        vector: [b, d].
        modulation: [b, L, 8, d]; per block shift, scale of the tokens, shift, scale of the context, gate; shift, scale, gate of the MLP.
        tokens: [b, m, d] text tokens, or None.
        token_mask: [b, m] bool, True = real; None if all are.
        context_weights: stacked context projections, see `prepare_condition`.
    """

    vector: Tensor
    modulation: Tensor
    tokens: Tensor | None = None
    token_mask: Tensor | None = None
    context_weights: ContextWeights | None = None

    @staticmethod
    def cat(conditions: Sequence[ENATCondition]) -> ENATCondition:
        """Join conditions of one model along the batch; text must have the same length m."""
        first = conditions[0]
        masks = [c.token_mask for c in conditions]
        if first.tokens is not None and any(mask is None for mask in masks) and any(mask is not None for mask in masks):
            masks = [_full_mask(c.tokens) if c.token_mask is None and c.tokens is not None else c.token_mask for c in conditions]
        return ENATCondition(
            torch.cat([c.vector for c in conditions]),
            torch.cat([c.modulation for c in conditions]),
            _cat([c.tokens for c in conditions], "text tokens"),
            _cat(masks, "text masks"),
            first.context_weights,
        )

    def rows(self, index: Tensor) -> ENATCondition:
        """Return the samples index [b2] int64, in that order."""
        tokens = None if self.tokens is None else self.tokens[index]
        mask = None if self.token_mask is None else self.token_mask[index]
        return ENATCondition(self.vector[index], self.modulation[index], tokens, mask, self.context_weights)


@dataclass(frozen=True)
class ENATState:
    """What an evaluation leaves for the next one.

    Args:
        feat: [b, m + n, d], text tokens, then the grid in raster order; features before the final norm. Only those of text and
            visible tokens are read again.
        is_masked: [b, n] bool, the masked tokens of the grid that was fed.
    """

    feat: Tensor
    is_masked: Tensor

    @staticmethod
    def cat(states: Sequence[ENATState]) -> ENATState:
        """Join states along the batch."""
        return ENATState(torch.cat([s.feat for s in states]), torch.cat([s.is_masked for s in states]))

    def rows(self, index: Tensor) -> ENATState:
        """Return the samples index [b2] int64, in that order."""
        return ENATState(self.feat[index], self.is_masked[index])


@dataclass(frozen=True)
class ENATOutput:
    """Result of one evaluation. A plain dataclass: accelerate rebuilds mappings from a dict, which ends a diffusers output with two fields.

    Args:
        logits: [b, n, K] for all tokens, [b, k, K] for the masked ones, or None, as `logits_at` asks.
        state: for the next evaluation.
    """

    logits: Tensor | None
    state: ENATState


def _full_mask(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def _cat(parts: Sequence[Tensor | None], what: str) -> Tensor | None:
    """Join tensors along the batch, or return None if none is there.

    Raises:
        ValueError: if some are missing or their lengths differ.
    """
    present = [part for part in parts if part is not None]
    if not present:
        return None
    if len(present) < len(parts) or len({part.shape[1] for part in present}) > 1:
        shapes = [None if part is None else list(part.shape) for part in parts]
        raise ValueError(f"ENATCondition.cat: {what} must be there for all or none and have one length, got {shapes}; pad the prompts.")
    return torch.cat(present)
