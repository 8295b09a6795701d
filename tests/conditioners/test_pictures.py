"""Pictures of objects for shape generators: cutting out, resampling, encoder tokens, official names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Dinov2Model

from genkit.conditioners.pictures import area_weights, dino_pixels, encode_pictures, encode_views, recentred, to_condition
from genkit.convert import dinov2
from genkit.weights import read_safetensors

GOLDEN = Path(__file__).parent.parent / "parity/goldens/flashvdm/conditioner/weights.safetensors"


def encoder_of(name: str, heads: int) -> Dinov2Model:
    state = {key: value for key, value in read_safetensors(GOLDEN).items() if key.startswith(f"{name}.")}
    return dinov2.from_official({key.removeprefix(f"{name}."): value for key, value in state.items()}, num_heads=heads)[0]


@pytest.mark.parametrize(("source", "target"), [(6, 3), (5, 3), (3, 7), (4, 4), (1, 5)])
def test_area_resampling_keeps_means(source: int, target: int) -> None:
    weights = area_weights(source, target)
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(weights.mean(0), 1 / source)  # no pixel counts more than another
    if source == 6:
        np.testing.assert_allclose(weights @ np.arange(6), [0.5, 2.5, 4.5])


def test_an_object_is_centred_on_white() -> None:
    rgba = np.zeros((40, 60, 4), np.uint8)
    rgba[2:13, 3:24] = (200, 10, 20, 255)  # its box lacks the last row and column: 10 x 20
    picture, mask = recentred(rgba)
    assert picture.shape == (60, 60, 3) and mask.shape == (60, 60, 1)
    rows, columns = (np.flatnonzero((mask[..., 0] == 255).any(axis)) for axis in (1, 0))
    assert (len(rows), len(columns)) == (25, 51)  # 51 = 60 * 0.85
    assert abs((rows[0] + rows[-1]) / 2 - 29.5) <= 0.5 and abs((columns[0] + columns[-1]) / 2 - 29.5) <= 0.5
    assert (picture[mask[..., 0] == 255] == (200, 10, 20)).all() and (picture[mask[..., 0] == 0] == 255).all()
    condition = to_condition(picture, 32)
    assert condition.shape == (1, 3, 32, 32) and condition.abs().max() <= 1


def test_half_transparent_colours_mix_with_white() -> None:
    rgba = np.zeros((30, 30, 4), np.uint8)
    rgba[5:25, 5:25] = (0, 0, 0, 128)
    picture, mask = recentred(rgba)
    assert picture[15, 15].tolist() == [127] * 3 and mask[15, 15] == 128
    assert set(to_condition(mask, 8).add(1).mul(127.5).flatten().tolist()) == {0.0, 128.0}


def test_pictures_without_an_object_are_refused() -> None:
    with pytest.raises(ValueError, match="transparent everywhere"):
        recentred(np.zeros((8, 8, 4), np.uint8))
    thin = np.zeros((8, 8, 4), np.uint8)
    thin[3, 1:6] = 255
    with pytest.raises(ValueError, match="the object is 5 x 1 pixels"):
        recentred(thin)
    with pytest.raises(ValueError, match=r"\[8, 8, 3\]"):
        recentred(np.zeros((8, 8, 3), np.uint8))


def test_what_the_encoder_sees_is_the_centre() -> None:
    image = torch.full((1, 3, 56, 84), -1.0)
    image[..., 14:70] = 1
    pixels = dino_pixels(image, 56)
    assert pixels.shape == (1, 3, 56, 56)
    torch.testing.assert_close(pixels[0, :, 3, 5], torch.tensor([(1 - m) / s for m, s in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]))
    assert (pixels == pixels[..., :1, :1]).all()
    assert dino_pixels(torch.zeros(2, 3, 100, 33), 56).shape == (2, 3, 56, 56)


def test_views_in_any_order() -> None:
    encoder, images = encoder_of("mv", 2), torch.rand(2, 3, 3, 42, 42) * 2 - 1
    tokens = encode_views(images, [3, 0, 2], encoder)
    assert tokens.shape == (2, 3 * 10, 32)
    torch.testing.assert_close(encode_views(images[:, [1, 2, 0]], [0, 2, 3], encoder), tokens)
    alone = encode_pictures(images[:, 1], encoder)
    offset = tokens[:, :10] - alone
    torch.testing.assert_close(offset, torch.cat([torch.zeros(16), torch.ones(16)]).expand_as(offset), atol=1e-5, rtol=0)  # view 0
    assert encode_pictures(images[:, 0], encoder, use_cls_token=False).shape == (2, 9, 32)
    with pytest.raises(ValueError, match=r"3 different views of 0 \.\. 3 .*are needed, got \[0, 0, 1\]"):
        encode_views(images, [0, 0, 1], encoder)


@pytest.mark.parametrize(("name", "heads"), [("single", 4), ("mv", 2)])
def test_names_come_back_as_they_were(name: str, heads: int) -> None:
    state = {
        f"conditioner.{key.removeprefix(f'{name}.')}": value for key, value in read_safetensors(GOLDEN).items() if key.startswith(name)
    }
    state["vae.post_kl.weight"] = torch.zeros(1)
    assert dinov2.recognise({key: tuple(value.shape) for key, value in state.items()})
    model, _ = dinov2.from_official(state, num_heads=heads)
    back = dinov2.to_official(model)
    del state["vae.post_kl.weight"]
    assert len(back) == len(state)
    assert all(torch.equal(back[key.removeprefix("conditioner.main_image_encoder.model.")], value) for key, value in state.items())
