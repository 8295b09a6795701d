"""Inception-v3 as FID uses it: the TensorFlow graph of 2015-12-05 with 1,008 outputs.

Szegedy et al. 2016 (arXiv 1512.00567). Loads the PyTorch port's checkpoint `pt_inception-2015-12-05-6726825d.pth` (of pytorch-fid and
torch-fidelity: the same tensors), as tensors only. It differs from torchvision's Inception-v3: average pools leave the padding out,
the pool in `Mixed_7c` is a max pool, 1,008 classes, no auxiliary head.

- batch norm is folded into the convolutions and the weights are laid out channels-last: 1.7x on a CPU;
- `forward` gives any set of taps in one pass and stops after the last one needed;
- frozen, always in eval mode.

Taps: 64, 192, 768 (spatial means after the first and second max pool and Mixed_6e), 2048 (pooled), `spatial` (2,023 numbers for sFID: the
first 7 channels of Mixed_6d's 1x1 branch), `logits`, `logits_unbiased` (without the classifier's bias; the Inception Score).

Letters: b batch, h w rows and columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.checks import check_shape, choose
from genkit.weights import load_strict

SIZE = 299
FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
CHECKSUM = "6726825d"  # first digits of the file's SHA-256, which its name carries
TAPS = {"64": 64, "192": 192, "spatial": 2023, "768": 768, "2048": 2048, "logits": 1008, "logits_unbiased": 1008}


STAGES = (
    "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2",
    "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c",
)  # fmt: skip


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm (epsilon 1e-3), ReLU."""

    def __init__(
        self, dim_in: int, dim_out: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | tuple[int, int] = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim_out, kernel, stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(dim_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def averaged(self, x: Tensor) -> Tensor:
        """Compute a 1x1 unit on the average-pooled input; folded, the pool comes after the convolution, with fewer channels."""
        if isinstance(self.bn, nn.BatchNorm2d):
            return self(_average_pool(x))
        return F.relu(_average_pool(self.conv(x)), inplace=True)

    def fold(self) -> None:
        """Join convolution and batch norm."""
        assert isinstance(self.bn, nn.BatchNorm2d), "a unit is folded once"
        self.conv = nn.utils.fusion.fuse_conv_bn_eval(self.conv.eval(), self.bn.eval())
        self.bn = nn.Identity()


def _strip(h: int, w: int) -> dict[str, Any]:
    """Return kernel and padding of a convolution along one axis."""
    return {"kernel": (h, w), "padding": (h // 2, w // 2)}


def _average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """Mixed_5b, 5c, 5d: 35x35."""

    def __init__(self, dim: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = ConvUnit(dim, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = ConvUnit(dim, 48, 1), ConvUnit(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = ConvUnit(dim, 64, 1), ConvUnit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvUnit(96, 96, 3, padding=1)
        self.branch_pool = ConvUnit(dim, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool.averaged(x)], 1)


class BlockB(nn.Module):
    """Mixed_6a: 35x35 to 17x17."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.branch3x3 = ConvUnit(dim, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = ConvUnit(dim, 64, 1), ConvUnit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvUnit(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """Mixed_6b .. 6e: 17x17, factorised 7x7."""

    def __init__(self, dim: int, mid: int) -> None:
        super().__init__()
        row, column = _strip(1, 7), _strip(7, 1)
        self.branch1x1 = ConvUnit(dim, 192, 1)
        self.branch7x7_1, self.branch7x7_2, self.branch7x7_3 = (
            ConvUnit(dim, mid, 1),
            ConvUnit(mid, mid, **row),
            ConvUnit(mid, 192, **column),
        )
        self.branch7x7dbl_1, self.branch7x7dbl_2 = ConvUnit(dim, mid, 1), ConvUnit(mid, mid, **column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = ConvUnit(mid, mid, **row), ConvUnit(mid, mid, **column)
        self.branch7x7dbl_5 = ConvUnit(mid, 192, **row)
        self.branch_pool = ConvUnit(dim, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool.averaged(x)], 1)


class BlockD(nn.Module):
    """Mixed_7a: 17x17 to 8x8."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = ConvUnit(dim, 192, 1), ConvUnit(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = ConvUnit(dim, 192, 1), ConvUnit(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3, self.branch7x7x3_4 = ConvUnit(192, 192, (7, 1), padding=(3, 0)), ConvUnit(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        long = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), long, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """Mixed_7b (average pool) and Mixed_7c (max pool): 8x8, 2,048 channels."""

    def __init__(self, dim: int, max_pool: bool) -> None:
        super().__init__()
        self.max_pool = max_pool
        row, column = _strip(1, 3), _strip(3, 1)
        self.branch1x1 = ConvUnit(dim, 320, 1)
        self.branch3x3_1, self.branch3x3_2a, self.branch3x3_2b = (
            ConvUnit(dim, 384, 1),
            ConvUnit(384, 384, **row),
            ConvUnit(384, 384, **column),
        )
        self.branch3x3dbl_1, self.branch3x3dbl_2 = ConvUnit(dim, 448, 1), ConvUnit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = ConvUnit(384, 384, **row), ConvUnit(384, 384, **column)
        self.branch_pool = ConvUnit(dim, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1)) if self.max_pool else self.branch_pool.averaged(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single)]
        return torch.cat([*parts, self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), pooled], 1)


class InceptionV3(nn.Module):
    """The network, with the module names of the PyTorch port.

    Args:
        weights: state dict in that layout; random weights if None.

    Raises:
        ValueError: if tensors are missing, unexpected or misshapen.
    """

    def __init__(self, weights: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self._build()
        if weights is not None:
            load_strict(self, weights, "FID Inception network", f"Give the file of the PyTorch port, {FILE}.")
        for module in list(self.modules()):
            if isinstance(module, ConvUnit):
                module.fold()
        self.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train(False)

    def _build(self) -> None:
        """Make the layers as the checkpoint names them."""
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, 3, padding=1)
        self.MaxPool_1 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, 3)
        self.MaxPool_2 = nn.MaxPool2d(3, 2)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = BlockC(768, 128), BlockC(768, 160), BlockC(768, 160), BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, max_pool=False), BlockE(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008)

    @classmethod
    def expected(cls) -> dict[str, Tensor]:
        """Return the state dict that the network loads, without values: keys and shapes."""
        with torch.device("meta"):
            return cls.unfolded().state_dict()

    @classmethod
    def unfolded(cls, weights: Mapping[str, Tensor] | None = None) -> InceptionV3:
        """Return the network as published, batch norms apart: to compare with."""
        network = cls.__new__(cls)
        nn.Module.__init__(network)
        network._build()
        if weights is not None:
            load_strict(network, weights, "FID Inception network", f"Give the file of the PyTorch port, {FILE}.")
        return network.train(False)

    def train(self, mode: bool = True) -> InceptionV3:
        """Stay in eval mode whatever the surrounding module does."""
        return super().train(False)

    def forward(self, x: Tensor, taps: Iterable[str] = ("2048",)) -> dict[str, Tensor]:
        """Compute features.

        Args:
            x: pictures [b, 3, 299, 299] as a tool normalises them, about [-1, 1].
            taps: names of `TAPS`.

        Returns:
            Each tap [b, its width].

        Raises:
            ValueError: for unknown taps or another number of channels.
        """
        wanted = set(taps)
        for name in wanted:
            choose(name, TAPS, "tap of the Inception network:")
        check_shape(x, "InceptionV3: x", "b 3 h w")
        found: dict[str, Tensor] = {}
        x = self.MaxPool_1(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x.contiguous(memory_format=torch.channels_last)))))
        found["64"] = x.mean((2, 3))
        if wanted <= found.keys():
            return {name: found[name] for name in wanted}
        x = self.MaxPool_2(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        found["192"] = x.mean((2, 3))
        if wanted <= found.keys():
            return {name: found[name] for name in wanted}
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))))
        if "spatial" in wanted:
            found["spatial"] = self.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        found["768"] = x.mean((2, 3))
        if wanted <= found.keys():
            return {name: found[name] for name in wanted}
        found["2048"] = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))
        if wanted & {"logits", "logits_unbiased"}:
            found["logits_unbiased"] = found["2048"] @ self.fc.weight.T
            found["logits"] = found["logits_unbiased"] + self.fc.bias
        return {name: found[name] for name in wanted}


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file, hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_weights(folder: Path) -> Path:
    """Return the port's checkpoint in a folder, downloading it once; its checksum is verified.

    Raises:
        OSError: if it cannot be downloaded or arrives damaged; nothing is left behind.
    """
    path = folder / FILE
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL, str(path), hash_prefix=CHECKSUM, progress=False)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"the weights of the FID Inception network cannot be fetched from {URL} ({error}). Give the file with --weights PATH, "
                "or choose the packaged network with --network efficientnet-lite0 (its distance is not FID)."
            ) from error
    return path
