"""Laws of the plain masked-token transformer, and its place in the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from genkit import ENATPipeline, convert
from genkit.convert import autonat
from genkit.generators.nat import SIZES, STRATEGIES, NATTransformer2DModel
from genkit.pipelines.base import GenPipeline
from genkit.pipelines.enat import published_schedule
from genkit.schedulers.masked_token import MaskedTokenScheduler
from tests.pipelines.toy import text_parts, toy_tokenizer

SMALL: dict[str, Any] = {"sample_size": [3, 5], "hidden_size": 16, "num_heads": 2, "depth": 2, "codebook_size": 11}
N = 15


def build(**options: Any) -> NATTransformer2DModel:
    torch.manual_seed(0)
    model = NATTransformer2DModel(**(SMALL | {"num_classes": 4} | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model.eval()


def grid(b: int = 3, masked: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(11, (b, N), generator=generator)
    return ids.masked_fill(torch.rand(b, N, generator=generator).argsort(1).argsort(1) < masked, 11)


def test_published_sizes_have_the_published_parameter_counts() -> None:
    with torch.device("meta"):
        large, small = (NATTransformer2DModel(**SIZES[name]) for name in ("autonat_l_256", "autonat_s_256"))
    assert sum(p.numel() for p in large.parameters()) == 193_655_297
    assert round(sum(p.numel() for p in small.parameters()) / 1e6, 1) == 45.5


@pytest.mark.parametrize("skip", [True, False])
def test_samples_are_independent_and_masked_logits_are_rows_of_all(skip: bool) -> None:
    model, ids, labels = build(skip=skip), grid(), torch.tensor([0, 2, 4])
    everything = model(ids, {"class_labels": labels}).logits
    assert everything is not None and everything.shape == (3, N, 11)
    alone = model(ids[1:2], {"class_labels": labels[1:2]}).logits
    assert_close(alone, everything[1:2], rtol=1e-5, atol=1e-5)
    index = (ids == 11).nonzero()[:, 1].view(3, 6)
    masked = model(ids, {"class_labels": labels}, masked_index=index, logits_at="masked").logits
    assert_close(masked, everything.gather(1, index[..., None].expand(-1, -1, 11)), rtol=1e-5, atol=1e-5)


def test_padding_of_texts_counts_for_nothing() -> None:
    model = build(num_classes=None, text_dim=5, pooled_dim=7)
    text, pooled = torch.randn(2, 3, 5), torch.randn(2, 7)
    plain = model(grid(2), {"text": text, "pooled": pooled}).logits
    padded = {"text": torch.cat([text, torch.randn(2, 2, 5)], 1), "text_mask": torch.arange(5).expand(2, -1) < 3, "pooled": pooled}
    assert_close(model(grid(2), padded).logits, plain, rtol=1e-5, atol=1e-5)


def test_training_reaches_every_parameter_with_and_without_checkpointing() -> None:
    model, gradients = build().train().requires_grad_(True), []
    keep = torch.rand(3, N, 16, generator=torch.Generator().manual_seed(2)) > 0.1
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.enable_gradient_checkpointing()
        logits = model(grid(), {"class_labels": torch.tensor([0, 2, 4])}, embedding_keep=keep).logits
        assert logits is not None
        logits.square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def test_official_files_go_there_and_back(tmp_path: Path) -> None:
    model = build(sample_size=4)
    state = autonat.to_official(model)
    path = tmp_path / "nnet_ema.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    assert convert.recognise(path) == ("autonat", path)
    found: Any = convert.load("autonat", path, num_heads=2)
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), model.state_dict().values(), strict=True))
    tokenizer = toy_tokenizer()
    with pytest.raises(ValueError, match="same number of codes"):
        GenPipeline.from_pretrained(path, vqvae=tokenizer, num_heads=2)
    with pytest.raises(ValueError, match="missing"):
        autonat.from_official({})


@pytest.mark.parametrize("is_text", [False, True])
def test_the_pipeline_takes_it_in_enats_place(is_text: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_classes": None, "text_dim": 12, "pooled_dim": 6} if is_text else {"num_classes": 2}
    model = build(sample_size=4, codebook_size=32, **options)
    others: dict[str, Any] = text_parts() if is_text else {"id2label": {0: "chest", 1: "table"}}
    pipe = ENATPipeline(model, toy_tokenizer(), MaskedTokenScheduler(mask_token_id=32), **others)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a table", "a golden chest"] if is_text else ["table", "chest"]
    both = pipe(prompts, num_inference_steps=3, generator=[1, 2], output_type="pt", samples_at_once=2)
    alone: Any = pipe(prompts[1], num_inference_steps=3, generator=[2], output_type="pt")
    assert torch.equal(both.tokens[1], alone.tokens[0]) and int(both.tokens.max()) < 32  # type: ignore[union-attr, index]
    states = list(pipe.iterate(prompts[0], num_inference_steps=3, generator=[1]))
    assert torch.equal(list(pipe.iterate(state=states[0]))[-1].sample, states[-1].sample)
    assert pipe.estimate_memory(2, guidance=True).peak > 0
    pipe.save_pretrained(tmp_path)
    again: Any = GenPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(prompts[1], num_inference_steps=3, generator=[2]).tokens, alone.tokens)


def test_the_searched_strategy_belongs_to_its_size() -> None:
    with torch.device("meta"):
        large, other = NATTransformer2DModel(**SIZES["autonat_l_256"]), NATTransformer2DModel(**SIZES["autonat_s_256"])
    schedule = published_schedule(large)
    assert schedule.masked_counts(256)[:2] == [int(256 * ratio) for ratio in STRATEGIES["autonat_l_256"]["manual_ratios"][:2]]
    assert published_schedule(other).config["rule"] == "cosine"


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="depth even"):
        build(depth=3)
    with pytest.raises(ValueError, match="num_classes for a class model"):
        build(text_dim=3)
    with pytest.raises(ValueError, match="needs masked_index"):
        build()(grid(1), {"class_labels": torch.tensor([0])}, logits_at="masked")
    with pytest.raises(ValueError, match="takes class_labels and nothing else"):
        build().prepare_condition(torch.tensor([0]), pooled=torch.zeros(1, 7))
    with pytest.raises(ValueError, match="no classes"):
        _ = build(num_classes=None, text_dim=5, pooled_dim=7).null_class


@pytest.mark.parametrize(
    "text",
    [
        "(attention + mlp) * 3",
        "(shsa + mlp) * 3",
        "window(2) + mlp, (reduced + mlp) * 2",
        "(linear + mlp(nested=(0.5, 1))) * 3",
        "(retention(scan='bidir') + conv + mlp) * 3",
    ],
)
def test_other_blocks_by_name(text: str, tmp_path: Path) -> None:
    model, ids, labels = build(stack=text), grid(), torch.tensor([0, 2, 4])
    logits = model(ids, {"class_labels": labels}).logits
    assert logits is not None and logits.shape == (3, N, 11)
    model.save_pretrained(tmp_path)
    again = NATTransformer2DModel.from_pretrained(tmp_path).eval()
    assert_close(again(ids, {"class_labels": labels}).logits, logits)
    other = model((ids + 1).clamp(max=11), {"class_labels": labels}).logits
    assert other is not None and not torch.allclose(other, logits)


def test_blocks_that_a_model_cannot_use_are_refused() -> None:
    with pytest.raises(ValueError, match="depth=2 means 3 blocks, got 2"):
        build(stack="(attention + mlp) * 2")
    with pytest.raises(ValueError, match="lacks mask, which this model needs"):
        build(stack="(window + mlp) * 3", num_classes=None, text_dim=5, pooled_dim=7)


NESTED = "(attention + mlp(ratio=2, nested=(0.25, 0.5, 1))) * 2, attention + mlp(nested=(0.5, 1))"


def test_a_width_is_a_smaller_network() -> None:
    model, ids, condition = build(stack=NESTED), grid(), {"class_labels": torch.tensor([0, 2, 4])}
    assert model.widths == (0.5, 1)
    full, half = model(ids, condition).logits, model(ids, condition, width=0.5).logits
    assert full is not None and half is not None
    assert_close(model(ids, condition, width=1).logits, full)
    assert not torch.allclose(half, full)
    mixed = [0.25, 1, 0.5]
    for width in (0.5, mixed):
        small = model.cut(width)
        assert small.widths == (1,) and "nested" not in small.config["stack"]
        assert_close(small(ids, condition).logits, model(ids, condition, width=width).logits, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in model.cut(mixed).parameters()) < sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="block 3 has the widths 0.5, 1, got 0.25"):
        model(ids, condition, width=0.25)
    with pytest.raises(ValueError, match="one for each of 3 blocks, got 2"):
        model.cut([1, 1])


def test_pipelines_take_a_width_for_all_steps_or_each(tmp_path: Path) -> None:
    codes = toy_tokenizer()
    side = codes.grid_for(8, 8)
    sizes = {"sample_size": list(side), "codebook_size": codes.quantizer.codebook_size, "stack": NESTED}
    pipe: Any = ENATPipeline(build(**sizes), codes, MaskedTokenScheduler(mask_token_id=32))
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 3, "generator": [5], "guidance_scale": 2.0, "output_type": "pt"}
    full, half = (pipe(1, width=width, **options).tokens for width in (None, 0.5))
    assert not torch.equal(full, half)
    assert torch.equal(pipe(1, width=[1, 1.0, [1, 1, 1]], **options).tokens, full)
    dense: Any = ENATPipeline(pipe.transformer.cut(0.5), codes, MaskedTokenScheduler(mask_token_id=32))
    dense.set_progress_bar_config(disable=True)
    assert torch.equal(dense(1, **options).tokens, half)
    dense.save_pretrained(tmp_path)
    again: Any = GenPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(1, **options).tokens, half)
    with pytest.raises(ValueError, match="one for each of 3 steps, got 2"):
        pipe(1, width=[1, 1], **options)
    with pytest.raises(ValueError, match="has the widths"):
        pipe(1, width=0.3, **options)
