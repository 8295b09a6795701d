"""Contract of ENATPipeline: seeds, loop, guidance, repainting, outputs."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from genkit.pipelines.enat import ENATPipeline
from genkit.pipelines.enat_loop import ENATStepState
from genkit.pipelines.seeds import SampleStreams, gumbel
from genkit.schedulers.masked_token import MaskedTokenScheduler, guide

from .conftest import CODES, LABELS, make_text_encoder, make_transformer, make_vqvae


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def run(pipe: ENATPipeline, prompt: Any, **options: Any) -> Any:
    return pipe(prompt, **{"num_inference_steps": 4, "output_type": "pt", **options})


def test_a_sample_is_bit_equal_alone_in_any_batch_and_at_any_position(pipe: ENATPipeline, prompts: list[str]) -> None:
    batch = run(pipe, prompts, generator=[11, 12, 13])
    shuffled = run(pipe, [prompts[2], prompts[0]], num_images_per_prompt=2, generator=[13, 1, 2, 11])
    for index, (prompt, seed) in enumerate(zip(prompts, batch.seeds, strict=True)):
        alone = run(pipe, prompt, generator=[seed])
        same(alone.tokens[0], batch.tokens[index])
        same(alone.images[0], batch.images[index])
    same(shuffled.images[0], batch.images[2])
    same(shuffled.images[3], batch.images[0])
    assert len({tuple(tokens.flatten().tolist()) for tokens in batch.tokens}) == 3


def test_samples_evaluated_together_make_the_same_tokens(pipe: ENATPipeline, prompts: list[str]) -> None:
    apart = run(pipe, prompts, num_images_per_prompt=2, generator=5, samples_at_once=1)
    together = run(pipe, prompts, num_images_per_prompt=2, generator=5, samples_at_once=4)
    same(apart.tokens, together.tokens)
    torch.testing.assert_close(apart.images, together.images, rtol=0, atol=1 / 255)


def plain_loop(pipe: ENATPipeline, prompt: Any, seed: int, steps: int, scale: float) -> Tensor:
    """The same sampling in the plain order of computation: two forwards a step, all positions, no index known in advance."""
    net, scheduler = pipe.transformer, copy.copy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    if pipe.is_text_model:
        texts = [pipe.encode_prompt([text]) for text in (prompt, "")]
        conditions = [net.prepare_condition(text=t.tokens, text_mask=t.mask, pooled=t.pooled) for t in texts]
    else:
        conditions = [net.prepare_condition(torch.tensor([label])) for label in (prompt, net.null_class)]
    ids, states, streams = torch.full((1, net.num_tokens), CODES), [None, None], SampleStreams([seed])
    for s in range(steps):
        outputs = [net(ids, c, state) for c, state in zip(conditions, states, strict=True)]
        states = [output.state for output in outputs]
        masked = (ids[0] == CODES).nonzero().T
        logits = guide(outputs[0].logits[:, masked[0]], outputs[1].logits[:, masked[0]], 1 + (scale - 1) * s / steps)
        draws = streams.uniform(2, net.num_tokens)[:, :, masked[0]]
        ids = scheduler.step(logits, s, ids, masked, token_uniforms=draws[:, 0], confidence_gumbel=gumbel(draws[:, 1])).ids
    return ids


@torch.no_grad()
def test_the_fast_loop_equals_the_plain_order_of_computation(pipe: ENATPipeline, prompts: list[str]) -> None:
    prompt = prompts[0] if pipe.is_text_model else 1
    for steps, scale in ((1, 3.0), (3, 1.0), (6, 4.0), (30, 2.0)):
        fast = run(pipe, prompt, generator=[3], num_inference_steps=steps, guidance_scale=scale)
        same(fast.tokens.flatten(1), plain_loop(pipe, prompt, 3, steps, scale))


def count_rows(pipe: ENATPipeline, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note the batch of every evaluation of the generator."""
    rows: list[int] = []
    forward = pipe.transformer.forward

    def counted(ids: Tensor, *args: Any, **options: Any) -> Any:
        rows.append(len(ids))
        return forward(ids, *args, **options)

    monkeypatch.setattr(pipe.transformer, "forward", counted)
    return rows


def test_guidance_1_never_asks_for_the_unconditional_branch(
    pipe: ENATPipeline, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = count_rows(pipe, monkeypatch)
    run(pipe, prompts[0], guidance_scale=1.0, generator=[1])
    assert rows == [1] * 4
    rows.clear()
    run(pipe, prompts[0], guidance_scale=2.0, generator=[1])
    assert rows == ([1, 1] if pipe.is_text_model else [1]) + [2] * 3


def test_step_0_runs_once_per_distinct_prompt(pipe: ENATPipeline, prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = count_rows(pipe, monkeypatch)
    run(pipe, [prompts[0], prompts[1], prompts[0]], num_images_per_prompt=3, num_inference_steps=1, guidance_scale=1, samples_at_once=9)
    assert rows == [2]


def test_masked_counts_follow_the_schedule_and_visible_tokens_stay(pipe: ENATPipeline, prompts: list[str]) -> None:
    scheduler = copy.copy(pipe.scheduler)
    scheduler.set_timesteps(6)
    before = torch.full((2, 24), CODES)
    for state, count in zip(pipe.iterate(prompts[:2], num_inference_steps=6, generator=1), scheduler.masked_counts(24), strict=True):
        assert (state.sample == CODES).sum(1).tolist() == [count, count]
        assert state.masked_index.shape == (2, count)
        same(state.sample[before != CODES], before[before != CODES])
        assert int(state.predicted.max()) < CODES
        before = state.sample.clone()


def test_call_equals_the_drained_loop_and_a_saved_state_resumes_and_rewinds(pipe: ENATPipeline, prompts: list[str]) -> None:
    expected = run(pipe, prompts[:2], generator=[4, 5])
    states = [state.clone() for state in pipe.iterate(prompts[:2], num_inference_steps=4, generator=[4, 5])]
    same(states[-1].sample, expected.tokens.flatten(1))
    for saved in states[:-1]:
        for _ in range(2):
            *_, last = pipe.iterate(state=saved)
            same(last.sample, expected.tokens.flatten(1))
    with pytest.raises(ValueError, match="after the last of 4"):
        pipe.iterate(state=states[-1])
    with pytest.raises(ValueError, match="leave prompt"):
        pipe.iterate("x", state=states[0])


def test_two_loops_of_different_length_do_not_disturb_each_other(pipe: ENATPipeline, prompts: list[str]) -> None:
    a = pipe.iterate(prompts[0], num_inference_steps=4, generator=[1])
    b = pipe.iterate(prompts[0], num_inference_steps=6, generator=[1], guidance_scale=1.5)
    first = [next(a), next(b), next(a), next(b), *a, *b]
    same(first[5].sample, run(pipe, prompts[0], generator=[1]).tokens.flatten(1))
    same(first[-1].sample, run(pipe, prompts[0], generator=[1], num_inference_steps=6, guidance_scale=1.5).tokens.flatten(1))


def test_close_ends_the_loop_and_preview_shows_it(class_pipe: ENATPipeline) -> None:
    loop = class_pipe.iterate("bed", generator=[1, 2], num_images_per_prompt=2)
    state = next(loop)
    pictures = class_pipe.preview(state)
    loop.close()
    assert [picture.size for picture in pictures] == [(16, 24)] * 2
    assert list(loop) == []


@pytest.mark.parametrize("in_place", [True, False])
def test_the_loop_goes_on_from_a_changed_sample(pipe: ENATPipeline, prompts: list[str], in_place: bool) -> None:
    last: ENATStepState | None = None
    for state in pipe.iterate(prompts[0], num_inference_steps=5, generator=[1]):
        last = state
        if state.index == 2:
            changed = state.sample if in_place else state.sample.clone()
            changed[:, :6] = torch.arange(6)
            state.sample = changed
    assert last is not None
    assert last.sample[0, :6].tolist() == list(range(6))
    assert not bool((last.sample == CODES).any())


def test_hiding_tokens_again_lets_the_loop_fill_them_again(pipe: ENATPipeline, prompts: list[str]) -> None:
    *_, almost, _ = [state.clone() for state in pipe.iterate(prompts[0], num_inference_steps=5, generator=[1])]
    almost.sample[:] = CODES
    *_, last = pipe.iterate(state=almost)
    assert not bool((last.sample == CODES).any())


def test_a_broken_change_of_the_sample_is_refused(class_pipe: ENATPipeline) -> None:
    def change(value: Tensor) -> None:
        loop = class_pipe.iterate("bed", num_images_per_prompt=2, generator=[1, 2])
        next(loop).sample = value
        next(loop)

    uneven = torch.full((2, 24), CODES)
    uneven[0, 0] = 1
    for value, text in (
        (uneven, r"\[23, 24\]"),
        (torch.full((2, 24), CODES + 1), "must lie in"),
        (torch.zeros(2, 5, dtype=torch.int64), "24"),
    ):
        with pytest.raises(ValueError, match=text):
            change(value)


def test_callbacks_get_the_fields_and_may_change_the_sample(class_pipe: ENATPipeline) -> None:
    seen = []

    def callback(pipe: ENATPipeline, step: int, timestep: int, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, timestep, sorted(fields)))
        fields["sample"][:, 0] = 7
        return fields

    names = ["sample", "predicted"]
    output = run(class_pipe, "bed", generator=[1], callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert seen == [(s, s, sorted(names)) for s in range(4)]
    assert int(output.tokens[0, 0, 0]) == 7
    with pytest.raises(ValueError, match="'predicted'"):
        run(class_pipe, "bed", callback_on_step_end=lambda *_: {"predicted": torch.zeros(1)})
    with pytest.raises(ValueError, match="Did you mean 'sample'"):
        run(class_pipe, "bed", callback_on_step_end_tensor_inputs=["samples"])


def test_output_types_agree(class_pipe: ENATPipeline) -> None:
    outputs: dict[str, Any] = {kind: class_pipe("bed", generator=[1], output_type=kind) for kind in ("pil", "np", "pt")}
    array = outputs["np"].images
    assert array.shape == (1, 24, 16, 3)
    assert outputs["pt"].images.shape == (1, 3, 24, 16)
    assert outputs["np"].seeds == [1]
    np.testing.assert_allclose(outputs["pt"].images.permute(0, 2, 3, 1).numpy() / 2 + 0.5, array, atol=1e-6)
    np.testing.assert_allclose(np.asarray(outputs["pil"].images[0]) / 255, array[0], atol=0.5 / 255 + 1e-6)
    images, seeds, tokens = class_pipe("bed", generator=[1], return_dict=False)
    assert isinstance(images[0], Image.Image)
    assert seeds == [1]
    assert tokens.shape == (1, 6, 4)


def test_a_prompt_is_an_id_a_name_or_an_id_as_text(class_pipe: ENATPipeline) -> None:
    expected = run(class_pipe, 0, generator=[1]).tokens
    for prompt in ("chest", "Treasure Chest", "treasure chest, chest", "0"):
        same(run(class_pipe, prompt, generator=[1]).tokens, expected)


def test_text_does_not_depend_on_the_other_prompts(text_pipe: ENATPipeline) -> None:
    assert text_pipe.encode_prompt(["bed"]).tokens.shape == text_pipe.encode_prompt(["a red wooden treasure chest"]).tokens.shape


def test_a_long_prompt_is_cut_with_a_warning(text_pipe: ENATPipeline, caplog: pytest.LogCaptureFixture) -> None:
    text_pipe.encode_prompt(["a table", *["a red wooden table a red wooden table"] * 5])
    assert "5 of 6 prompts cut to 8 tokens" in caplog.text
    assert caplog.text.count("a red wooden table") == 6  # three of them are shown, the rest counted


def test_repainting_keeps_the_tokens_outside_the_mask(pipe: ENATPipeline, prompts: list[str]) -> None:
    picture = torch.rand(1, 3, 24, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = np.zeros((24, 16), np.uint8)
    mask[9:12, 5] = 255
    mask[20:, :] = 255
    output = run(pipe, prompts[0], image=picture, mask_image=Image.fromarray(mask), num_images_per_prompt=2, generator=[1, 2])
    hidden = torch.zeros(6, 4, dtype=torch.bool)
    hidden[2, 1] = True
    hidden[5, :] = True
    with torch.no_grad():
        kept = pipe.vqvae.encode(picture).indices[0]
    same(output.tokens[:, ~hidden], kept[~hidden].expand(2, -1))
    same(run(pipe, prompts[0], init_tokens=torch.where(hidden, CODES, kept), generator=[2]).tokens[0], output.tokens[1])


def test_temperatures_change_the_result_for_one_call_only(class_pipe: ENATPipeline) -> None:
    usual = run(class_pipe, "bed", generator=[1]).tokens
    cold = run(class_pipe, "bed", generator=[1], token_temperature=0.0, mask_temperature=0.0).tokens
    assert not torch.equal(usual, cold)
    same(cold, run(class_pipe, "bed", generator=[9], token_temperature=0.0, mask_temperature=0.0).tokens)
    same(run(class_pipe, "bed", generator=[1]).tokens, usual)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"prompt": []}, "empty list"),
        ({"prompt": "wooden tabel"}, "Did you mean 'wooden table'"),
        ({"prompt": 3}, r"0 \.\. 2, got 3"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"guidance_scale": 0.5}, "at least 1"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"samples_at_once": 0}, "samples_at_once"),
        ({"token_temperature": -1.0}, "token_temperature"),
        ({"generator": [1, 2]}, "expected 1, got 2"),
        ({"output_type": "pill"}, "Did you mean 'pil'"),
        ({"image": torch.zeros(3, 24, 16)}, "mask_image"),
        ({"image": torch.zeros(3, 24, 16), "mask_image": torch.zeros(24, 16)}, "white"),
        ({"image": torch.zeros(3, 24, 18), "mask_image": torch.ones(24, 16)}, "resize"),
        ({"image": torch.zeros(3, 24, 16), "mask_image": torch.ones(20, 16)}, "resize"),
        ({"init_tokens": torch.full((24,), CODES + 1)}, "must lie in"),
        ({"init_tokens": torch.full((23,), CODES)}, "24"),
        ({"init_tokens": torch.full((2, 24), CODES)}, "expected 1 or 1"),
    ],
)
def test_bad_input_is_one_clear_error(class_pipe: ENATPipeline, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        class_pipe(**{"prompt": "bed", **options})


@pytest.mark.parametrize("prompt", [None, True, 1.5, ["bed", None]])
def test_prompts_of_another_type_are_refused(class_pipe: ENATPipeline, prompt: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="prompt"):
        class_pipe(prompt)


def test_components_that_do_not_fit_are_refused() -> None:
    scheduler = MaskedTokenScheduler(mask_token_id=CODES)
    with pytest.raises(ValueError, match="same number of codes"):
        ENATPipeline(make_transformer(), make_vqvae(codes=16), scheduler)
    with pytest.raises(ValueError, match="text_encoder"):
        ENATPipeline(make_transformer(num_classes=None, text_dim=16, pooled_dim=12), make_vqvae(), scheduler)


def test_a_text_model_with_class_names_takes_ids() -> None:
    encoder, tokenizer = make_text_encoder()
    net = make_transformer(num_classes=None, text_dim=16, pooled_dim=12)
    pipe = ENATPipeline(net, make_vqvae(), MaskedTokenScheduler(mask_token_id=CODES), encoder, tokenizer, id2label=LABELS)
    pipe.set_progress_bar_config(disable=True)
    same(run(pipe, 2, generator=[1]).tokens, run(pipe, "bed", generator=[1]).tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_runs(dtype: torch.dtype, class_pipe: ENATPipeline) -> None:
    pipe = ENATPipeline(make_transformer(), make_vqvae(), MaskedTokenScheduler(mask_token_id=CODES), id2label=LABELS)
    pipe.set_progress_bar_config(disable=True)
    output = run(pipe.to(dtype), "bed", generator=[1, 2], num_images_per_prompt=2)
    assert output.images.dtype == torch.float32
    assert bool(torch.isfinite(output.images).all())


def test_memory_estimate_grows_with_the_work(pipe: ENATPipeline) -> None:
    one, many = pipe.estimate_memory(1), pipe.estimate_memory(64)
    together = pipe.estimate_memory(64, samples_at_once=64)
    assert one.weights == many.weights > 0
    assert one.peak < many.peak < together.peak
    assert pipe.estimate_memory(64, guidance=False).sampling < many.sampling
    assert "MB" in str(one)
