"""Laws of the masked-token schedule."""

from __future__ import annotations

import inspect
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genkit.schedulers.masked_token import MaskedTokenScheduler, cosine_counts, draw_tokens, guide

NUM_CODES, NUM_TOKENS = 12, 30
PUBLIC = list(inspect.signature(MaskedTokenScheduler).parameters)
STRATEGY = {
    "gen_steps": 4,
    "manual_ratios": [0.9, 0.5, 0.01],
    "manual_temp": [2.0, 1.0, 0.5],
    "manual_samp_temp": [3.0, 2.0, 1.0, 0.00001],
    "manual_cfg": [0.0001, 0.5, 1.5, 2.0],
}


def build(num_steps: int = 8, **options: float | str) -> MaskedTokenScheduler:
    scheduler = MaskedTokenScheduler(mask_token_id=NUM_CODES, **options)
    scheduler.set_timesteps(num_steps)
    return scheduler


def run(scheduler: MaskedTokenScheduler, ids: Tensor, seed: int = 0) -> list[Tensor]:
    """Sample with random logits; returns the grid before the first step and after each."""
    generator = torch.Generator().manual_seed(seed)
    grids, num_masked = [ids], int((ids[0] == NUM_CODES).sum())
    masked = (ids == NUM_CODES).nonzero()[:, 1].view(len(ids), -1)
    assert scheduler.num_inference_steps is not None
    for s in range(scheduler.num_inference_steps):
        logits = torch.randn(*masked.shape, NUM_CODES, generator=generator)
        uniforms, noise = torch.rand(2, *masked.shape, generator=generator)
        out = scheduler.step(
            logits, s, grids[-1], masked, token_uniforms=uniforms, confidence_gumbel=-(-noise.log()).log(), num_masked=num_masked
        )
        masked = out.masked_index
        grids.append(out.ids)
    return grids


@pytest.mark.parametrize(
    ("num_tokens", "num_steps", "expected"),
    [
        (256, 8, [251, 236, 212, 181, 142, 97, 49, 0]),
        (256, 4, [236, 181, 97, 0]),
        (1024, 8, [1004, 946, 851, 724, 568, 391, 199, 0]),
        (256, 3, [221, 128, 0]),  # cos(pi/3) in single precision would give 127
        (256, 1, [0]),
    ],
)
def test_cosine_counts_are_the_published_ones(num_tokens: int, num_steps: int, expected: list[int]) -> None:
    assert cosine_counts(num_tokens, num_steps) == expected


def test_counts_never_grow_even_if_steps_reveal_nothing() -> None:
    counts = build(40).masked_counts(9)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 8
    assert counts[-1] == 0
    assert len(set(counts)) < len(counts)


def test_list_counts_follow_the_clamp_of_the_published_rule() -> None:
    scheduler = MaskedTokenScheduler.from_strategy(STRATEGY, NUM_CODES)
    assert scheduler.masked_counts(256) == [230, 128, 2, 0]
    assert scheduler.masked_counts(16) == [14, 8, 1, 0]  # never fewer than one before the end
    stuck = MaskedTokenScheduler(mask_token_id=NUM_CODES, rule="lists", mask_ratios=[1.0, 1.0])
    assert stuck.masked_counts(10) == [9, 8, 0]  # at least one token is revealed


def test_grids_fill_monotonically_and_visible_tokens_never_change() -> None:
    scheduler = build(8)
    grids = run(scheduler, torch.full((3, NUM_TOKENS), NUM_CODES))
    counts = [(grid == NUM_CODES).sum(1).tolist() for grid in grids]
    assert counts == [[count] * 3 for count in [NUM_TOKENS, *scheduler.masked_counts(NUM_TOKENS)]]
    for before, after in itertools.pairwise(grids):
        visible = before != NUM_CODES
        assert torch.equal(before[visible], after[visible])
    assert int(grids[-1].max()) < NUM_CODES


def test_partly_filled_grid_keeps_its_tokens_and_follows_the_rule() -> None:
    ids = torch.full((2, NUM_TOKENS), NUM_CODES)
    ids[:, ::3] = 5
    grids = run(build(4), ids)
    assert [(grid[0] == NUM_CODES).sum().item() for grid in grids] == [20, *cosine_counts(20, 4)]
    assert bool((grids[-1][:, ::3] == 5).all())


def test_step_returns_both_index_sets_in_raster_order() -> None:
    scheduler, masked = build(2), torch.arange(NUM_TOKENS).expand(2, -1)
    noise = torch.rand(2, 2, NUM_TOKENS)
    ids = torch.full((2, NUM_TOKENS), NUM_CODES)
    out = scheduler.step(torch.randn(2, NUM_TOKENS, NUM_CODES), 0, ids, masked, token_uniforms=noise[0], confidence_gumbel=noise[1])
    for index in (out.masked_index, out.revealed_index):
        assert torch.equal(index, index.sort(dim=1).values)
    assert torch.equal(torch.cat([out.masked_index, out.revealed_index], 1).sort(dim=1).values, masked)
    assert bool((out.ids.gather(1, out.masked_index) == NUM_CODES).all())


def test_confidence_is_the_untempered_log_probability_plus_annealed_noise() -> None:
    scheduler, logits = build(4, mask_temperature=2.0), torch.randn(1, NUM_TOKENS, NUM_CODES)
    noise = torch.randn(1, NUM_TOKENS)
    ids, masked = torch.full((1, NUM_TOKENS), NUM_CODES), torch.arange(NUM_TOKENS)[None]
    gumbel = torch.zeros(1, NUM_TOKENS, NUM_CODES)
    out = scheduler.step(logits, 1, ids, masked, token_gumbel=gumbel, confidence_gumbel=noise)
    expected = logits.log_softmax(-1).amax(-1) + 2.0 * 0.5 * noise
    torch.testing.assert_close(out.confidence, expected, rtol=1e-6, atol=1e-6)
    kept = out.confidence.gather(1, out.revealed_index)
    assert float(kept.min()) >= float(out.confidence.gather(1, out.masked_index).max())


def test_inverse_cdf_draws_the_tempered_distribution() -> None:
    log_probs = torch.tensor([0.5, 0.3, 0.2, 0.0]).log().expand(1, 20_000, 4)
    uniforms = torch.rand(1, 20_000, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 2.0):
        expected = (log_probs[0, 0] / temperature).softmax(-1)
        share = torch.bincount(draw_tokens(log_probs, temperature, uniforms=uniforms).flatten(), minlength=4) / 20_000
        torch.testing.assert_close(share, expected, rtol=0, atol=0.015)


def test_inverse_cdf_never_draws_a_code_of_probability_zero() -> None:
    log_probs = torch.tensor([-math.inf, 0.0, -1.0, -math.inf]).log_softmax(-1).expand(1, 2, 4)
    uniforms = torch.tensor([[0.0, 1.0 - 2**-24]])
    assert draw_tokens(log_probs, 1.0, uniforms=uniforms).tolist() == [[1, 2]]


def test_last_step_is_greedy_and_needs_no_confidence_noise() -> None:
    logits = torch.rand(2, NUM_TOKENS, NUM_CODES).argsort(-1).float()  # no near ties
    ids, masked = torch.full((2, NUM_TOKENS), NUM_CODES), torch.arange(NUM_TOKENS).expand(2, -1)
    out = build(1).step(logits, 0, ids, masked, token_uniforms=torch.rand(2, NUM_TOKENS))
    assert torch.equal(out.ids, logits.argmax(-1))
    assert out.masked_index.shape == (2, 0)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    scheduler, logits = build(4), torch.randn(3, NUM_TOKENS, NUM_CODES)
    ids, masked = torch.full((3, NUM_TOKENS), NUM_CODES), torch.arange(NUM_TOKENS).expand(3, -1)
    noise = torch.rand(2, 3, NUM_TOKENS)
    together = scheduler.step(logits, 0, ids, masked, token_uniforms=noise[0], confidence_gumbel=noise[1])
    alone = scheduler.step(logits[1:2], 0, ids[1:2], masked[1:2], token_uniforms=noise[0, 1:2], confidence_gumbel=noise[1, 1:2])
    assert torch.equal(together.ids[1:2], alone.ids)


def test_schedules_at_each_step() -> None:
    scheduler = build(8)
    assert [scheduler.token_temperature_at(s) for s in range(8)] == [5.25, 4.5, 3.75, 3.0, 2.25, 1.5, 0.75, 0.001]
    assert scheduler.mask_temperature_at(0) == 1.5 * 7 / 8
    assert scheduler.mask_temperature_at(7) == 0
    assert [scheduler.guidance_at(s, 3.5) for s in (0, 4, 7)] == [1, 2.25, 1 + 2.5 * 7 / 8]
    assert build(8, guidance="constant").guidance_at(0, 3.5) == 3.5


def test_strategy_file_gives_the_lists_of_each_step(tmp_path: Path) -> None:
    file = tmp_path / "strategy.yaml"
    file.write_text("\n".join(f"{key}: {value}" for key, value in STRATEGY.items()))
    scheduler = MaskedTokenScheduler.from_strategy(file, NUM_CODES)
    assert scheduler.timesteps.tolist() == [0, 1, 2, 3]
    assert [scheduler.guidance_at(s) for s in range(4)] == [1.0001, 1.5, 2.5, 3.0]
    assert [scheduler.token_temperature_at(s) for s in range(4)] == [3.0, 2.0, 1.0, 1e-4]
    assert [scheduler.mask_temperature_at(s) for s in range(4)] == [2.0, 1.0, 0.5, 0.0]


def test_guide_is_the_published_formula_and_off_at_one() -> None:
    cond, uncond = torch.randn(2, 5), torch.randn(2, 5)
    assert guide(cond, uncond, 1.0) is cond
    torch.testing.assert_close(guide(cond, uncond, 3.5), cond + 2.5 * (cond - uncond), rtol=0, atol=0)
    assert guide(cond.bfloat16(), uncond.bfloat16(), 2.0).dtype == torch.float32


def test_save_and_load_give_the_same_scheduler(tmp_path: Path) -> None:
    scheduler = MaskedTokenScheduler.from_strategy(STRATEGY, NUM_CODES)
    scheduler.save_pretrained(tmp_path)
    loaded = MaskedTokenScheduler.from_pretrained(tmp_path)
    assert loaded.masked_counts(256) == scheduler.masked_counts(256)
    for other in (loaded, MaskedTokenScheduler.from_config(scheduler.config)):
        assert {key: other.config[key] for key in PUBLIC} == {key: scheduler.config[key] for key in PUBLIC}


def test_start_temperatures_hold_for_one_run_only() -> None:
    scheduler = build(4)
    scheduler.set_timesteps(4, token_temperature=2.0, mask_temperature=0.0)
    assert (scheduler.token_temperature_at(1), scheduler.mask_temperature_at(1)) == (1.0, 0.0)
    scheduler.set_timesteps(4)
    assert (scheduler.token_temperature_at(1), scheduler.mask_temperature_at(1)) == (3.0, 0.75)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "cosin"}, "Did you mean 'cosine'"),
        ({"rule": "lists"}, "mask_ratios belong to"),
        ({"mask_ratios": [0.5]}, "mask_ratios belong to"),
        ({"guidance": "lists"}, "guidance_scales belong to"),
        ({"rule": "lists", "mask_ratios": [0.5, 1.5]}, r"\[0, 1\]"),
        ({"rule": "lists", "mask_ratios": [0.5], "token_temperatures": [1.0]}, "one number of steps"),
        ({"token_temperature": -1.0}, "token_temperature must be >= 0"),
        ({"token_temperature_floor": 0.0}, "must be > 0"),
    ],
)
def test_impossible_configs_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedTokenScheduler(mask_token_id=NUM_CODES, **options)


def test_wrong_use_is_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="set_timesteps"):
        MaskedTokenScheduler(mask_token_id=NUM_CODES).masked_counts(4)
    listed = MaskedTokenScheduler.from_strategy(STRATEGY, NUM_CODES)
    with pytest.raises(ValueError, match="describe 4 steps, got 8"):
        listed.set_timesteps(8)
    with pytest.raises(ValueError, match="token_temperature is fixed"):
        listed.set_timesteps(4, token_temperature=1.0)
    with pytest.raises(ValueError, match="leave guidance_scale out"):
        listed.guidance_at(0, 2.0)
    scheduler = build(8)
    with pytest.raises(ValueError, match="needs guidance_scale"):
        scheduler.guidance_at(0)
    with pytest.raises(ValueError, match="at least 1"):
        scheduler.guidance_at(0, 0.5)
    with pytest.raises(ValueError, match="at least 1"):
        scheduler.set_timesteps(0)
    with pytest.raises(ValueError, match=r"0 \.\. 7, got 8"):
        scheduler.mask_temperature_at(8)
    with pytest.raises(ValueError, match=r"manual_samp_temp.*missing"):
        MaskedTokenScheduler.from_strategy({"manual_ratios": [0.5]}, NUM_CODES)


def test_step_refuses_missing_noise_and_contradictions() -> None:
    scheduler, logits = build(4), torch.zeros(1, 6, NUM_CODES)
    ids, masked, uniforms = torch.full((1, 30), NUM_CODES), torch.arange(6)[None], torch.zeros(1, 6)
    with pytest.raises(ValueError, match="either token_uniforms"):
        scheduler.step(logits, 3, ids, masked)
    with pytest.raises(ValueError, match="pass num_masked"):
        scheduler.step(logits, 0, ids, masked, token_uniforms=uniforms)
    with pytest.raises(ValueError, match="confidence_gumbel is needed"):
        scheduler.step(logits, 0, ids, masked, token_uniforms=uniforms, num_masked=6)
    with pytest.raises(ValueError, match="masked_index must be"):
        scheduler.step(logits, 3, ids, masked[:, :5], token_uniforms=uniforms)
