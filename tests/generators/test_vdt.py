"""Laws of the video transformer, its layout and its masks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from genkit import convert
from genkit.convert import vdt
from genkit.data.video_masks import MODES, block_mask, make_mask
from genkit.generators.vdt import SIZES, VDTTransformer3DModel

SMALL: dict[str, Any] = {"sample_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_frames": 3}


def build(**options: Any) -> VDTTransformer3DModel:
    """A model whose every layer acts."""
    torch.manual_seed(0)
    model = VDTTransformer3DModel(**(SMALL | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def clips(f: int = 3, side: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, f, 4, side, side, generator=generator), torch.tensor([3, 700])


def test_published_sizes_have_the_published_parameter_counts() -> None:
    for name, count in {"vdt_s_2": 41_361_056, "vdt_l_2": 859_704_224}.items():
        with torch.device("meta"):
            model = VDTTransformer3DModel(**SIZES[name], num_classes=1)
        assert sum(p.numel() for p in model.parameters()) == count


def test_a_new_model_returns_zero_and_samples_do_not_see_each_other() -> None:
    x, t = clips()
    assert float(VDTTransformer3DModel(**SMALL)(x, t).sample.abs().max()) == 0
    model = build()
    with torch.no_grad():
        both = model(x, t).sample
        assert_close(model(x[1:], t[1:]).sample[0], both[1], rtol=1e-5, atol=1e-5)


def test_frames_meet_in_temporal_attention_only() -> None:
    model, (x, t) = build(), clips()
    changed = x.clone()
    changed[:, 1] += 1
    with torch.no_grad():
        assert not torch.allclose(model(changed, t).sample[:, 0], model(x, t).sample[:, 0])
        for block in model.blocks:
            time = cast(Any, block).branches[0].f
            time.proj2.weight.zero_()
            time.proj2.bias.zero_()
        assert_close(model(changed, t).sample[:, 0], model(x, t).sample[:, 0], rtol=0, atol=0)
        assert not torch.allclose(model(changed, t).sample[:, 1], model(x, t).sample[:, 1])


def test_merging_changes_nothing_and_is_remembered(tmp_path: Path) -> None:
    model, (x, t) = build(), clips()
    with torch.no_grad():
        before = model(x, t).sample
        model.merge_temporal()
        assert_close(model(x, t).sample, before, rtol=1e-5, atol=1e-5)
        model.save_pretrained(tmp_path)
        again = VDTTransformer3DModel.from_pretrained(tmp_path)
        assert_close(again(x, t).sample, model(x, t).sample, rtol=0, atol=0)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in build().parameters()) - 2 * (16 * 16 + 16)


def test_other_lengths_and_grids_than_trained() -> None:
    model = build(sample_size=[4, 6])
    x, t = clips(f=5, side=8)
    assert model(x, t).sample.shape == (2, 5, 8, 8, 8)


def test_text_labels_and_the_null_row() -> None:
    model, (x, t) = build(text_dim=5, num_classes=3), clips()
    with torch.no_grad():
        plain = model(x, t).sample
        assert_close(model(x, t, torch.zeros(2, dtype=torch.long), torch.zeros(2, 5)).sample, plain, rtol=0, atol=0)
        assert not torch.allclose(model(x, t, torch.tensor([1, 2])).sample, plain)
        assert not torch.allclose(model(x, t, None, torch.ones(2, 5)).sample, plain)
    assert model.drop_labels(torch.tensor([0, 1]), torch.tensor([0.05, 0.5])).tolist() == [3, 1]
    with pytest.raises(ValueError, match="takes no text"):
        build()(x, t, None, torch.ones(2, 5))
    with pytest.raises(ValueError, match="has class_dropout=0"):
        _ = build(class_dropout=0.0).null_class


def test_every_parameter_learns_checkpointing_and_half_precision() -> None:
    (x, t), found = clips(), []
    for checkpointing in (False, True):
        model = build(text_dim=5).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(x, t, None, torch.ones(2, 5)).sample.square().mean().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=0, atol=0)
    half = build().to(torch.bfloat16)
    with torch.no_grad():
        wanted, rough = build()(x, t).sample, half(x.bfloat16(), t).sample.float()
    assert float((rough - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize("temporal", [True, False])
def test_round_trip_through_the_official_layout(temporal: bool, tmp_path: Path) -> None:
    model = build() if temporal else build(temporal=False, num_frames=1)
    official = vdt.to_official(model)
    again, _ = vdt.from_official(official, num_heads=2, merge=False)
    for key, value in vdt.to_official(again).items():
        assert_close(value, official[key], rtol=0, atol=0)
    if temporal:
        torch.save({"ema": {f"module.{key}": value for key, value in official.items()}}, tmp_path / "model.pt")
        x, t = clips()
        loaded: Any = convert.load("vdt", tmp_path, num_heads=2)
        with torch.no_grad():
            assert_close(loaded(x, t).sample, model(x, t).sample, rtol=1e-5, atol=1e-5)
        merged = vdt.to_official(loaded)
        assert_close(merged["blocks.0.temporal_fc.weight"], torch.eye(16), rtol=0, atol=0)
        with pytest.raises(ValueError, match="known for the published widths"):
            vdt.from_official(official)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 18}, "multiple of 4"),
        ({"sample_size": 5}, "patch_size must divide"),
        ({"num_frames": 0}, "num_frames must be at least 1"),
        ({"temporal": False}, "1 without temporal=True"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_wrong_clips_are_refused() -> None:
    with pytest.raises(ValueError, match="c=4"):
        build()(torch.randn(1, 3, 3, 4, 4), 5)
    with pytest.raises(ValueError, match="whole 2x2 patches"):
        build()(torch.randn(1, 3, 4, 5, 4), 5)


# ---- masks ----


def test_modes_give_what_they_say() -> None:
    draw = random.Random(0)
    shown = {mode: (~make_mask(mode, 16, 4, 4, draw).any(2).any(1)).nonzero().flatten().tolist() for mode in MODES[:5]}
    assert shown["predict"] == list(range(8)) and shown["backward"] == list(range(8, 16))
    assert shown["interpolation"] == [0, 4, 8, 12] and shown["unconditional"] == []
    assert len(shown["one_frame"]) == 1


def test_a_spatio_temporal_mask_is_one_region_in_a_run_of_frames_and_never_empty() -> None:
    for seed in range(50):
        mask = make_mask("spatial_temporal", 12, 8, 8, random.Random(seed))
        touched = mask.flatten(1).any(1)
        assert bool(touched.any())
        assert bool((mask[touched] == mask[touched][:1]).all())
        assert 0.3 < float(mask[touched].float().mean()) <= 0.5
    empty = [not bool(make_mask("spatial_temporal", 12, 8, 8, random.Random(seed), official=True).any()) for seed in range(200)]
    assert 0.15 < sum(empty) / 200 < 0.35


def test_block_masks_cover_at_most_the_share() -> None:
    for ratio in (0.1, 0.3, 0.7):
        areas = [float(block_mask(16, 16, ratio, random.Random(seed)).float().mean()) for seed in range(20)]
        assert max(areas) <= ratio + 1e-6 and sum(areas) / 20 > 0.7 * ratio


def test_unknown_modes_are_named() -> None:
    with pytest.raises(ValueError, match="unknown mask mode 'forward'"):
        make_mask("forward", 4, 2, 2, random.Random(0))


def test_other_blocks_by_name() -> None:
    published = build(stack="(axial('f') + axial('hw') + mlp(act='gelu_tanh')) * 2")
    x, t = clips()
    with torch.no_grad():
        assert published(x, t).sample.shape == (2, 3, 8, 4, 4)
        other = build(stack="axial('f') + window(2) + mlp, retention(scan='cross') + conv + mlp")
        assert_close(other(x[1:], t[1:]).sample, other(x, t).sample[1:], rtol=1e-5, atol=1e-5)
    assert float(VDTTransformer3DModel(**SMALL, stack="(attention + mlp) * 2")(x, t).sample.abs().max()) == 0
    two = build(stack="(axial(axes='f', out_layers=2) + axial + mlp) * 2")
    with torch.no_grad():
        before = two(x, t).sample
        two.merge_temporal()
        again = VDTTransformer3DModel.from_config(two.config).eval()
        again.load_state_dict(two.state_dict())
        assert_close(again(x, t).sample, before, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="depth=2, got 3 blocks"):
        build(stack="(axial + mlp) * 3")
