"""Frechet distance between Gaussians fitted to features, from float64 moments that stream and merge.

d^2 = |m1 - m2|^2 + Tr S1 + Tr S2 - 2 Tr (S1 S2)^(1/2)

Source: Heusel et al. 2017 (arXiv 1706.08500), with the sample covariance (divided by n - 1) of all common tools. The trace of the root
is the nuclear norm of L1^T L2 with Si = Li Li^T from symmetric eigenvalues, which stays exact to rounding where the covariances
are singular (fewer samples than features); general eigenvalues or the matrix root of S1 S2 lose half the digits there.

Letters: n samples, d features.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genkit.checks import check_shape
from genkit.data.files import atomic_write


class GaussianStatistics:
    """Mean and covariance of features, accumulated over batches, files or processes.

    Keeps n, the mean and the sum of outer products of deviations in float64 on the CPU and merges by the pairwise update of Chan et
    al. 1983, so that order and split change the result by rounding only, also where the mean is far from zero.

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

    def update(self, features: Tensor) -> None:
        """Add features [n, d].

        Raises:
            ValueError: if the shape does not fit or a value is not finite.
        """
        check_shape(features, "GaussianStatistics.update: features", "n d", d=self.dim)
        values = features.detach().to("cpu", torch.float64)
        if not torch.isfinite(values).all():
            raise ValueError("GaussianStatistics.update: features hold values that are not finite; check the pictures and the network.")
        if len(values):
            mean = values.mean(0)
            deviations = values - mean
            self._absorb(len(values), mean, deviations.T @ deviations)

    def merge(self, other: GaussianStatistics) -> None:
        """Add what another object has seen.

        Raises:
            ValueError: if the features differ in number or source.
        """
        _check_comparable(self, other, "merge")
        self._absorb(other.count, other._mean, other._scatter)

    def _absorb(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        if not count:
            return
        delta = mean - self._mean
        self._scatter = self._scatter + scatter + torch.outer(delta, delta) * (self.count * count / total)
        self._mean = self._mean + delta * (count / total)
        self.count = total

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return the mean [d] and the sample covariance [d, d], float64.

        Raises:
            RuntimeError: with fewer than two samples.
        """
        if self.count < 2:
            raise RuntimeError(f"GaussianStatistics.compute: a covariance needs at least 2 samples, got {self.count}; call update first.")
        return self._mean.clone(), self._scatter / (self.count - 1)

    def save(self, path: str | Path) -> None:
        """Write an `.npz` with `mu`, `sigma` (as pytorch-fid and others read them), `count` and `source`; whole or not at all."""
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"GaussianStatistics.save: the file name must end in .npz, got {path.name!r}.")
        mean, covariance = self.compute()
        with atomic_write(path) as file:
            np.savez(file, mu=mean.numpy(), sigma=covariance.numpy(), count=np.int64(self.count), source=np.str_(self.source))

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
        return _Loaded(mean, covariance, source) if not count else cls._restore(mean, covariance, count, source)

    @classmethod
    def _restore(cls, mean: Tensor, covariance: Tensor, count: int, source: str) -> GaussianStatistics:
        stats = cls(len(mean), source)
        stats.count, stats._mean, stats._scatter = count, mean, covariance * (count - 1)
        return stats


class _Loaded(GaussianStatistics):
    """Moments without a sample count."""

    def __init__(self, mean: Tensor, covariance: Tensor, source: str) -> None:
        super().__init__(len(mean), source)
        self._mean, self._covariance = mean, covariance

    def _absorb(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        raise RuntimeError("these statistics were loaded from a file without 'count' and cannot take more samples.")

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return the mean and covariance of the file."""
        return self._mean.clone(), self._covariance.clone()


def _check_comparable(a: GaussianStatistics, b: GaussianStatistics, what: str) -> None:
    if a.dim != b.dim or (a.source and b.source and a.source != b.source):
        raise ValueError(
            f"cannot {what} statistics of different features: {a.dim} features of {a.source or 'unknown source'!r} and {b.dim} of "
            f"{b.source or 'unknown source'!r}; use one network, size and preprocessing for both."
        )


def trace_of_root(first: Tensor, second: Tensor) -> Tensor:
    """Return Tr (S1 S2)^(1/2) of symmetric positive semi-definite matrices [d, d], float64.

    With S = V diag(l) V^T and L = V sqrt(l): S1 = L1 L1^T, S2 = L2 L2^T, and the result is the nuclear norm of L1^T L2, whose singular
    values are exact down to rounding also for singular matrices. Eigenvalues below 0 are rounding and count as 0.
    """
    halves = []
    for matrix in (first, second):
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        is_used = values > values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
        halves.append(vectors[:, is_used] * values[is_used].sqrt())
    return torch.linalg.svdvals(halves[0].T @ halves[1]).sum()


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """Return the squared Frechet distance of two sets of features.

    Raises:
        ValueError: if they come from different features.
        RuntimeError: if one has fewer than two samples.

    Source: Dowson and Landau 1982; Heusel et al. 2017, equation 6.
    """
    _check_comparable(a, b, "compare")
    (mean_a, covariance_a), (mean_b, covariance_b) = a.compute(), b.compute()
    spread = covariance_a.trace() + covariance_b.trace() - 2 * trace_of_root(covariance_a, covariance_b)
    return float((mean_a - mean_b).square().sum() + spread)
