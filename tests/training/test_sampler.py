"""Data order and draws are functions of (seed, step)."""

from __future__ import annotations

import pytest
import torch

from genkit.training.sampler import GlobalBatchSampler, fold_seed
from genkit.training.task import StepContext


def test_every_sample_comes_once_per_pass_also_across_batches() -> None:
    sampler = GlobalBatchSampler(11, 4, seed=3)
    row = torch.cat([sampler.indices(step) for step in range(11)])
    for epoch in range(4):
        assert sorted(row[epoch * 11 : (epoch + 1) * 11].tolist()) == list(range(11))
    assert row[:11].tolist() != row[11:22].tolist()


def test_batch_is_a_function_of_seed_and_step_whatever_was_asked_before() -> None:
    first, later = GlobalBatchSampler(5, 13, seed=3), GlobalBatchSampler(5, 13, seed=3, step0=6, stop=8)
    expected = [first.indices(step).tolist() for step in (6, 7)]
    assert list(later) == expected
    assert first.indices(6).tolist() == expected[0]
    assert GlobalBatchSampler(5, 13, seed=4).indices(6).tolist() != expected[0]


def test_processes_share_the_batch_in_order() -> None:
    whole = GlobalBatchSampler(9, 6, seed=0)
    ranks = [list(GlobalBatchSampler(9, 6, seed=0, stop=3, rank=r, world=3)) for r in range(3)]
    for step in range(3):
        assert [i for rank in ranks for i in rank[step]] == whole.indices(step).tolist()


def test_sampler_refuses_what_it_cannot_divide() -> None:
    with pytest.raises(ValueError, match="multiple of the number of processes"):
        GlobalBatchSampler(9, 6, seed=0, world=4)
    with pytest.raises(ValueError, match="empty"):
        GlobalBatchSampler(0, 6, seed=0)


def test_draws_do_not_depend_on_processes_or_parts() -> None:
    device = torch.device("cpu")
    whole = StepContext(5, 1, device).rand("noise", 12, 3)
    pieces = [StepContext(5, 1, device, {}, 2, rank, part, 3).rand("noise", 2, 3) for rank in range(2) for part in range(3)]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=0)
    assert StepContext(5, 1, device, {}, 2, 1, 2, 3).draw("level") == StepContext(5, 1, device).draw("level")


def test_draws_differ_by_seed_step_and_name() -> None:
    device = torch.device("cpu")
    values = [StepContext(step, seed, device).draw(name) for step in (0, 1) for seed in (0, 1) for name in ("a", "b")]
    assert len(set(values)) == 8
    assert fold_seed(1, 23) != fold_seed(12, 3)
    assert 0 <= fold_seed("x") < 2**63
