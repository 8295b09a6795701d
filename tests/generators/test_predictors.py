"""Laws of the deterministic video predictors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from genkit import convert
from genkit.convert import mimo_vp, predformer
from genkit.generators.mimo_vp import MIMOVP, fold_frames, unfold_frames
from genkit.generators.predformer import PredFormer

PRED: dict[str, Any] = {"sample_size": [8, 12], "in_channels": 2, "num_frames": 3, "patch_size": 4, "dim": 8, "heads": 2, "dim_head": 4}
MIMO: dict[str, Any] = {"dim": 8, "heads": 2, "num_encoder_layers": 1, "num_decoder_layers": 2}
LAYOUTS = sorted(predformer.UNITS)


def build(layout: str = "TSST", **options: Any) -> PredFormer:
    torch.manual_seed(0)
    return PredFormer(**{**PRED, "layout": layout, "num_layers": 2, **options}).eval()


def clips(b: int = 2) -> Tensor:
    return torch.rand(b, 3, 2, 8, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("layout", [*LAYOUTS, "TTS"])
def test_layouts_predict_alone_as_in_a_batch_learn_everywhere_and_survive_saving(layout: str, tmp_path: Path) -> None:
    model = build(layout)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        both = model(clips()).frames
        assert_close(model(clips()[1:]).frames[0], both[1], rtol=1e-5, atol=1e-5)
        assert_close(PredFormer.from_pretrained(tmp_path)(clips()).frames, both, rtol=0, atol=0)
    F.mse_loss(model.train()(clips()).frames, clips()).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_units_over_space_never_mix_frames_and_units_over_time_never_mix_patches() -> None:
    for kind, axis in (("S", 1), ("T", 2)):
        model, x = build(kind), torch.randn(1, 3, 6, 8)
        changed = x.clone()
        changed[:, 1 if axis == 1 else slice(None), slice(None) if axis == 1 else 1] += 1
        with torch.no_grad():
            unit = cast(Any, model.layers[0])[0]
            gap = (model.run(kind, unit, changed) - model.run(kind, unit, x)).abs().sum((0, 3))
        assert bool((gap.sum(1 if axis == 1 else 0) > 0).tolist() == [i == 1 for i in range(gap.shape[axis - 1])])


def test_rolling_out_is_feeding_back() -> None:
    model = build()
    with torch.no_grad():
        first = model(clips()).frames
        long = model(clips(), num_frames=5).frames
        assert_close(long[:, :3], first, rtol=0, atol=0)
        assert_close(long[:, 3:], model(first).frames[:, :2], rtol=1e-5, atol=1e-5)
        assert_close(model(clips(), num_frames=1).frames, first[:, :1], rtol=0, atol=0)


def test_the_published_order_of_fac_st_is_an_option() -> None:
    quirk, right = build("fac_st"), build("fac_st", official_fac_st=False)
    right.load_state_dict(quirk.state_dict())
    with torch.no_grad():
        assert not torch.allclose(quirk(clips()).frames, right(clips()).frames)


def test_dropped_branches_keep_the_mean() -> None:
    model = build("T", drop_path=0.5).train()
    unit = cast(Any, model.layers[0])[0]
    torch.manual_seed(0)
    kept = torch.stack([unit.drop(torch.ones(64, 1, 1)).flatten() for _ in range(50)])
    assert set(kept.unique().tolist()) == {0.0, 2.0} and abs(float(kept.mean()) - 1) < 0.05
    assert torch.equal(unit.eval().drop(torch.ones(4, 1, 1)), torch.ones(4, 1, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_predformer_round_trip(layout: str) -> None:
    model = build(layout)
    official = predformer.to_official(model)
    options: dict[str, Any] = {"heads": 2, "sample_size": [8, 12], "in_channels": 2, "num_frames": 3}
    again, _ = predformer.from_official(official, layout=layout, **options)
    assert again.config["num_layers"] == 2 and again.config["dim_head"] == 4
    for key, value in predformer.to_official(again).items():
        assert_close(value, official[key], rtol=0, atol=0)
    if len(predformer.layouts_of(official)) > 1:
        with pytest.raises(ValueError, match="give layout"):
            predformer.from_official(official, **options)


def test_layouts_without_official_names_are_told() -> None:
    with pytest.raises(ValueError, match="layout 'TTS' has no official names"):
        predformer.to_official(build("TTS"))
    with pytest.raises(ValueError, match="unknown layout 'fac_tss'.*'fac_ts'"):
        build("fac_tss")
    with pytest.raises(ValueError, match="patch_size=5 must divide"):
        build(patch_size=5)
    with pytest.raises(ValueError, match="num_frames must be at least 1"):
        build()(clips(), num_frames=0)


# ---- MIMO-VP ----


def test_mimo_predicts_alone_as_in_a_batch_rolls_out_and_learns_everywhere(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MIMOVP(**MIMO).eval()
    x = torch.rand(2, 3, 1, 16, 24) * 2 - 1
    with torch.no_grad():
        both = model(x).frames
        assert_close(model(x[1:]).frames[0], both[1], rtol=1e-4, atol=1e-5)
        assert_close(model(x, num_frames=4).frames[:, 3:], model(both).frames[:, :1], rtol=1e-4, atol=1e-5)
        torch.save({"net_param": {f"module.{k}": v for k, v in mimo_vp.to_official(model).items()}}, tmp_path / "mimo_vp.pth")
        assert_close(convert.load("mimo_vp", tmp_path, heads=2)(x).frames, both, rtol=0, atol=0)
    predictions = model.predictions(fold_frames(x, 2))
    assert len(predictions) == 2 and all(float(p.min()) >= 0 and float(p.max()) <= 1 for p in predictions)
    torch.stack([p.square().mean() for p in predictions]).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    assert_close(unfold_frames(fold_frames(x, 2), 2), x, rtol=0, atol=0)


def test_mimo_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="heads must divide"):
        MIMOVP(dim=8, heads=3)
    with pytest.raises(ValueError, match="multiples of 4"):
        MIMOVP(**MIMO)(torch.zeros(1, 2, 1, 18, 16))
