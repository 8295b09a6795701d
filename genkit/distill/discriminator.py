"""A small discriminator on the lowest activations of a critic, as DMD2 has it.

Source: Yin et al. 2024 (arXiv 2405.14867), section 4.3. Letters: b batch, c channels, h w rows and columns.
"""

from __future__ import annotations

from torch import Tensor, nn

from genkit.checks import check_shape


class BottleneckHead(nn.Module):
    """Convolutions of 4x4 and stride 2 down to few pixels, group norm and SiLU between, then one logit per place.

    Args:
        channels: of the activations.
        width: of the head.

    Example:
        >>> import torch
        >>> BottleneckHead(16, 32)(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 4])
    """

    def __init__(self, channels: int, width: int = 128) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(channels, width, 4, 2, 1)
        self.norm0 = nn.GroupNorm(min(32, width), width)
        self.conv1 = nn.Conv2d(width, width, 4, 2, 1)
        self.norm1 = nn.GroupNorm(min(32, width), width)
        self.logit = nn.Conv2d(width, 1, 1)
        self.act = nn.SiLU()

    def forward(self, activations: Tensor) -> Tensor:
        """Return logits [b, places] of activations [b, c, h, w], h and w at least 4."""
        check_shape(activations, "BottleneckHead: activations", "b c h w")
        x = self.act(self.norm0(self.conv0(activations)))
        return self.logit(self.act(self.norm1(self.conv1(x)))).flatten(1)
