"""Frechet statistics: closed forms, merging, splits, singular covariances, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from genkit.eval.frechet import GaussianStatistics, frechet_distance


def samples(count: int, dim: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mix + shift


def of(features: torch.Tensor, source: str = "") -> GaussianStatistics:
    stats = GaussianStatistics(features.shape[1], source)
    stats.update(features)
    return stats


def given(mean: list[float], covariance: torch.Tensor, tmp_path: Path) -> GaussianStatistics:
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
    np.savez(path, mu=np.array(mean), sigma=covariance.numpy())
    return GaussianStatistics.load(path)


def test_distance_of_diagonal_gaussians_is_the_closed_form(tmp_path: Path) -> None:
    a = given([0.0, 1.0, 2.0], torch.tensor([4.0, 1.0, 9.0], dtype=torch.float64).diag(), tmp_path)
    b = given([1.0, 1.0, 0.0], torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64).diag(), tmp_path)
    assert frechet_distance(a, b) == pytest.approx(5 + (2 - 1) ** 2 + 0 + 3**2, rel=1e-12)


def test_distance_of_rotated_gaussians_is_the_closed_form(tmp_path: Path) -> None:
    turn = torch.linalg.qr(samples(5, 5, 3))[0]
    first, second = torch.arange(1.0, 6.0, dtype=torch.float64), torch.arange(5.0, 0.0, -1.0, dtype=torch.float64)
    a = given([0.0] * 5, turn @ first.diag() @ turn.T, tmp_path)
    b = given([0.0] * 5, turn @ second.diag() @ turn.T, tmp_path)
    assert frechet_distance(a, b) == pytest.approx(float((first.sqrt() - second.sqrt()).square().sum()), rel=1e-10)


def test_moments_match_numpy() -> None:
    x = samples(50, 6, 0, shift=1000.0)
    mean, covariance = of(x).compute()
    np.testing.assert_allclose(mean.numpy(), x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance.numpy(), np.cov(x.numpy(), rowvar=False), rtol=1e-9)


@pytest.mark.parametrize("split", [[1, 99], [33, 33, 34], [1] * 100, [50, 0, 50]])
def test_split_into_batches_does_not_matter(split: list[int]) -> None:
    x = samples(100, 8, 1, shift=300.0)
    stats = GaussianStatistics(8)
    for part in x.split(split):
        stats.update(part)
    for found, expected in zip(stats.compute(), of(x).compute(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_merge_order_does_not_matter() -> None:
    parts = samples(90, 7, 2, shift=50.0).split([10, 50, 30])
    whole = of(torch.cat(parts)).compute()
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        merged = GaussianStatistics(7)
        for i in order:
            merged.merge(of(parts[i]))
        assert merged.count == 90
        for found, expected in zip(merged.compute(), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_distance_to_itself_is_zero_and_symmetric() -> None:
    a, b = of(samples(60, 6, 4)), of(samples(40, 6, 5, shift=1.0))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def test_singular_covariances_give_the_exact_value() -> None:
    """With fewer samples than features the root's trace is the nuclear norm of the centred cross product."""
    x, y = samples(12, 40, 6), samples(9, 40, 7)
    left, right = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    root = torch.linalg.svdvals(left @ right.T).sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + left.square().sum() + right.square().sum() - 2 * root
    assert frechet_distance(of(x), of(y)) == pytest.approx(float(expected), rel=1e-10)


def test_constant_features_have_the_distance_of_their_means() -> None:
    a, b = of(torch.zeros(5, 3)), of(torch.full((5, 3), 2.0))
    assert frechet_distance(a, b) == pytest.approx(12.0)


def test_file_round_trip_goes_on_from_where_it_was(tmp_path: Path) -> None:
    x = samples(30, 4, 8)
    of(x[:20], "net").save(tmp_path / "stats.npz")
    loaded = GaussianStatistics.load(tmp_path / "stats.npz")
    assert (loaded.count, loaded.source) == (20, "net")
    loaded.update(x[20:])
    torch.testing.assert_close(loaded.compute()[1], of(x).compute()[1], rtol=1e-10, atol=1e-12)
    assert [path.name for path in tmp_path.iterdir()] == ["stats.npz"]


def test_foreign_file_compares_but_takes_no_samples(tmp_path: Path) -> None:
    x = samples(30, 4, 9)
    mean, covariance = of(x).compute()
    stats = given(mean.tolist(), covariance, tmp_path)
    assert frechet_distance(stats, of(x)) == pytest.approx(0, abs=1e-9)
    with pytest.raises(RuntimeError, match="without 'count'"):
        stats.update(x)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    stats = GaussianStatistics(3, "lite0")
    with pytest.raises(ValueError, match="d=3"):
        stats.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="not finite"):
        stats.update(torch.full((2, 3), float("nan")))
    with pytest.raises(RuntimeError, match="at least 2 samples, got 0"):
        stats.compute()
    with pytest.raises(ValueError, match="'lite0'.*'inception'"):
        frechet_distance(of(torch.randn(4, 3), "lite0"), of(torch.randn(4, 3), "inception"))
    with pytest.raises(ValueError, match=r"\.npz"):
        of(torch.randn(4, 3)).save(tmp_path / "stats.pt")
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match="lacks.*sigma"):
        GaussianStatistics.load(tmp_path / "wrong.npz")


@pytest.mark.parametrize(("n", "m"), [(12, 200), (200, 12), (200, 150), (30, 30), (31, 30)])
def test_kept_samples_and_covariances_give_one_value(n: int, m: int, tmp_path: Path) -> None:
    x, y = samples(n, 30, 10), samples(m, 30, 11, shift=0.5)
    a, b = (given(mean.tolist(), covariance, tmp_path) for mean, covariance in (of(x).compute(), of(y).compute()))
    expected = frechet_distance(a, b)
    assert frechet_distance(of(x), of(y)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(of(y), of(x)) == pytest.approx(expected, rel=1e-9)


def test_dividing_by_n_scales_the_covariances() -> None:
    x, y = samples(40, 5, 12), samples(40, 5, 13)
    for features in (x, y):
        torch.testing.assert_close(of(features).compute(ddof=0)[1] * 40 / 39, of(features).compute()[1], rtol=1e-12, atol=1e-12)
    means = float((x.mean(0) - y.mean(0)).square().sum())
    expected = (frechet_distance(of(x), of(y)) - means) * 39 / 40 + means
    assert frechet_distance(of(x), of(y), ddof=0) == pytest.approx(expected, rel=1e-10)


def test_rotation_and_scale_laws() -> None:
    x, y = samples(50, 8, 14), samples(60, 8, 15, shift=1.0)
    turn = torch.linalg.qr(samples(8, 8, 16))[0]
    distance = frechet_distance(of(x), of(y))
    assert frechet_distance(of(x @ turn), of(y @ turn)) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(of(3 * x), of(3 * y)) == pytest.approx(9 * distance, rel=1e-9)
