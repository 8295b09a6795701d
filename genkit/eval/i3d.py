"""I3D (Inception-v1 inflated to 3D, Kinetics-400), whose 400 logits are the features of the Frechet video distance.

Carreira and Zisserman 2017 (arXiv 1705.07750). Loads `i3d_pretrained_400.pt`, the PyTorch port's state dict, which the user gives.
Convolutions and max pools pad as TensorFlow's SAME, unevenly where that falls out so; pools pad with zeros, which matters behind no
ReLU but is what the port does. Batch norm (epsilon 1e-5) is folded after loading.

Letters: b clips, f frames, h w rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.checks import check_shape
from genkit.weights import load_strict

Triple = tuple[int, int, int]
# Widths of the branches of each mixed block: 1x1x1; 1x1x1 -> 3x3x3; 1x1x1 -> 3x3x3; pool -> 1x1x1.
MIXED = {
    "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)),
    "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
    "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)),
    "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
    "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)),
    "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
    "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)),
    "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
    "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
}
STAGES = (
    "Conv3d_1a_7x7", "MaxPool3d_2a_3x3", "Conv3d_2b_1x1", "Conv3d_2c_3x3", "MaxPool3d_3a_3x3", "Mixed_3b", "Mixed_3c", "MaxPool3d_4a_3x3",
    "Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f", "MaxPool3d_5a_2x2", "Mixed_5b", "Mixed_5c",
)  # fmt: skip
LEAST_FRAMES = 10


def _pad_same(x: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    """Pad [b, c, f, h, w] with zeros as TensorFlow's SAME: the odd one at the end."""
    pads: list[int] = []
    for size, k, s in zip(reversed(x.shape[-3:]), reversed(kernel), reversed(stride), strict=True):
        total = max(k - s, 0) if size % s == 0 else max(k - size % s, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads) if any(pads) else x


class Unit(nn.Module):
    """Convolution, batch norm, ReLU; with `plain`, a convolution with bias alone."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int, stride: int = 1, plain: bool = False) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(dim_in, dim_out, kernel, stride, bias=plain)
        self.bn: nn.Module | None = None if plain else nn.BatchNorm3d(dim_out, eps=1e-5)
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv3d.kernel_size, self.conv3d.stride
        x = self.conv3d(_pad_same(x, kernel, stride))  # type: ignore[arg-type]
        if self.bn is not None:
            x = self.bn(x)
        return x if self.plain else F.relu(x)

    def fold(self) -> None:
        """Join convolution and batch norm."""
        if isinstance(self.bn, nn.BatchNorm3d):
            self.conv3d = nn.utils.fusion.fuse_conv_bn_eval(self.conv3d.eval(), self.bn.eval())
            self.bn = None


class Pool(nn.Module):
    """Max pool with SAME padding by zeros."""

    def __init__(self, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(_pad_same(x, self.kernel, self.stride), self.kernel, self.stride)


class Mixed(nn.Module):
    """Four branches side by side."""

    def __init__(self, dim: int, widths: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        a, b1, b2, c1, c2, d = widths
        self.b0 = Unit(dim, a, 1)
        self.b1a, self.b1b = Unit(dim, b1, 1), Unit(b1, b2, 3)
        self.b2a, self.b2b = Unit(dim, c1, 1), Unit(c1, c2, 3)
        self.b3a, self.b3b = Pool((3, 3, 3), (1, 1, 1)), Unit(dim, d, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], 1)


class I3D(nn.Module):
    """The network.

    Args:
        weights: state dict of the port; random weights if None.
        num_classes: outputs.

    Raises:
        ValueError: if tensors are missing, unexpected or misshapen.
    """

    def __init__(self, weights: Mapping[str, Tensor] | None = None, num_classes: int = 400) -> None:
        super().__init__()
        self._build(num_classes)
        if weights is not None:
            load_strict(self, weights, "I3D", "Give the state dict of i3d_pretrained_400.pt.")
        for module in list(self.modules()):
            if isinstance(module, Unit):
                module.fold()
        self.requires_grad_(False)
        self.train(False)

    def _build(self, num_classes: int) -> None:
        """Make the layers as the checkpoint names them."""
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, 2)
        self.MaxPool3d_2a_3x3 = Pool((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1, self.Conv3d_2c_3x3 = Unit(64, 64, 1), Unit(64, 192, 3)
        self.MaxPool3d_3a_3x3 = Pool((1, 3, 3), (1, 2, 2))
        self.MaxPool3d_4a_3x3, self.MaxPool3d_5a_2x2 = Pool((3, 3, 3), (2, 2, 2)), Pool((2, 2, 2), (2, 2, 2))
        for name, (dim, widths) in MIXED.items():
            self.add_module(name, Mixed(dim, widths))
        self.logits = Unit(1024, num_classes, 1, plain=True)

    @classmethod
    def expected(cls, num_classes: int = 400) -> dict[str, Tensor]:
        """Return the state dict that the network loads, without values: keys and shapes."""
        with torch.device("meta"):
            network = cls.__new__(cls)
            nn.Module.__init__(network)
            network._build(num_classes)
        return network.state_dict()

    def train(self, mode: bool = True) -> I3D:
        """Stay in eval mode whatever the surrounding module does."""
        return super().train(False)

    def forward(self, clips: Tensor) -> Tensor:
        """Return the logits averaged over time [b, 400].

        Args:
            clips: [b, 3, f, 224, 224] in [-1, 1], at least 10 frames.

        Raises:
            ValueError: for another layout or too few frames.
        """
        sizes = check_shape(clips, "I3D: clips", "b 3 f h w")
        if sizes["f"] < LEAST_FRAMES:
            raise ValueError(f"I3D: a clip needs at least {LEAST_FRAMES} frames, got {sizes['f']}; give longer clips.")
        x = clips
        for name in STAGES:
            x = self.get_submodule(name)(x)
        return self.logits(F.avg_pool3d(x, (2, 7, 7), stride=1)).squeeze(4).squeeze(3).mean(2)
