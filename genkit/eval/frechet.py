"""Frechet distance between Gaussians fitted to features, from float64 moments that stream and merge.

d^2 = |m1 - m2|^2 + Tr S1 + Tr S2 - 2 Tr (S1 S2)^(1/2)

Source: Heusel et al. 2017 (arXiv 1706.08500), with the sample covariance (divided by n - 1) of nearly all tools; StyleGAN's divides by n.
The trace of the root is the nuclear norm of A B^T for any A^T A = S1, B^T B = S2: exact to rounding also where the covariances are
singular (fewer samples than features), where general eigenvalues or the matrix root of S1 S2 lose half the digits. While there are fewer
samples than features, the rows themselves are kept and serve as A and B, which makes small sets fast; else the Cholesky factor of one
covariance turns the trace into symmetric eigenvalues.

Letters: n samples, d features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.checks import check_shape
from genkit.data.files import atomic_write


class GaussianStatistics:
    """Mean and covariance of features, accumulated over batches, files or processes.

    Keeps n, the mean and the sum of outer products of deviations in float64 on the CPU and merges by the pairwise update of Chan et
    al. 1983, so that order and split change the result by rounding only, also where the mean is far from zero. Up to d samples are kept as
    they are.

    Args:
        dim: number of features d.
        source: what the features are ("efficientnet-lite0, 64 px"); statistics of different sources refuse to be compared.

    Example:
        >>> stats = GaussianStatistics(2)
        >>> stats.update(torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
        >>> stats.compute()[0].tolist()
        [1.0, 0.0]
    """

    def __init__(self, dim: int, source: str = "") -> None:
        if dim < 1:
            raise ValueError(f"GaussianStatistics: dim must be at least 1, got {dim}.")
        self.dim, self.source, self.count = dim, source, 0
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)
        self._rows: list[Tensor] | None = []  # the samples while they are at most d, else None

    def update(self, features: Tensor) -> None:
        """Add features [n, d].

        Raises:
            ValueError: if the shape does not fit or a value is not finite.
        """
        check_shape(features, "GaussianStatistics.update: features", "n d", d=self.dim)
        values = features.detach().to("cpu", torch.float64)
        if not torch.isfinite(values).all():
            raise ValueError("GaussianStatistics.update: features hold values that are not finite; check the pictures and the network.")
        if not len(values):
            return
        if self._rows is not None and self.count + len(values) <= self.dim:
            self._rows.append(values.clone())
            self.count += len(values)
        else:
            self._collapse()
            self._absorb(*_moments(values))

    def merge(self, other: GaussianStatistics) -> None:
        """Add what another object has seen.

        Raises:
            ValueError: if the features differ in number or source.
            RuntimeError: if one was loaded from a file without a count.
        """
        _check_comparable(self, other, "merge")
        if other._rows is not None:
            for rows in list(other._rows):
                self.update(rows)
        else:
            self._collapse()
            self._absorb(other.count, other._mean, other._scatter)

    def _collapse(self) -> None:
        """Turn kept samples into moments."""
        rows, self._rows = self._rows, None
        if rows:
            self.count = 0
            self._absorb(*_moments(torch.cat(rows)))

    def _absorb(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        if not count:
            return
        delta = mean - self._mean
        self._scatter = self._scatter + scatter + torch.outer(delta, delta) * (self.count * count / total)
        self._mean = self._mean + delta * (count / total)
        self.count = total

    def compute(self, ddof: int = 1) -> tuple[Tensor, Tensor]:
        """Return the mean [d] and the covariance [d, d], float64.

        Args:
            ddof: the covariance is divided by n - ddof; StyleGAN's tools use 0, all others 1.

        Raises:
            RuntimeError: with fewer than two samples.
        """
        self._check_count()
        if self._rows is None:
            return self._mean.clone(), self._scatter / (self.count - ddof)
        factor = self.factor(ddof)
        assert factor is not None
        return self.mean(), factor.T @ factor

    def mean(self) -> Tensor:
        """Return the mean [d]."""
        return self._mean.clone() if self._rows is None else torch.cat(self._rows).mean(0)

    def trace(self, ddof: int = 1) -> Tensor:
        """Return the trace of the covariance."""
        factor = self.factor(ddof)
        return self._scatter.trace() / (self.count - ddof) if factor is None else factor.square().sum()

    def factor(self, ddof: int = 1) -> Tensor | None:
        """Return A [n, d] with A^T A the covariance: the centred samples, scaled; None where they are not kept.

        Raises:
            RuntimeError: with fewer than two samples.
        """
        self._check_count()
        if self._rows is None:
            return None
        rows = torch.cat(self._rows)
        return (rows - rows.mean(0)) / (self.count - ddof) ** 0.5

    def _check_count(self) -> None:
        if self.count < 2:
            raise RuntimeError(f"GaussianStatistics.compute: a covariance needs at least 2 samples, got {self.count}; call update first.")

    def save(self, path: str | Path, **notes: str) -> None:
        """Write an `.npz` with `mu`, `sigma` (as pytorch-fid and others read them), `count` and `source`; whole or not at all.

        Args:
            path: file to write.
            **notes: further texts to keep, such as protocol and data.

        Raises:
            ValueError: if the name does not end in .npz.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"GaussianStatistics.save: the file name must end in .npz, got {path.name!r}.")
        mean, covariance = self.compute()
        with atomic_write(path) as file:
            arrays: dict[str, Any] = {"mu": mean.numpy(), "sigma": covariance.numpy(), "count": np.int64(self.count)}
            arrays |= {key: np.str_(value) for key, value in {"source": self.source, **notes}.items()}
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> GaussianStatistics:
        """Read an `.npz` with `mu` and `sigma`; without `count` (files of other tools) the result can be compared but not merged.

        Raises:
            ValueError: if the arrays are missing or misshapen.
        """
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in ("mu", "sigma") if name not in file]
            if missing:
                raise ValueError(f"{path} lacks {missing}; it has {sorted(file.files)}. Expected mu [d] and sigma [d, d].")
            mean, covariance = (torch.from_numpy(file[name].astype(np.float64)) for name in ("mu", "sigma"))
            count = int(file["count"]) if "count" in file else 0
            source = str(file["source"]) if "source" in file else ""
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"{path}: expected mu [d] and sigma [d, d], got {list(mean.shape)} and {list(covariance.shape)}.")
        return cls.of_moments(mean, covariance, count, source)

    @classmethod
    def of_moments(cls, mean: Tensor, covariance: Tensor, count: int = 0, source: str = "") -> GaussianStatistics:
        """Return statistics with a given mean [d] and sample covariance [d, d].

        Args:
            mean, covariance: float64.
            count: samples behind them; 0 if unknown, then no samples can be added and ddof is what the file's author chose.
            source: what the features are.
        """
        if not count:
            return _Loaded(mean, covariance, source)
        stats = cls(len(mean), source)
        stats.count, stats._mean, stats._scatter, stats._rows = count, mean, covariance * (count - 1), None
        return stats


class _Loaded(GaussianStatistics):
    """Moments without a sample count."""

    def __init__(self, mean: Tensor, covariance: Tensor, source: str) -> None:
        super().__init__(len(mean), source)
        self._mean, self._covariance, self._rows = mean, covariance, None

    def _collapse(self) -> None:
        raise RuntimeError("these statistics were loaded from a file without 'count' and cannot take more samples.")

    def merge(self, other: GaussianStatistics) -> None:
        """Refuse: the number of samples is not known."""
        self._collapse()

    def update(self, features: Tensor) -> None:
        """Refuse: the number of samples is not known."""
        self._collapse()

    def _check_count(self) -> None:
        """Nothing to check."""

    def compute(self, ddof: int = 1) -> tuple[Tensor, Tensor]:
        """Return the mean and covariance of the file, whatever it was divided by."""
        return self._mean.clone(), self._covariance.clone()

    def trace(self, ddof: int = 1) -> Tensor:
        """Return the trace of the file's covariance."""
        return self._covariance.trace()

    def factor(self, ddof: int = 1) -> Tensor | None:
        """Return None: there are no samples."""
        return None


def merged(parts: Sequence[GaussianStatistics]) -> GaussianStatistics:
    """Return the statistics of all samples of several parts (at least one)."""
    whole = GaussianStatistics(parts[0].dim, parts[0].source)
    for part in parts:
        whole.merge(part)
    return whole


def _check_comparable(a: GaussianStatistics, b: GaussianStatistics, what: str) -> None:
    if a.dim != b.dim or (a.source and b.source and a.source != b.source):
        raise ValueError(
            f"cannot {what} statistics of different features: {a.dim} features of {a.source or 'unknown source'!r} and {b.dim} of "
            f"{b.source or 'unknown source'!r}; use one network, size and preprocessing for both."
        )


def _moments(rows: Tensor) -> tuple[int, Tensor, Tensor]:
    """Return n, mean [d] and scatter [d, d] of float64 rows [n, d]."""
    mean = rows.mean(0)
    deviations = rows - mean
    return len(rows), mean, deviations.T @ deviations


def trace_of_root(first: Tensor, second: Tensor) -> Tensor:
    """Return Tr (S1 S2)^(1/2) of symmetric positive semi-definite matrices [d, d], float64.

    The symmetric eigenvalues of L^T S2 L with S1 = L L^T by Cholesky. Where one is singular, or nearly so, the nuclear norm of the product
    of both factors from symmetric eigenvalues, whose singular values are exact down to rounding. Values below 0 are rounding, counted 0.
    """
    first, second = (first + first.T) / 2, (second + second.T) / 2
    lower = _cholesky(first)
    if lower is not None and _cholesky(second) is not None:
        return torch.linalg.eigvalsh(_congruent(lower, second)).clamp_min(0).sqrt().sum()
    return nuclear_norm(_root(first).T, _root(second).T)


def nuclear_norm(first: Tensor, second: Tensor) -> Tensor:
    """Return the sum of the singular values of A B^T, A [n, d] and B [m, d]."""
    return torch.linalg.svdvals(first @ second.T).sum()


def _cholesky(matrix: Tensor) -> Tensor | None:
    """Return the lower Cholesky factor of a well-conditioned matrix, else None."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    diagonal = lower.diagonal()
    return None if int(failed) or bool(diagonal.min() < 1e-6 * diagonal.max()) else lower


def _congruent(lower: Tensor, middle: Tensor) -> Tensor:
    """Return L^T S L, its lower triangle only, by halves: 9/16 of the work, as L is triangular and the product symmetric."""
    h = len(lower) // 2
    top, below, corner = lower[:h, :h], lower[h:, :h], lower[h:, h:]
    left, right = middle[:, :h] @ top + middle[:, h:] @ below, middle[h:, h:] @ corner
    out = torch.zeros_like(middle)
    out[:h, :h] = top.T @ left[:h] + below.T @ left[h:]
    out[h:, :h], out[h:, h:] = corner.T @ left[h:], corner.T @ right
    return out


def _root(matrix: Tensor) -> Tensor:
    """Return L [d, r] with L L^T the symmetric matrix, r its rank."""
    values, vectors = torch.linalg.eigh(matrix)
    is_used = values > values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, is_used] * values[is_used].sqrt()


def _trace_of_root(a: GaussianStatistics, b: GaussianStatistics, ddof: int) -> Tensor:
    """Return the trace of the root by the cheapest exact way: from kept samples where there are any."""
    factors = a.factor(ddof), b.factor(ddof)
    if factors[0] is not None and factors[1] is not None:
        return nuclear_norm(factors[0], factors[1])
    if factors[0] is None and factors[1] is None:
        return trace_of_root(a.compute(ddof)[1], b.compute(ddof)[1])
    rows, other = (factors[0], b) if factors[0] is not None else (factors[1], a)
    assert rows is not None
    covariance = other.compute(ddof)[1]
    covariance = (covariance + covariance.T) / 2
    lower = _cholesky(covariance)
    return nuclear_norm(rows, (_root(covariance) if lower is None else lower).T)


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics, ddof: int = 1) -> float:
    """Return the squared Frechet distance of two sets of features.

    Args:
        a, b: their statistics.
        ddof: covariances are divided by n - ddof.

    Raises:
        ValueError: if they come from different features.
        RuntimeError: if one has fewer than two samples.

    Source: Dowson and Landau 1982; Heusel et al. 2017, equation 6.
    """
    _check_comparable(a, b, "compare")
    a._check_count()
    b._check_count()
    spread = a.trace(ddof) + b.trace(ddof) - 2 * _trace_of_root(a, b, ddof)
    return float((a.mean() - b.mean()).square().sum() + spread)
