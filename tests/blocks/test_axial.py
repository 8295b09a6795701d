"""Axial attention: the same as attention on folded sequences, for every choice of axes."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.testing import assert_close

from genkit.blocks.attention import AttentionConfig
from genkit.blocks.axial import AxialAttention, AxialConfig
from genkit.blocks.layout import Layout
from genkit.blocks.stack import build, parse

F, H, W, D = 2, 3, 4, 8
LAYOUT = Layout(grid=(F, H, W))
FOLDS = {
    "f": ("b (f h w) d -> (b h w) f d", "(b h w) f d -> b (f h w) d"),
    "hw": ("b (f h w) d -> (b f) (h w) d", "(b f) (h w) d -> b (f h w) d"),
    "h": ("b (f h w) d -> (b f w) h d", "(b f w) h d -> b (f h w) d"),
    "w": ("b (f h w) d -> (b f h) w d", "(b f h) w d -> b (f h w) d"),
    "fh": ("b (f h w) d -> (b w) (f h) d", "(b w) (f h) d -> b (f h w) d"),
    "fw": ("b (f h w) d -> (b h) (f w) d", "(b h) (f w) d -> b (f h w) d"),
    "fhw": ("b (f h w) d -> b (f h w) d", "b (f h w) d -> b (f h w) d"),
}


def tokens() -> Tensor:
    return torch.randn(3, F * H * W, D, generator=torch.Generator().manual_seed(0))


def mixer(axes: str, **options: int) -> AxialAttention:
    torch.manual_seed(1)
    return AxialConfig(axes, **options).build(D, heads=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("axes", sorted(FOLDS))
def test_is_attention_on_folded_sequences(axes: str) -> None:
    axial, plain = mixer(axes), AttentionConfig().build(D, heads=2)
    plain.load_state_dict(axial.state_dict())
    x, sizes = tokens(), {"f": F, "h": H, "w": W}
    fold, unfold = FOLDS[axes]
    wanted = rearrange(plain(rearrange(x, fold, **sizes)), unfold, b=3, **sizes)
    assert_close(axial(x, layout=LAYOUT), wanted, rtol=1e-5, atol=1e-6)


def test_two_maps_behind_the_heads_are_merged_exactly() -> None:
    axial, x = mixer("f", out_layers=2), tokens()
    before = axial(x, layout=LAYOUT)
    axial.merge_out()
    axial.merge_out()
    assert isinstance(axial.proj2, torch.nn.Identity)
    assert_close(axial(x, layout=LAYOUT), before, rtol=1e-5, atol=1e-6)


def test_a_grid_without_frames() -> None:
    x = tokens()[:, : H * W]
    assert mixer("h")(x, layout=Layout(grid=(H, W))).shape == x.shape
    with pytest.raises(ValueError, match="has no axis f"):
        mixer("f")(x, layout=Layout(grid=(H, W)))


def test_video_stack_string() -> None:
    text = "(axial(axes='f') + axial + mlp) * 2"
    assert str(parse(text)) == text
    blocks = build(text, D, heads=2)
    x = tokens()
    for block in blocks:
        x = block(x, layout=LAYOUT)
    assert x.shape == (3, F * H * W, D)


def test_what_it_cannot_do_is_refused() -> None:
    axial, x = mixer("hw"), tokens()
    with pytest.raises(ValueError, match=r"needs layout.grid \(h, w\) or \(f, h, w\)"):
        axial(x)
    with pytest.raises(ValueError, match="does not take mask"):
        axial(x, layout=LAYOUT, mask=torch.ones(3, 24, dtype=torch.bool))
    with pytest.raises(ValueError, match="does not take cache"):
        axial.new_cache(1, 4, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="divisible by heads"):
        AxialConfig().build(D, heads=3)
    with pytest.raises(ValueError, match="number of heads is open"):
        AxialConfig().build(D)
    with pytest.raises(ValueError, match="out_layers must be 1 or 2"):
        AxialConfig(out_layers=3)
