"""An evaluation from names to results: open sources or statistics, extract features in one pass, compute metrics.

Every process takes part in the extraction; the first one computes the metrics, and all of them return the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from genkit.eval.extract import Extractor, FeatureSet, Progress, extract
from genkit.eval.frechet import GaussianStatistics
from genkit.eval.metrics import Data, Result, check_metrics, compute
from genkit.eval.pictures import Source
from genkit.eval.protocols import Protocol
from genkit.eval.statistics_files import read_statistics


@dataclass
class Evaluation:
    """What an evaluation found.

    Attributes:
        results: one per metric.
        data: the features, for reports.
        real, fake: the sources, for pictures in reports; real is None with reference statistics.
    """

    results: list[Result]
    data: Data
    real: Source | None
    fake: Source


def evaluate(
    metrics: Sequence[str],
    fake: Source,
    real: Source | str | Path | None,
    protocol: Protocol,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    workers: int | None = None,
    skip_bad: bool = False,
    cache: str | Path | None = None,
    intervals: bool = True,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate generated pictures.

    Args:
        metrics: names, keys of `genkit.eval.metrics.METRICS`.
        fake: generated pictures.
        real: real pictures, or the path of a file with their statistics; None where no metric needs them.
        protocol: the choices.
        weights: of the FID Inception network; fetched once if None and needed.
        device: where to compute.
        batch_size, workers, skip_bad, cache, progress: see `extract`.
        intervals: compute 95 % intervals.

    Raises:
        ValueError: for metrics the protocol cannot give, unusable pictures, or statistics of other features.
        OSError: if the weights cannot be fetched.
    """
    chosen = check_metrics(metrics, protocol)
    taps = list(dict.fromkeys(tap for metric in chosen for tap in metric.layers(protocol)))
    extractor = Extractor(protocol, weights, device)
    options = {"batch_size": batch_size, "workers": workers, "skip_bad": skip_bad, "cache": cache, "progress": progress}
    statistics: dict[str, GaussianStatistics] = {}
    real_features: FeatureSet | None = None
    real_taps = list(dict.fromkeys(tap for metric in chosen if metric.needs_real for tap in metric.layers(protocol)))
    if isinstance(real, Source):
        if real_taps:
            real_features = extract(real, extractor, real_taps, **options)  # type: ignore[arg-type]
    elif real is not None:
        statistics = {tap: _reference(real, tap, extractor) for tap in real_taps}
    elif real_taps:
        raise ValueError(f"{', '.join(metrics)}: real pictures or their statistics are needed.")
    features = extract(fake, extractor, taps, **options)  # type: ignore[arg-type]
    name = real.name if isinstance(real, Source) else str(real or "")
    data = Data(protocol, features, real_features, statistics, extractor.weights, name, intervals)
    results = _on_first_process(lambda: compute(metrics, data))
    return Evaluation(results, data, real if isinstance(real, Source) else None, fake)


def _reference(path: str | Path, tap: str, extractor: Extractor) -> GaussianStatistics:
    """Read reference statistics and check that they are of the same features."""
    stats = read_statistics(path, "spatial" if tap == "spatial" else "pool")
    if stats.dim != extractor.taps[tap]:
        raise ValueError(
            f"{str(path)!r} has statistics of {stats.dim} features, layer {tap!r} has {extractor.taps[tap]}; give another file."
        )
    if stats.source and stats.source != extractor.source(tap):
        raise ValueError(f"{str(path)!r} has statistics of {stats.source!r}, but this evaluation uses {extractor.source(tap)!r}.")
    stats.source = extractor.source(tap)
    return stats


def _on_first_process(work: Callable[[], list[Result]]) -> list[Result]:
    """Run in the first process and hand its results to the others."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return work()
    box: list[object] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            box = [work()]
        except (ValueError, RuntimeError) as error:
            box = [error]
    torch.distributed.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]  # type: ignore[return-value]
