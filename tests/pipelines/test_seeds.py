"""Laws of per-sample seeds."""

from __future__ import annotations

import pytest
import torch

from genkit.pipelines.seeds import SampleStreams, gumbel, resolve_seeds


def test_one_generator_draws_one_seed_per_sample_and_more_samples_keep_the_first() -> None:
    few, many = resolve_seeds(7, 2), resolve_seeds(torch.Generator().manual_seed(7), 5)
    assert few == many[:2]
    assert len(set(many)) == 5
    assert all(0 <= seed < 2**63 for seed in many)


def test_a_used_generator_gives_other_seeds() -> None:
    generator = torch.Generator().manual_seed(0)
    assert resolve_seeds(generator, 2) != resolve_seeds(generator, 2)


def test_a_list_gives_the_seeds_directly() -> None:
    assert resolve_seeds([3, torch.Generator().manual_seed(9)], 2) == [3, 9]


def test_none_gives_fresh_seeds() -> None:
    assert resolve_seeds(None, 3) != resolve_seeds(None, 3)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ([1, 2], ValueError, "expected 3, got 2"),
        ([1, -1, 2], ValueError, "-1"),
        ([1, 2.0, 3], TypeError, "float"),
        ("abc", TypeError, "str"),
    ],
)
def test_wrong_seeds_are_refused(given: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        resolve_seeds(given, 3)  # type: ignore[arg-type]


def test_streams_do_not_depend_on_the_other_samples() -> None:
    alone, together = SampleStreams([5]), SampleStreams([1, 2, 5])
    for _ in range(2):
        torch.testing.assert_close(alone.uniform(2, 3)[0], together.uniform(2, 3)[2], rtol=0, atol=0)
    torch.testing.assert_close(alone.normal(4)[0], together.normal(4)[2], rtol=0, atol=0)


def test_gumbel_noise_is_finite_at_zero_and_has_the_right_mean() -> None:
    assert bool(torch.isfinite(gumbel(torch.tensor([0.0, 1 - 2**-24]))).all())
    mean = gumbel(torch.rand(100_000, generator=torch.Generator().manual_seed(0))).mean()
    torch.testing.assert_close(mean, torch.tensor(0.5772), rtol=0, atol=0.02)
