"""The ViT-VQGAN converter: round trip, what it reads from shapes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from genkit.convert import vit_vqgan

GOLDENS = Path(__file__).parent.parent / "parity" / "goldens" / "vit_vqgan"


def official(case: str) -> tuple[dict[str, torch.Tensor], dict]:
    return load_file(GOLDENS / case / "weights.safetensors"), json.loads((GOLDENS / case / "config.json").read_text())


def options(config: dict) -> dict:
    return {"dim_head": [config[side].get("dim_head", 64) for side in ("encoder", "decoder")], "image_size": config["image_size"]}


def test_round_trip_gives_every_official_tensor_back() -> None:
    state, config = official("stage1_nonsquare")
    model, report = vit_vqgan.from_official(state, **options(config))
    back = vit_vqgan.to_official(model)
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert_close(back[key], value, rtol=0, atol=1e-6, msg=key)
    assert len(report.mapped) + len(report.dropped) == len(state)
    assert set(report.dropped) == {"encoder.en_pos_embedding", "decoder.de_pos_embedding"}


def test_loss_networks_are_dropped_with_a_reason() -> None:
    state, config = official("stage1_nonsquare")
    _, report = vit_vqgan.from_official(state | {"loss.discriminator.blocks.0.0.weight": torch.zeros(2)}, **options(config))
    assert "training" in report.dropped["loss.discriminator.blocks.0.0.weight"]


def test_recognised_by_its_keys() -> None:
    state, _ = official("stage1_nonsquare")
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert vit_vqgan.recognise(shapes)
    assert not vit_vqgan.recognise({key: shape for key, shape in shapes.items() if not key.startswith("decoder")})


def test_misfits_are_named() -> None:
    state, config = official("stage1_nonsquare")
    with pytest.raises(ValueError, match="post_quant.bias"):
        vit_vqgan.from_official({k: v for k, v in state.items() if k != "post_quant.bias"}, **options(config))
    with pytest.raises(ValueError, match="strange.weight"):
        vit_vqgan.from_official(state | {"strange.weight": torch.zeros(1)}, **options(config))
    with pytest.raises(ValueError, match=r"pre_quant.bias expected \[8\], found \[9\]"):
        vit_vqgan.from_official(state | {"pre_quant.bias": torch.zeros(9)}, **options(config))
    with pytest.raises(ValueError, match="dim_head"):
        vit_vqgan.from_official(state, dim_head=7, image_size=config["image_size"])
    table = state["encoder.en_pos_embedding"]
    with pytest.raises(ValueError, match="sin-cos"):
        vit_vqgan.from_official(state | {"encoder.en_pos_embedding": table.flip(1)}, **options(config))
