"""Metrics on features: closed forms, invariances, conventions of the tools, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from genkit.eval import kernels, similarity
from genkit.eval.distances import distance_blocks, neighbour_radii, squared_distances
from genkit.eval.inception_score import TOOLS, inception_score
from genkit.eval.manifold import authenticity, manifold_scores, nearest_neighbours, realism


def draw(count: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + shift


# ---- distances ----


def test_distances_match_the_definition_and_copies_are_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(40, 30, 0, shift=100.0)
    y = torch.cat([x[:5], draw(20, 30, 1, shift=100.0)])
    expected = (x.double()[:, None] - y.double()).square().sum(-1)
    assert_close(squared_distances(x, y), expected, rtol=1e-9, atol=1e-12)
    assert (squared_distances(x, y)[torch.arange(5), torch.arange(5)] == 0).all()
    monkeypatch.setattr("genkit.eval.distances.CHUNK", 100)
    assert_close(torch.cat([block for _, block in distance_blocks(x, y)]), expected.sqrt(), rtol=1e-9, atol=1e-9)


def test_radius_leaves_the_point_itself_out() -> None:
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert neighbour_radii(line, 1).tolist() == [1, 1, 2, 4]
    assert neighbour_radii(line, 3).tolist() == [7, 6, 4, 7]
    with pytest.raises(ValueError, match="more than k samples, got 4"):
        neighbour_radii(line, 4)


# ---- precision, recall, density, coverage ----


def test_equal_sets_score_one() -> None:
    x = draw(50, 8, 2)
    found = manifold_scores(x, x.clone(), 3)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert authenticity(x, x.clone()) == 0


def test_far_sets_score_zero() -> None:
    found = manifold_scores(draw(30, 4, 3), draw(30, 4, 4, shift=1000.0), 3)
    assert (found.precision, found.recall, found.density, found.coverage) == (0, 0, 0, 0)
    assert authenticity(draw(30, 4, 3), draw(30, 4, 4, shift=1000.0)) == 1


def test_mode_collapse_keeps_precision_and_loses_recall_and_coverage() -> None:
    real = torch.cat([draw(40, 4, 5), draw(40, 4, 6, shift=50.0)])
    found = manifold_scores(real, draw(80, 4, 7), 5)
    assert found.precision > 0.8 and found.recall < 0.6 and found.coverage < 0.6


def test_the_border_counts_where_samples_repeat() -> None:
    real = draw(5, 3, 8).repeat(4, 1)  # every radius is 0
    assert manifold_scores(real, real, 3).precision == 0
    assert manifold_scores(real, real, 3, border=True).precision == 1


def test_realism_of_a_copy_is_infinite_and_falls_with_distance() -> None:
    real = draw(60, 3, 9)
    centre = real[neighbour_radii(real, 5).argmin()]
    values = realism(real, torch.stack([centre, centre + 0.3, centre + 30]))
    assert math.isinf(values[0]) and values[0] > values[1] > values[2]


def test_nearest_neighbours_are_found_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = draw(31, 5, 10), draw(17, 5, 11)
    whole = nearest_neighbours(real, fake)
    monkeypatch.setattr("genkit.eval.distances.CHUNK", 64)
    for a, b in zip(whole, nearest_neighbours(real, fake), strict=True):
        assert torch.equal(a, b)


# ---- KID and CMMD ----


def test_unbiased_mmd_is_the_double_sum() -> None:
    x, y = draw(6, 3, 12).double(), draw(5, 3, 13).double()
    k = lambda a, b: float((a @ b / 3 + 1) ** 3)  # noqa: E731
    own = [sum(k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) / (len(s) * (len(s) - 1)) for s in (x, y)]
    cross = sum(k(a, b) for a in x for b in y) / 30
    assert kernels.unbiased_mmd(x, y) == pytest.approx(own[0] + own[1] - 2 * cross, rel=1e-12)


@pytest.mark.parametrize("draws", sorted(kernels.SUBSETS))
def test_kid_of_two_halves_of_one_set_is_near_zero(draws: str) -> None:
    x = draw(400, 8, 14)
    same = kernels.kid(x[:200], x[200:], 20, 100, draws=draws, seed=1)
    other = kernels.kid(x[:200], x[200:] + 1, 20, 100, draws=draws, seed=1)
    assert abs(float(same.mean())) < 0.2 < float(other.mean())
    assert_close(same, kernels.kid(x[:200], x[200:], 20, 100, draws=draws, seed=1), rtol=0, atol=0)
    assert same.shape == (20,)


def test_kid_needs_enough_samples_unless_the_tool_shrinks_its_subsets() -> None:
    x, y = draw(30, 4, 15), draw(20, 4, 16)
    with pytest.raises(ValueError, match="subset_size=100 samples, got 30 real and 20 fake"):
        kernels.kid(x, y, 5, 100)
    assert kernels.kid(x, y, 5, 100, draws="clean-fid").shape == (5,)
    with pytest.raises(ValueError, match=r"Did you mean 'clean-fid'"):
        kernels.kid(x, y, 5, 10, draws="cleanfid")


def test_cmmd_of_equal_sets_is_zero_and_of_opposite_ones_the_closed_form() -> None:
    x = draw(10, 6, 17)
    assert kernels.cmmd(x, x) == pytest.approx(0, abs=1e-9)
    a, b = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[-2.0, 0.0]] * 4)
    assert kernels.cmmd(a, b) == pytest.approx(1000 * 2 * (1 - math.exp(-4 / 200)), rel=1e-12)


# ---- Inception Score ----


@pytest.mark.parametrize("tool", TOOLS)
def test_score_of_equal_rows_is_one_and_of_a_uniform_one_hot_set_the_number_of_classes(tool: str) -> None:
    assert inception_score(torch.ones(40, 7), tool, splits=4).mean == pytest.approx(1, abs=1e-9)
    hot = 1000 * torch.eye(5).repeat(40, 1)
    assert inception_score(hot, tool, splits=1).mean == pytest.approx(5, rel=1e-9)


def test_remainders_are_kept_or_dropped_as_the_tool_does() -> None:
    logits = draw(23, 5, 18)
    assert len(inception_score(logits, "dgm-eval", splits=4).values) == 4
    assert len(inception_score(logits, "adm", chunk=10).values) == 3
    assert len(inception_score(logits, "torchmetrics", splits=4).values) == 4
    assert inception_score(logits, "stylegan", splits=3) == inception_score(logits, "torch-fidelity", splits=3, shuffle=False)


def test_fewer_samples_than_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="10 splits need at least as many samples, got 4"):
        inception_score(torch.ones(4, 3))


# ---- others ----


def test_vendi_score_counts_different_samples() -> None:
    assert similarity.vendi_score(torch.ones(6, 4)) == pytest.approx(1)
    assert similarity.vendi_score(torch.eye(5)) == pytest.approx(5)


def test_clip_scores() -> None:
    images, texts = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, -3.0]])
    assert similarity.cosines(images, texts).tolist() == [1, -1]
    assert similarity.clip_score(images, texts) == 0
    assert similarity.clipscore_pairs(images, texts).tolist() == [2.5, 0]
    with pytest.raises(ValueError, match="n=2"):
        similarity.cosines(images, texts[:1])


def test_copied_training_samples_raise_the_memorisation_informed_distance() -> None:
    real = draw(50, 16, 19)
    copied = real[:20] + 1e-3 * draw(20, 16, 20)
    assert similarity.memorisation_informed_fid(3.0, real, draw(20, 16, 21)) == pytest.approx(3)
    assert similarity.memorisation_informed_fid(3.0, real, copied) > 1000
    assert similarity.memorisation_informed_fid(3.0, real, copied, over_real=True) < 1000


def test_sliced_distances_vanish_for_equal_sets_and_follow_a_shift() -> None:
    x = draw(300, 6, 22)
    assert similarity.sliced_distance(x, x.clone(), 20) == pytest.approx(0, abs=1e-12)
    assert similarity.sliced_distance(x, x + 1, 4000) == pytest.approx(3 * 6, rel=0.05)  # E (u . 1)^2 = 1, times 3 d
    assert similarity.approximate_sliced_wasserstein(x, x + 1) == pytest.approx(1, rel=1e-6)
    assert similarity.sliced_distance(x, draw(100, 6, 23), 10) == similarity.sliced_distance(x, draw(100, 6, 23), 10)
