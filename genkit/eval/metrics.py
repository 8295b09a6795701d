"""Metrics by name, on extracted features: value, uncertainty, what it was computed with, and warnings where it means little.

Intervals are 95 %. Distances and scores use a jackknife that leaves out one of ten interleaved groups of samples at a time (of both sets,
where both have samples); shares of samples use their standard error given the other set; KID uses the spread of its subsets. None of
them knows the bias of a small sample, which the warnings speak of.

Letters: n real, m generated samples, d features, g groups.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.checks import choose
from genkit.eval import kernels, similarity
from genkit.eval.extract import FeatureSet
from genkit.eval.frechet import GaussianStatistics, frechet_distance, merged
from genkit.eval.inception_score import inception_score
from genkit.eval.manifold import authenticity, manifold_flags
from genkit.eval.protocols import Protocol

GROUPS = 10
QUANTILE = 2.262  # of Student's t with nine degrees of freedom, 97.5 %
NORMAL = 1.96
MOST_NEIGHBOURS = 10_000  # samples of each set that neighbour metrics look at, as ADM's reference has


@dataclass(frozen=True)
class Result:
    """One metric.

    Attributes:
        metric: name; a Frechet distance on other features than Inception's is never called fid.
        value: the figure.
        ci: 95 % interval, or None where there is none.
        protocol: every choice behind the figure.
        num_real, num_fake: samples; 0 where the metric needs none or the statistics do not say.
        real, fake: names of the data.
        weights: of the network.
        warnings: why the figure may mislead.
        details: further values.
    """

    metric: str
    value: float
    ci: tuple[float, float] | None
    protocol: Protocol
    num_real: int
    num_fake: int
    real: str
    fake: str
    weights: str = ""
    warnings: tuple[str, ...] = ()
    details: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        found = dataclasses.asdict(self)
        return found | {"ci": list(self.ci) if self.ci else None, "warnings": list(self.warnings)}

    def __str__(self) -> str:
        interval = f" [{self.ci[0]:.6g}, {self.ci[1]:.6g}]" if self.ci else ""
        counts = f"{self.num_real or 'unknown'} real, {self.num_fake} generated" if self.real else f"{self.num_fake} generated"
        return f"{self.metric} {self.value:.6g}{interval} ({self.protocol.name}; {counts})"


@dataclass
class Data:
    """What metrics are computed from.

    Attributes:
        protocol: the choices.
        fake: features of the generated pictures.
        real: features of the real ones, or None.
        statistics: layer -> reference statistics instead of real pictures.
        weights: of the network.
        real_name: name of the reference.
        with_intervals: compute intervals.
    """

    protocol: Protocol
    fake: FeatureSet
    real: FeatureSet | None = None
    statistics: dict[str, GaussianStatistics] = field(default_factory=dict)
    weights: str = ""
    real_name: str = ""
    with_intervals: bool = True

    def need_real(self, metric: str) -> FeatureSet:
        """Return the real features.

        Raises:
            ValueError: if only statistics were given.
        """
        if self.real is None:
            raise ValueError(f"{metric} needs real pictures, not only their statistics ({self.real_name}); give pictures.")
        return self.real


def statistics_of(features: FeatureSet, tap: str, rows: slice | None = None) -> GaussianStatistics:
    """Return the moments of a layer, streamed from the file; of some rows only if given."""
    array = features.arrays[tap] if rows is None else features.arrays[tap][rows]
    stats = GaussianStatistics(array.shape[1], features.sources.get(tap, ""))
    for start in range(0, len(array), 4096):
        stats.update(torch.from_numpy(np.array(array[start : start + 4096])))
    return stats


def jackknife(groups: Sequence[GaussianStatistics], value: Callable[[GaussianStatistics], float]) -> float:
    """Return the variance of a function of moments by leaving out each group once."""
    values = np.array([value(merged([group for group in groups if group is not left_out])) for left_out in groups])
    return float((len(groups) - 1) / len(groups) * ((values - values.mean()) ** 2).sum())


def jackknife_rows(features: Tensor, value: Callable[[Tensor], float]) -> float:
    """Return the variance of a function of rows [m, d] by leaving out each of ten interleaved groups once."""
    place = torch.arange(len(features)) % GROUPS
    values = np.array([value(features[place != g]) for g in range(GROUPS)])
    return float((GROUPS - 1) / GROUPS * ((values - values.mean()) ** 2).sum())


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Return the Wilson interval of a share of `count` samples, inside [0, 1]."""
    z = NORMAL**2 / count
    centre, reach = (share + z / 2) / (1 + z), math.sqrt(share * (1 - share) * z + z**2 / 4) / (1 + z)
    return max(centre - reach, 0.0), min(centre + reach, 1.0)


def _around(value: float, variance: float, quantile: float = QUANTILE) -> tuple[float, float]:
    reach = quantile * math.sqrt(max(variance, 0.0))
    return value - reach, value + reach


def _frechet(data: Data, tap: str, name: str) -> tuple[float, tuple[float, float] | None, list[str], dict[str, float]]:
    """Compute a Frechet distance on a layer."""
    ddof = data.protocol.ddof
    fake = statistics_of(data.fake, tap)
    real = data.statistics.get(tap) or statistics_of(data.need_real(name), tap)
    value = frechet_distance(real, fake, ddof)
    warnings = _sample_warnings(data, tap, real, fake, value)
    if not data.with_intervals:
        return value, None, warnings, {}
    variance = 0.0
    for features, other in ((data.fake, real), (data.real, fake)):
        if features is not None and len(features) >= 2 * GROUPS:
            groups = [statistics_of(features, tap, slice(g, None, GROUPS)) for g in range(GROUPS)]
            variance += jackknife(groups, lambda rest, other=other: frechet_distance(other, rest, ddof))  # type: ignore[misc]
    return value, _around(value, variance) if variance else None, warnings, {}


def _sample_warnings(data: Data, tap: str, real: GaussianStatistics, fake: GaussianStatistics, value: float) -> list[str]:
    """Say where a Frechet distance is biased, and by about how much: the bias is nearly c / m, so half the samples show it."""
    found = []
    if not data.protocol.is_fid:
        found.append(f"this is a Frechet distance on {data.protocol.network} features, not FID: comparable with its own kind only")
    if len(data.fake) < 10_000:
        half = statistics_of(data.fake, tap, slice(0, None, 2)) if len(data.fake) >= 4 else None
        bias = frechet_distance(real, half, data.protocol.ddof) - value if half is not None else math.nan
        rank = f", fewer than the {fake.dim} features (the covariance is singular)" if len(data.fake) <= fake.dim else ""
        size = f" by about {bias:.3g}" if bias > 0 else ""
        found.append(f"{len(data.fake)} generated samples{rank}: biased upwards{size}; 50,000 are usual")
    if real.count and real.count <= real.dim:
        found.append(f"{real.count} real samples are fewer than the {real.dim} features: the reference covariance is singular")
    return found


def fid(data: Data) -> Result:
    """Frechet distance on the protocol's layer; `fid` only on Inception features."""
    name = "fid" if data.protocol.is_fid else f"frechet-{data.protocol.network}"
    return _result(data, name, *_frechet(data, data.protocol.tap, name))


def sfid(data: Data) -> Result:
    """Frechet distance on Inception's spatial features."""
    return _result(data, "sfid", *_frechet(data, "spatial", "sfid"))


def fid_infinity(data: Data) -> Result:
    """Frechet distance extrapolated to infinitely many generated samples: a line in 1/m over 15 sizes (Chong and Forsyth 2020)."""
    name, tap = ("fid" if data.protocol.is_fid else f"frechet-{data.protocol.network}") + "-infinity", data.protocol.tap
    count, features = len(data.fake), data.fake.tensor(data.protocol.tap)
    if count < 20:
        raise ValueError(f"{name} needs at least 20 generated samples, got {count}.")
    real = data.statistics.get(tap) or statistics_of(data.need_real(name), tap)
    generator = torch.Generator().manual_seed(0)
    sizes = np.unique(np.linspace(min(5000, max(count // 10, 2)), count, 15).astype(int))
    values = []
    for size in sizes.tolist():
        stats = GaussianStatistics(features.shape[1], data.fake.sources.get(tap, ""))
        for rows in torch.randperm(count, generator=generator)[:size].split(4096):
            stats.update(features[rows])
        values.append(frechet_distance(real, stats, data.protocol.ddof))
    design = np.stack([1 / sizes, np.ones(len(sizes))], 1)
    solution, residual, *_ = np.linalg.lstsq(design, np.array(values), rcond=None)
    variance = float(residual[0]) / max(len(sizes) - 2, 1) * np.linalg.inv(design.T @ design)[1, 1] if len(residual) else 0.0
    return _result(data, name, float(solution[1]), _around(float(solution[1]), variance), [], {"slope": float(solution[0])})


def inception(data: Data) -> Result:
    """Inception Score, from unbiased logits."""
    p, logits = data.protocol, data.fake.tensor("logits_unbiased")
    score = inception_score(logits, p.score, splits=p.splits)
    warnings = [] if len(logits) >= 50_000 else [f"{len(logits)} samples: the score grows with their number; 50,000 are usual"]
    variance = math.nan
    if data.with_intervals and len(logits) >= 2 * GROUPS * p.splits:
        variance = jackknife_rows(logits, lambda rest: inception_score(rest, p.score, splits=p.splits).mean)
    interval = _around(score.mean, variance) if math.isfinite(variance) else None
    return _result(data, "is", score.mean, interval, warnings, {"std_over_splits": score.std}, real=False)


def kid(data: Data) -> Result:
    """Kernel inception distance: mean over subsets; `std` is that over subsets, which papers print."""
    p = data.protocol
    real, fake = data.need_real("kid").tensor(p.tap), data.fake.tensor(p.tap)
    least = min(len(real), len(fake))
    size, warnings = min(p.kid_size, least), []
    if size < p.kid_size:
        warnings.append(f"subsets of {size} instead of {p.kid_size} samples: there are no more")
    values = kernels.kid(real, fake, p.kid_subsets, size, draws=p.kid, seed=p.kid_seed)
    mean, std = float(values.mean()), float(values.std(correction=0))
    spread = std * math.sqrt(max(1 / len(values), size / least))
    return _result(data, "kid", mean, _around(mean, spread**2, NORMAL), warnings, {"std": std})


def _neighbours(data: Data, k: int, keys: Sequence[str]) -> list[Result]:
    real, fake = (features.tensor(data.protocol.tap)[:MOST_NEIGHBOURS] for features in (data.need_real(keys[0]), data.fake))
    flags = manifold_flags(real, fake, k, border=data.protocol.border)
    warnings = [] if min(len(real), len(fake)) >= 1000 else ["fewer than 1,000 samples: neighbourhoods are wide and the figure says little"]
    if max(len(data.need_real(keys[0])), len(data.fake)) > MOST_NEIGHBOURS:
        warnings.append(f"the first {MOST_NEIGHBOURS:,} samples of each set")
    found = []
    for key in keys:
        values = flags[key].double()
        value = float(values.mean())
        is_share = key != "density"
        interval = share_interval(value, len(values)) if is_share else _around(value, float(values.var()) / len(values), NORMAL)
        found.append(_result(data, key, value, interval, warnings, {"k": k}))
    return found


def precision_recall(data: Data) -> list[Result]:
    """Precision and recall with the protocol's k."""
    return _neighbours(data, data.protocol.neighbours, ("precision", "recall"))


def density_coverage(data: Data) -> list[Result]:
    """Density and coverage with k = 5."""
    return _neighbours(data, 5, ("density", "coverage"))


def memorisation(data: Data) -> list[Result]:
    """Authenticity, and the Frechet distance raised where generated samples are near copies (MiFID)."""
    real, fake = (features.tensor(data.protocol.tap)[:MOST_NEIGHBOURS] for features in (data.need_real("authenticity"), data.fake))
    distance = _frechet(dataclasses.replace(data, with_intervals=False), data.protocol.tap, "mifid")[0]
    share = authenticity(real, fake)
    raised = similarity.memorisation_informed_fid(distance, real, fake)
    name = "mifid" if data.protocol.is_fid else f"memorisation-informed-frechet-{data.protocol.network}"
    return [
        _result(data, "authenticity", share, share_interval(share, len(fake)), [], {}),
        _result(data, name, raised, None, [], {}),
    ]


def vendi(data: Data) -> Result:
    """Vendi score: how many different samples there are, in effect."""
    features = data.fake.tensor(data.protocol.tap)[:MOST_NEIGHBOURS]
    return _result(data, "vendi", similarity.vendi_score(features), None, [], {}, real=False)


def _result(
    data: Data,
    metric: str,
    value: float,
    interval: tuple[float, float] | None,
    warnings: Sequence[str],
    details: dict[str, float],
    real: bool = True,
) -> Result:
    count = 0
    if real:
        count = len(data.real) if data.real is not None else max((s.count for s in data.statistics.values()), default=0)
    kinds = [f"{number} pictures converted from {kind}" for kind, number in sorted(data.fake.conversions.items())]
    left = [f"{len(data.fake.left_out)} generated pictures left out"] if data.fake.left_out else []
    if real and data.real is not None:
        kinds += [f"{number} real pictures converted from {kind}" for kind, number in sorted(data.real.conversions.items())]
        left += [f"{len(data.real.left_out)} real pictures left out"] if data.real.left_out else []
    interval = interval if data.with_intervals else None
    name = data.real_name if real else ""
    notes = (*warnings, *kinds, *left)
    return Result(metric, value, interval, data.protocol, count, len(data.fake), name, data.fake.source, data.weights, notes, details)


@dataclass(frozen=True)
class Metric:
    """A metric of the command line: function, layers, and whether it needs Inception."""

    compute: Callable[[Data], Result | list[Result]]
    taps: tuple[str, ...] = ()
    needs_inception: bool = False
    needs_real: bool = True

    def layers(self, protocol: Protocol) -> tuple[str, ...]:
        """Return the layers to extract."""
        return self.taps or (protocol.tap,)


METRICS = {
    "fid": Metric(fid),
    "fid-infinity": Metric(fid_infinity),
    "sfid": Metric(sfid, ("spatial",), needs_inception=True),
    "is": Metric(inception, ("logits_unbiased",), needs_inception=True, needs_real=False),
    "kid": Metric(kid),
    "precision-recall": Metric(precision_recall),
    "density-coverage": Metric(density_coverage),
    "memorisation": Metric(memorisation),
    "vendi": Metric(vendi, needs_real=False),
}
REPORT = ("fid", "sfid", "is", "kid", "precision-recall", "density-coverage", "memorisation", "vendi")


def check_metrics(names: Sequence[str], protocol: Protocol) -> list[Metric]:
    """Return metrics by name.

    Raises:
        ValueError: for unknown names, or metrics that the protocol's network cannot give.
    """
    found = [METRICS[choose(name, METRICS, "metric")] for name in names]
    for name, metric in zip(names, found, strict=True):
        if metric.needs_inception and not protocol.is_fid:
            raise ValueError(
                f"metric {name!r} is defined on the FID Inception network; protocol {protocol.name!r} uses {protocol.network}."
            )
    return found


def compute(names: Sequence[str], data: Data) -> list[Result]:
    """Compute metrics in the given order."""
    results: list[Result] = []
    for metric in check_metrics(names, data.protocol):
        found = metric.compute(data)
        results += found if isinstance(found, list) else [found]
    return results
