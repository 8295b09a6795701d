"""Judging networks in their published layouts: sizes, strict loading, folding, frozen behaviour. Numbers are in the golden cases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from genkit.eval.i3d import I3D
from genkit.eval.inception import InceptionV3, fetch_weights
from genkit.eval.lpips import LPIPS, TRUNKS


def weights_for(expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return random weights that keep activations finite, without step counters."""
    found = {}
    for key, value in expected.items():
        if key.endswith("num_batches_tracked"):
            continue
        if key.endswith(("running_var", "bn.weight")):
            found[key] = torch.ones(value.shape)
        else:
            found[key] = torch.randn(value.shape) / max(value[0].numel() if value.ndim > 1 else 4, 1) ** 0.5
    return found


@pytest.mark.parametrize(("network", "floats"), [(InceptionV3, 23_885_392), (I3D, 12_711_824)])
def test_layout_is_the_published_one(network: type[InceptionV3] | type[I3D], floats: int) -> None:
    expected = network.expected()
    assert sum(value.numel() for key, value in expected.items() if not key.endswith("num_batches_tracked")) == floats


@pytest.mark.parametrize("network", [InceptionV3, I3D])
def test_loading_is_strict(network: Callable[[dict[str, Tensor]], nn.Module]) -> None:
    weights = weights_for(network.expected())  # type: ignore[attr-defined]
    first = sorted(weights)[0]
    with pytest.raises(ValueError, match=f"1 missing: {first}"):
        network({key: value for key, value in weights.items() if key != first})
    with pytest.raises(ValueError, match="1 unexpected: AuxLogits"):
        network(weights | {"AuxLogits": torch.zeros(1)})


def test_inception_gives_the_asked_taps_and_stays_in_eval_mode() -> None:
    network = InceptionV3(weights_for(InceptionV3.expected())).train()
    x = torch.rand(2, 3, 299, 299) * 2 - 1
    found = network(x, ("64", "spatial", "2048", "logits", "logits_unbiased"))
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "64": (2, 64), "spatial": (2, 2023), "2048": (2, 2048), "logits": (2, 1008), "logits_unbiased": (2, 1008)
    }  # fmt: skip
    assert_close(found["logits"] - found["logits_unbiased"], network.fc.bias.expand(2, -1), rtol=1e-3, atol=1e-4)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert_close(network(x[:1], ("64",))["64"], found["64"][:1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="unknown tap of the Inception network: 'pool3'"):
        network(x, ("pool3",))


def test_failed_download_says_what_else_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    with pytest.raises(OSError, match=r"--weights PATH, or choose the packaged network.*not FID"):
        fetch_weights(tmp_path)
    assert not list(tmp_path.glob("*.pth"))


def test_i3d_averages_logits_over_time_and_needs_frames() -> None:
    network = I3D(weights_for(I3D.expected(7)), 7)
    assert network(torch.rand(1, 3, 10, 224, 224)).shape == (1, 7)
    with pytest.raises(ValueError, match="at least 10 frames, got 8"):
        network(torch.rand(1, 3, 8, 224, 224))


def lpips(name: str) -> LPIPS:
    build, channels = TRUNKS[name]
    trunk = {f"features.{key}": torch.randn(value.shape) * 0.05 for key, value in build()[0].state_dict().items()}
    return LPIPS(
        name,
        trunk | {"classifier.1.weight": torch.ones(1)},
        {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(channels)},
    )


@pytest.mark.parametrize(("name", "parameters"), [("alex", 2_469_696), ("vgg", 14_714_688), ("squeeze", 722_496)])
def test_lpips_is_a_symmetric_frozen_distance_with_gradients_to_the_pictures(name: str, parameters: int) -> None:
    distance = lpips(name)
    assert sum(p.numel() for p in distance.features.parameters()) == parameters
    x, y = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    assert_close(distance(x, x), torch.zeros(2), rtol=0, atol=0)
    assert_close(distance(x, y), distance(y, x), rtol=1e-5, atol=1e-7)
    x.requires_grad_(True)
    distance.train()(x, y).sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0
    assert not any(p.requires_grad for p in distance.parameters())


def test_lpips_weights_are_checked() -> None:
    with pytest.raises(ValueError, match=r"LPIPS\('alex'\) trunk: the weights do not fit: 10 missing"):
        LPIPS("alex", {}, {})
