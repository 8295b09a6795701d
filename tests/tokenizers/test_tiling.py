"""Large pictures in tiles: where tiles lie, how they are averaged, what a tokenizer makes of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from genkit.pipelines.tokenizers import load_tokenizer
from genkit.tokenizers.conv_vqgan import ConvVQModel
from genkit.tokenizers.tiling import Blend, ramp, starts_of
from genkit.tokenizers.vit_vqgan import ViTVQModel
from genkit.tokenizers.vq_model import VQModel

TOWER: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "mlp_dim": 24, "dim_head": 8}
CODES = {"name": "simvq", "codebook_size": 50, "dim": 6}


def vit(depth: int = 1) -> VQModel:
    torch.manual_seed(0)
    return ViTVQModel(4, {**TOWER, "depth": depth}, TOWER, CODES, sample_size=16).eval()


def conv() -> VQModel:
    torch.manual_seed(0)
    return ConvVQModel(channels=32, multipliers=[1, 2, 2], quantizer_config=CODES, sample_size=[16, 24]).eval()


@given(st.integers(1, 200), st.integers(1, 40), st.floats(0, 0.9))
def test_tiles_cover_an_axis_with_enough_overlap(length: int, tile: int, share: float) -> None:
    overlap = min(int(tile * share), tile - 1)
    starts = starts_of(length, tile, overlap)
    assert starts[0] == 0 and starts[-1] + tile >= length and (starts[-1] + tile == length or starts == [0])
    assert all(0 < b - a <= tile - overlap for a, b in itertools.pairwise(starts))


def test_weights_fall_only_towards_other_tiles() -> None:
    assert_close(ramp(6, 3, first=True, last=False), torch.tensor([1, 1, 1, 5 / 6, 0.5, 1 / 6]))
    assert_close(ramp(6, 3, first=False, last=True), ramp(6, 3, first=True, last=False).flip(0))
    assert_close(ramp(4, 2, first=True, last=True), torch.ones(4))
    assert ramp(5, 0, first=False, last=False).min() > 0


@pytest.mark.parametrize("grid", [(7, 19), (3, 4), (20, 5)])
def test_what_does_not_depend_on_the_tile_comes_back(grid: tuple[int, int]) -> None:
    blend, image = Blend(grid, (5, 6), (2, 3)), torch.randn(2, 3, *grid)
    whole = image.repeat_interleave(2, 2).repeat_interleave(3, 3)
    parts = ((where, image[:, :, where[0], where[1]].repeat_interleave(2, 2).repeat_interleave(3, 3)) for where in blend.tiles())
    assert_close(blend.collect(parts, (2, 3)), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model", [vit(), conv()], ids=["vit", "conv"])
@torch.no_grad()
def test_a_picture_of_one_tile_gives_what_whole_ones_do(model: VQModel) -> None:
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    whole, tiled = model(x), model.tiled_encode(x)
    assert_close(tiled.latents, whole.latents, rtol=1e-6, atol=1e-6)
    assert torch.equal(tiled.indices, whole.indices)
    assert_close(model.tiled_decode(tiled.indices).sample, whole.sample, rtol=1e-5, atol=1e-5)
    assert_close(model.tiled_decode(tiled.indices.flatten(1), grid=(4, 4)).sample, whole.sample, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_codes_that_see_their_patch_alone_do_not_depend_on_tiles() -> None:
    model, x = vit(depth=0), torch.rand(1, 3, 40, 28) * 2 - 1
    assert torch.equal(model.tiled_encode(x).indices, model.encode(x).indices)
    assert torch.equal(model.tiled_encode(x, tile=(8, 12), overlap=0.5).indices, model.encode(x).indices)


@pytest.mark.parametrize("model", [vit(), conv()], ids=["vit", "conv"])
@torch.no_grad()
def test_the_network_never_sees_more_than_a_tile(model: VQModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    encode, decode = model.encode_latents, model.decode_latents

    def watched_encode(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape[-2:]))
        return encode(x)

    def watched_decode(quantized: Tensor, grid: tuple[int, int]) -> Tensor:
        seen.append((grid[0] * 4, grid[1] * 4))
        return decode(quantized, grid)

    monkeypatch.setattr(model, "encode_latents", watched_encode)
    monkeypatch.setattr(model, "decode_latents", watched_decode)
    out = model.tiled_encode(torch.rand(1, 3, 40, 60) * 2 - 1, tile=[16, 24])
    assert out.indices.shape == (1, 10, 15)
    assert model.tiled_decode(out.indices, tile=[16, 24]).sample.shape == (1, 3, 40, 60)
    assert len(seen) > 2 and set(seen) == {(16, 24)}


@torch.no_grad()
def test_overlap_leaves_no_seam_in_the_packaged_tokenizer() -> None:
    model = load_tokenizer("genkit/enat-lowpoly")
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 256), indexing="ij")
    x = torch.stack([columns, rows, -columns])[None] * 0.8

    def jumps(overlap: float) -> tuple[Tensor, Tensor]:
        """Return how far the error steps across borders of tiles, and across the other borders of patches."""
        error = model.tiled_decode(model.tiled_encode(x, overlap=overlap).indices, overlap=overlap).sample - x
        steps = (error[..., 1:] - error[..., :-1]).abs().mean((0, 1, 2))
        starts, at = starts_of(64, 16, round(16 * overlap)), torch.zeros(64, dtype=torch.bool)
        at[starts[1:]] = at[[start + 16 for start in starts[:-1]]] = True
        steps = steps[3::4]
        return steps[at[1:]], steps[~at[1:]]

    seams, others = jumps(0.0)
    assert seams.min() > 2 * others.max()
    seams, others = jumps(0.25)
    assert seams.max() < others.max() and seams.mean() < 1.2 * others.mean()


def test_tiles_that_do_not_fit_are_refused() -> None:
    model, x = vit(), torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match="multiples of the patch 4x4, got 10x10"):
        model.tiled_encode(x, tile=10)
    with pytest.raises(ValueError, match=r"overlap must lie in \[0, 0.5\], got 0.6"):
        model.tiled_encode(x, overlap=0.6)
    with pytest.raises(ValueError, match="0 .. 49, got 0 .. 50"):
        model.tiled_decode(torch.tensor([[[0, 50]]]))
    with pytest.raises(ValueError, match="overlap must lie in 0 .. tile - 1"):
        Blend((4, 4), (2, 2), (2, 1))
    unsized = ViTVQModel(4, TOWER, TOWER, CODES)
    with pytest.raises(ValueError, match="no sample_size; say how large tiles are"):
        unsized.tiled_encode(x)
