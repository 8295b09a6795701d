"""LPIPS v0.1: learned perceptual distance on AlexNet, VGG16 or SqueezeNet 1.1 features.

d(x, y) = sum over taps of mean over pixels of w . (u(x) - u(y))^2, u unit-normalised over channels

The weights are the user's: the trunk in torchvision's layout (`features.N.weight`), the linear heads as published
(`lin{i}.model.1.weight`). Gradients reach the pictures; the trunk is frozen.

Source: Zhang et al. 2018 (arXiv 1801.03924).
Letters: b pictures, t taps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.checks import check_shape, choose
from genkit.weights import load_strict

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
VGG_GROUPS = (((3, 64), (64, 64)), ((64, 128), (128, 128)), ((128, 256), (256, 256), (256, 256)))
VGG_GROUPS_5 = (*VGG_GROUPS, ((256, 512), (512, 512), (512, 512)), ((512, 512), (512, 512), (512, 512)))


class Fire(nn.Module):
    """SqueezeNet's unit: 1x1 squeeze, then 1x1 and 3x3 expansions side by side."""

    def __init__(self, dim_in: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(dim_in, squeeze, 1)
        self.expand1x1, self.expand3x3 = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


def _alexnet() -> tuple[nn.Sequential, tuple[int, ...]]:
    layers = [
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    ]  # fmt: skip
    return nn.Sequential(*layers), (1, 4, 7, 9, 11)


def _vgg16() -> tuple[nn.Sequential, tuple[int, ...]]:
    layers: list[nn.Module] = []
    taps = []
    for group in VGG_GROUPS_5:
        if layers:
            layers.append(nn.MaxPool2d(2, 2))
        for dim_in, dim_out in group:
            layers += [nn.Conv2d(dim_in, dim_out, 3, padding=1), nn.ReLU()]
        taps.append(len(layers) - 1)
    return nn.Sequential(*layers), tuple(taps)


def _squeezenet() -> tuple[nn.Sequential, tuple[int, ...]]:
    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    layers = [
        nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool(), Fire(64, 16, 64), Fire(128, 16, 64), pool(),
        Fire(128, 32, 128), Fire(256, 32, 128), pool(),
        Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256),
    ]  # fmt: skip
    return nn.Sequential(*layers), (1, 4, 7, 9, 10, 11, 12)


# Trunk, and channels at its taps.
TRUNKS = {
    "alex": (_alexnet, (64, 192, 384, 256, 256)),
    "vgg": (_vgg16, (64, 128, 256, 512, 512)),
    "squeeze": (_squeezenet, (64, 128, 256, 384, 384, 512, 512)),
}


def _head(channels: int) -> nn.Module:
    """Return a linear head, with the published names: a dropout that does nothing here, then a 1x1 convolution."""
    return nn.ModuleDict({"model": nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))})


class LPIPS(nn.Module):
    """The distance.

    Args:
        network: "alex", "vgg" or "squeeze".
        trunk: torchvision state dict of that network; keys behind the last tap, such as `classifier.*`, are not used.
        heads: `lin{i}.model.1.weight` [1, c, 1, 1] of every tap.

    Raises:
        ValueError: if tensors are missing or misshapen.
    """

    def __init__(self, network: str, trunk: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> None:
        super().__init__()
        choose(network, TRUNKS, "LPIPS network")
        build, channels = TRUNKS[network]
        self.features, self.taps = build()
        remedy = f"Give torchvision's weights of that network and the heads published for {network!r}."
        holder = nn.ModuleDict({"features": self.features})
        used = {key: value for key, value in trunk.items() if key in holder.state_dict()}
        load_strict(holder, used, f"LPIPS({network!r}) trunk", remedy)
        self.heads = nn.ModuleDict({f"lin{i}": _head(c) for i, c in enumerate(channels)})
        given = {key: value for key, value in heads.items() if not key.startswith("lins.")}  # the published file holds each head twice
        load_strict(self.heads, given, f"LPIPS({network!r}) heads", remedy)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)
        self.requires_grad_(False)
        self.train(False)

    @classmethod
    def from_checkpoint(cls, state: Mapping[str, Tensor]) -> LPIPS:
        """Build LPIPS on VGG16 from what tokenizer checkpoints carry: `net.slice{i}.{n}.weight`, `lin{i}.model.1.weight`.

        Raises:
            ValueError: if tensors are missing or misshapen.
        """
        trunk = {re.sub(r"net\.slice\d\.", "features.", key): value for key, value in state.items() if key.startswith("net.")}
        return cls("vgg", trunk, {key: value for key, value in state.items() if re.match(r"lin\d\.", key)})

    def train(self, mode: bool = True) -> LPIPS:
        """Stay in eval mode whatever the surrounding module does."""
        return super().train(False)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the activations at the taps for pictures [b, 3, h, w] in [-1, 1]."""
        check_shape(images, "LPIPS: images", "b 3 h w")
        x, found = (images - self.get_buffer("shift")) / self.get_buffer("scale"), []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                found.append(x)
        return found

    def per_tap(self, images: Tensor, originals: Tensor) -> Tensor:
        """Return what each tap adds, [t, b], for pictures [b, 3, h, w] in [-1, 1]."""
        parts = []
        for i, (x, y) in enumerate(zip(self.maps(images), self.maps(originals), strict=True)):
            head = self.heads.get_submodule(f"lin{i}.model")
            parts.append(head((_unit(x) - _unit(y)).square()).mean((1, 2, 3)))
        return torch.stack(parts)

    def forward(self, images: Tensor, originals: Tensor) -> Tensor:
        """Return the distance of each pair [b] of pictures [b, 3, h, w] in [-1, 1], differentiable in both."""
        return self.per_tap(images, originals).sum(0)


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
