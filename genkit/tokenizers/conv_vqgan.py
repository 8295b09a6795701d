"""Convolutional image tokenizers with a slot for the quantizer: SimVQ's and MaskGIT's VQGAN, without attention.

Zhu et al. 2024, SimVQ (arXiv 2411.02038), after Esser et al. 2021, VQGAN (arXiv 2012.09841); Chang et al. 2022, MaskGIT (arXiv
2202.04200). Loads their official checkpoints (`genkit.convert.simvq`, `genkit.convert.maskgit_vqgan`).

- fully convolutional: any picture whose sides are multiples of 2 to the power of the levels but one
- levels shrink by strided convolutions and grow by depth-to-space (SimVQ), or shrink by averages and grow by repetition (MaskGIT)
- MaskGIT's released weights drop a block's input where its width changes (`shortcut="branch"`)
- channels last in memory where convolutions gain by it

Legend: b batch, n tokens, c width of a code, d channels of a level, h w grid of tokens, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.checks import choose
from genkit.tokenizers.vq_model import VQModel

SIZES: dict[str, dict[str, Any]] = {
    "simvq": {"channels": 128, "multipliers": [1, 2, 2, 4], "sample_size": 128},
    "maskgit": {
        "channels": 128, "multipliers": [1, 1, 2, 2, 4], "resampling": "average", "shortcut": "branch", "official_range": True,
        "sample_size": 256,
    },
}  # fmt: skip
"""Published sizes, codes of 128 and of 256 numbers."""
GROUPS = 32


def group_norm(channels: int) -> nn.GroupNorm:
    """Return the norm of all published layers."""
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class ConvBlock(nn.Module):
    """Two 3x3 convolutions, each behind a norm and SiLU, and a shortcut: [b, d_in, h, w] -> [b, d, h, w].

    Args:
        d_in, d: channels.
        shortcut: where the width changes, a 1x1 convolution of the "input", or of the block's own "branch" as MaskGIT's weights want it.
    """

    def __init__(self, d_in: int, d: int, shortcut: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = group_norm(d_in), group_norm(d)
        self.conv1 = nn.Conv2d(d_in, d, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(d, d, 3, padding=1, bias=False)
        self.is_branch = shortcut == "branch"
        self.shortcut = None if d_in == d else nn.Conv2d(d if self.is_branch else d_in, d, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return features [b, d, h, w]."""
        branch = self.conv1(F.silu(self.norm1(x)))
        branch = self.conv2(F.silu(self.norm2(branch)))
        if self.shortcut is None:
            return x + branch
        return branch + self.shortcut(branch if self.is_branch else x)


class Level(nn.Module):
    """Blocks of one resolution, then what leads to the next, if there is a next.

    Args:
        blocks: the blocks.
        resample: to the next resolution; None at the last.
    """

    def __init__(self, blocks: Iterable[nn.Module], resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample

    def forward(self, x: Tensor, checkpointing: bool = False) -> Tensor:
        """Return features [b, d, h', w']."""
        x = run(self.blocks, x, checkpointing)
        return x if self.resample is None else self.resample(x)


class DepthToSpace(nn.Conv2d):
    """[b, d, h, w] -> [b, d, 2 h, 2 w] by a convolution to four times the channels, which become pixels."""

    def __init__(self, d: int) -> None:
        super().__init__(d, 4 * d, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the larger features."""
        return F.pixel_shuffle(super().forward(x), 2)


class RepeatedConv(nn.Conv2d):
    """[b, d, h, w] -> [b, d, 2 h, 2 w] by repeating pixels, then a convolution."""

    def __init__(self, d: int) -> None:
        super().__init__(d, d, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the larger features."""
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


RESAMPLING: dict[str, tuple[Any, Any]] = {
    "convolution": (lambda d: nn.Conv2d(d, d, 3, stride=2, padding=1), DepthToSpace),
    "average": (lambda d: nn.AvgPool2d(2), RepeatedConv),
}


def in_order(x: Tensor) -> Tensor:
    """Return pictures or features in the order of memory in which convolutions are fast: channels last, but in fp32 on a CPU.

    There it gains 10 % and rounds four times as much.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return x.contiguous()
    return x.contiguous(memory_format=torch.channels_last)


def run(blocks: Iterable[nn.Module], x: Tensor, checkpointing: bool) -> Tensor:
    """Apply blocks to features, recomputing each in the backward pass if `checkpointing`."""
    for block in blocks:
        x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
    return x


class ConvEncoder(nn.Module):
    """Pixels [b, c, H, W] to features [b, d, h, w].

    Args:
        in_channels: of pictures.
        widths: channels by level.
        num_res_blocks, num_mid_blocks: of a level, and behind the last.
        out_channels: d.
        down: channels -> module that halves the sides.
        shortcut: see `ConvBlock`.
    """

    def __init__(
        self, in_channels: int, widths: Sequence[int], num_res_blocks: int, num_mid_blocks: int, out_channels: int, down: Any, shortcut: str
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.levels, last = nn.ModuleList(), widths[0]
        for i, d in enumerate(widths):
            blocks = [ConvBlock(last if j == 0 else d, d, shortcut) for j in range(num_res_blocks)]
            self.levels.append(Level(blocks, down(d) if i + 1 < len(widths) else None))
            last = d
        self.mid = nn.ModuleList(ConvBlock(last, last, shortcut) for _ in range(num_mid_blocks))
        self.norm = group_norm(last)
        self.conv_out = nn.Conv2d(last, out_channels, 1)

    def forward(self, x: Tensor, checkpointing: bool = False) -> Tensor:
        """Return features [b, d, h, w]."""
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x, checkpointing)
        return self.conv_out(F.silu(self.norm(run(self.mid, x, checkpointing))))


class ConvDecoder(nn.Module):
    """Features [b, d, h, w] to pixels [b, c, H, W]; `levels` are indexed as the encoder's, the last one runs first.

    Args:
        in_channels: d.
        widths, num_res_blocks, num_mid_blocks, shortcut: as the encoder's.
        out_channels: of pictures.
        up: channels -> module that doubles the sides.
    """

    def __init__(
        self, in_channels: int, widths: Sequence[int], num_res_blocks: int, num_mid_blocks: int, out_channels: int, up: Any, shortcut: str
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(ConvBlock(widths[-1], widths[-1], shortcut) for _ in range(num_mid_blocks))
        levels: list[nn.Module] = []
        for i, d in enumerate(widths):
            before = widths[min(i + 1, len(widths) - 1)]
            blocks = [ConvBlock(before if j == 0 else d, d, shortcut) for j in range(num_res_blocks)]
            levels.append(Level(blocks, up(d) if i else None))
        self.levels = nn.ModuleList(levels)
        self.norm = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, x: Tensor, checkpointing: bool = False) -> Tensor:
        """Return pixels [b, c, H, W]."""
        x = run(self.mid, self.conv_in(x), checkpointing)
        for level in reversed(self.levels):
            x = level(x, checkpointing)
        return self.conv_out(F.silu(self.norm(x)))


class ConvVQModel(VQModel):
    """A convolutional tokenizer.

    Args:
        quantizer_config: config of `build_quantizer`: name, codebook_size, dim, ...
        channels: of the first level; a multiple of 32 times every multiplier.
        multipliers: channels of each level as multiples of the first's; every level but the last halves the sides.
        num_res_blocks: of a level.
        num_mid_blocks: behind the encoder's last level, and before the decoder's first.
        resampling: "convolution" (SimVQ) or "average" (MaskGIT).
        shortcut: "input", or "branch" for MaskGIT's released weights.
        in_channels: picture channels.
        official_range: whether the network computes in [0, 1] as MaskGIT's released weights do; the interface stays [-1, 1].
        sample_size: picture side [H, W] or int it was trained at; only a default for tools, any other size works.

    Raises:
        ValueError: if sizes or options do not fit; names them.

    Example:
        >>> model = ConvVQModel(quantizer_config={"name": "simvq", "codebook_size": 64, "dim": 8}, channels=32, multipliers=[1, 1])
        >>> tuple(model.encode(torch.zeros(1, 3, 16, 24)).indices.shape)
        (1, 8, 12)
    """

    _no_split_modules: ClassVar[list[str]] = ["ConvBlock"]

    @register_to_config
    def __init__(
        self,
        *,
        quantizer_config: dict[str, Any],
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 4),
        num_res_blocks: int = 2,
        num_mid_blocks: int = 2,
        resampling: str = "convolution",
        shortcut: str = "input",
        in_channels: int = 3,
        official_range: bool = False,
        sample_size: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        down, up = RESAMPLING[choose(resampling, RESAMPLING, "resampling")]
        choose(shortcut, ("input", "branch"), "shortcut")
        widths = [channels * m for m in multipliers]
        if not widths or any(width % GROUPS or width < 1 for width in widths) or min(num_res_blocks, num_mid_blocks + 1) < 1:
            raise ValueError(
                f"ConvVQModel: channels of every level must be a multiple of {GROUPS} and levels need blocks, got channels={channels}, "
                f"multipliers={list(multipliers)}, num_res_blocks={num_res_blocks}, num_mid_blocks={num_mid_blocks}."
            )
        self.patch = (2 ** (len(widths) - 1), 2 ** (len(widths) - 1))
        self.build_codes(quantizer_config)
        sizes = (widths, num_res_blocks, num_mid_blocks)
        self.encoder = ConvEncoder(in_channels, *sizes, self.quantizer.dim, down, shortcut)
        self.decoder = ConvDecoder(self.quantizer.dim, *sizes, in_channels, up, shortcut)
        self.gradient_checkpointing = False

    def encode_latents(self, x: Tensor) -> Tensor:
        """Turn pictures [b, c, H, W] in [-1, 1] into latents [b, n, c] before quantization.

        Raises:
            ValueError: for another number of axes or channels, or sides that the levels do not divide.
        """
        x = in_order(self.checked(x))
        return rearrange(self.encoder(x, self.gradient_checkpointing and self.training), "b c h w -> b (h w) c")

    def decode_latents(self, quantized: Tensor, grid: tuple[int, int]) -> Tensor:
        """Turn quantized latents [b, n, c] of a grid (h, w) into pictures [b, 3, H, W]."""
        x = rearrange(quantized.to(self.decoder.conv_in.weight.dtype), "b (h w) c -> b c h w", h=grid[0], w=grid[1])
        x = in_order(x)
        return self.to_interface(self.decoder(x, self.gradient_checkpointing and self.training))

    @property
    def last_layer(self) -> Tensor:
        """The weight that makes the pixels."""
        return self.decoder.conv_out.weight

    def decoding_numbers(self, height: int, width: int) -> int:
        """Return how many numbers the decoder holds at its widest for one picture."""
        widths = [self.config["channels"] * m for m in self.config["multipliers"]]
        return 4 * max(height * width * d // 4**i for i, d in enumerate(widths))
