"""Mixers as attention processors of a small PixArt transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch.testing import assert_close

from genkit.blocks.processors import MixerProcessor, use_mixer

LAYERS = ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]


def pixart() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 12}
    return PixArtTransformer2DModel(
        **sizes, in_channels=4, out_channels=4, num_layers=2, sample_size=8, patch_size=2, norm_num_groups=1
    ).eval()


def run(model: Any, size: int = 8) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, size, size, generator=draw), torch.randn(2, 3, 12, generator=draw)
    conditions = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        found: torch.Tensor = model(x, encoder_hidden_states=text, timestep=torch.tensor([10, 500]), added_cond_kwargs=conditions).sample
    return found


def test_attention_takes_the_weights_that_are_there_and_gives_the_same_numbers() -> None:
    model = pixart()
    before = run(model)
    assert use_mixer(model, "attention") == LAYERS
    assert_close(run(model), before, rtol=1e-4, atol=1e-5)
    wide = pixart()
    use_mixer(wide, "window(size=4)")  # as large as the grid
    assert_close(run(wide), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", ["linear", "window(size=2)", "retention(scan='bidir')", "shsa", "conv", "group(size=4)", "reduced"])
def test_other_mixers_run_in_place_of_self_attention_and_are_trained(text: str) -> None:
    model = pixart()
    before = run(model)
    assert use_mixer(model, text, chosen=lambda name: name == LAYERS[1]) == LAYERS[1:]
    assert not torch.allclose(run(model), before, atol=1e-4)
    processor = model.transformer_blocks[1].attn1.processor
    assert isinstance(processor, MixerProcessor)
    names = [name for name, _ in model.named_parameters() if name.startswith("transformer_blocks.1.attn1.processor.mixer.")]
    assert names and set(names) <= set(model.state_dict())
    model.train()
    x = torch.randn(1, 16, 16, requires_grad=True)
    processor(model.transformer_blocks[1].attn1, x).sum().backward()
    assert any(p.grad is not None for p in processor.parameters())


def test_what_does_not_fit_is_refused() -> None:
    model = pixart()
    for call, error, message in (
        (lambda: use_mixer(torch.nn.Linear(2, 2), "linear"), TypeError, "attention processors, got Linear"),
        (lambda: use_mixer(model, "linear + mlp"), ValueError, "takes one mixer"),
        (lambda: use_mixer(model, "mlp"), ValueError, "takes a token mixer"),
        (lambda: use_mixer(model, "linear", chosen=lambda name: False), ValueError, "no layer of self-attention"),
    ):
        with pytest.raises(error, match=message):
            call()
    use_mixer(model, "conv")
    processor, layer = model.transformer_blocks[0].attn1.processor, model.transformer_blocks[0].attn1
    with pytest.raises(ValueError, match="12 tokens are no square"):
        processor(layer, torch.randn(1, 12, 16))
    with pytest.raises(ValueError, match="attends to other tokens"):
        processor(layer, torch.randn(1, 16, 16), torch.randn(1, 3, 16))
    assert MixerProcessor(processor.mixer, (3, 4))(layer, torch.randn(1, 12, 16)).shape == (1, 12, 16)
