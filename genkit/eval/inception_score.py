"""Inception Score from logits, in the splits of the tools that people quote.

IS = exp(mean over x of KL(p(y|x) || p(y))), p(y) the mean within a split, averaged over splits.

Source: Salimans et al. 2016 (arXiv 1606.03498).
Letters: n samples, c classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genkit.checks import check_shape, choose


@dataclass(frozen=True)
class SplitScore:
    """Mean and standard deviation over splits, and the splits' own values."""

    mean: float
    std: float
    values: tuple[float, ...]


def score_of(logits: Tensor, eps: float = 0.0) -> float:
    """Return the score of one split, logits [n, c]; `eps` is added inside the logarithms (TiTok: 1e-16)."""
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    if eps:
        divergence = p * ((p + eps).log() - (p.mean(0) + eps).log())
    else:
        divergence = p * (log_p - p.mean(0).clamp_min(torch.finfo(torch.float64).tiny).log())
    return float(divergence.sum(1).mean().exp())


def even_splits(count: int, splits: int) -> list[slice]:
    """Return `splits` slices i * n // splits .. (i + 1) * n // splits."""
    return [slice(i * count // splits, (i + 1) * count // splits) for i in range(splits)]


def chunks(count: int, size: int) -> list[slice]:
    """Return consecutive slices of a size; the last may be shorter."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _order(count: int, tool: str, seed: int | None) -> Tensor:
    """Return a tool's shuffle of n rows."""
    if tool == "torchmetrics":
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed or 0))
    return torch.from_numpy(np.random.RandomState(2020 if seed is None else seed).permutation(count))


def _parts(count: int, tool: str, splits: int, chunk: int) -> list[slice]:
    """Return a tool's splits of n rows."""
    if tool == "adm":
        return chunks(count, chunk)
    if tool == "titok":
        return [slice(0, count)]
    if tool == "torchmetrics":
        return chunks(count, -(-count // splits))
    if tool == "dgm-eval":
        return chunks(count // splits * splits, count // splits)
    return even_splits(count, splits)


SHUFFLED = ("torch-fidelity", "torchmetrics", "dgm-eval")
TOOLS = (*SHUFFLED, "adm", "stylegan", "titok")


def inception_score(
    logits: Tensor,
    tool: str = "torch-fidelity",
    *,
    splits: int = 10,
    chunk: int = 5000,
    shuffle: bool | None = None,
    seed: int | None = None,
) -> SplitScore:
    """Compute the Inception Score as a tool does.

    Args:
        logits: [n, c]; the published score uses all 1,008 classes without the classifier's bias.
        tool: "torch-fidelity" (shuffled, even splits), "torchmetrics" (shuffled by torch, sample deviation), "dgm-eval" (shuffled,
            remainder dropped), "adm" (consecutive chunks), "stylegan" (as torch-fidelity, not shuffled), "titok" (one split).
        splits: number of splits; not for "adm" and "titok".
        chunk: rows of a split, for "adm".
        shuffle: overrides the tool's habit.
        seed: of the shuffle; the tool's own if None.

    Raises:
        ValueError: if there are fewer samples than splits, or the tool is unknown.
    """
    choose(tool, TOOLS, "tool of the Inception Score:")
    count = check_shape(logits, "inception_score: logits", "n c")["n"]
    if count < (1 if tool in ("adm", "titok") else splits):
        raise ValueError(
            f"inception_score: {splits} splits need at least as many samples, got {count}; give splits={max(count, 1)} or less."
        )
    ordered = logits[_order(count, tool, seed)] if (tool in SHUFFLED if shuffle is None else shuffle) else logits
    values = np.array([score_of(ordered[part], 1e-16 if tool == "titok" else 0.0) for part in _parts(count, tool, splits, chunk)])
    ddof = 1 if tool == "torchmetrics" and len(values) > 1 else 0
    return SplitScore(float(values.mean()), float(values.std(ddof=ddof)), tuple(values.tolist()))
