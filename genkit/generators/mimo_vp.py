"""MIMO-VP: given frames to as many future frames in one shot, by attention between whole frames and 3-D convolutions.

MIMO Is All You Need: A Strong Multi-In-Multi-Out Baseline for Video Prediction (Ning et al., AAAI 2023, arXiv 2212.04655). Every decoder
layer predicts; all predictions are trained, the last one is the answer. Frames of any size that four divides, and batches of any size.

Legend: b clips, f frames, c channels, h w rows and columns (after space-to-depth h/2, in features h/4), d width.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.blocks.attend import attend
from genkit.checks import check_shape
from genkit.generators.predformer import FramesOutput


def fold_frames(x: Tensor, patch: int) -> Tensor:
    """[b, f, c, h, w] -> [b, f, p p c, h/p, w/p], channels ordered row, column, channel."""
    return rearrange(x, "b f c (h p) (w q) -> b f (p q c) h w", p=patch, q=patch)


def unfold_frames(x: Tensor, patch: int) -> Tensor:
    """Undo `fold_frames`."""
    return rearrange(x, "b f (p q c) h w -> b f c (h p) (w q)", p=patch, q=patch)


class Unit(nn.Module):
    """A convolution without bias, a group norm of one group, and maybe SiLU, on the frames of a clip.

    Args:
        conv: the convolution.
        dim: its output channels.
        act: whether SiLU follows.
    """

    def __init__(self, conv: nn.Module, dim: int, act: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv, nn.GroupNorm(1, dim), act

    def forward(self, x: Tensor) -> Tensor:
        """Apply to [b, f, c, h, w] frame by frame, or to [b, c, f, h, w] with a 3-D convolution."""
        if isinstance(self.conv, nn.Conv3d):
            y = self.norm(self.conv(x))
        else:
            y = self.norm(self.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        return F.silu(y) if self.act else y


class FrameAttention(nn.Module):
    """Attention whose tokens are whole frames: a head is d / heads maps, flattened."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (Unit(nn.Conv2d(dim, dim, 1, bias=False), dim, act=False) for _ in range(3))
        self.out = Unit(nn.Conv2d(dim, dim, 1, bias=False), dim, act=True)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Attend from frames x to frames of a context, both [b, f, d, h, w]."""
        q, k, v = (
            rearrange(part, "b f (n d) h w -> b n f (d h w)", n=self.heads) for part in (self.q(x), self.k(context), self.v(context))
        )
        mixed = rearrange(attend(q, k, v), "b n f (d h w) -> b f (n d) h w", h=x.shape[3], w=x.shape[4])
        return self.out(mixed)


class FeedForward(nn.Module):
    """Two 3-D convolutions over frames, rows and columns."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first = Unit(nn.Conv3d(dim, 2 * dim, 3, padding=1, bias=False), 2 * dim, act=True)
        self.second = Unit(nn.Conv3d(2 * dim, dim, 3, padding=1, bias=False), dim, act=True)

    def forward(self, x: Tensor) -> Tensor:
        """Mix [b, f, d, h, w]."""
        return self.second(self.first(x.transpose(1, 2))).transpose(1, 2)


class Layer(nn.Module):
    """Self-attention, in a decoder attention to the encoder, feed-forward; a group norm behind each sum."""

    def __init__(self, dim: int, heads: int, crosses: bool) -> None:
        super().__init__()
        self.attention = FrameAttention(dim, heads)
        self.cross = FrameAttention(dim, heads) if crosses else None
        self.mix = FeedForward(dim)
        self.norms = nn.ModuleList(nn.GroupNorm(1, dim) for _ in range(3 if crosses else 2))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """Apply to [b, f, d, h, w]."""
        norms = iter(self.norms)

        def summed(x: Tensor, y: Tensor) -> Tensor:
            return next(norms)((x + y).flatten(0, 1)).unflatten(0, x.shape[:2])

        x = summed(x, self.attention(x, x))
        if self.cross is not None and memory is not None:
            x = summed(x, self.cross(x, memory))
        return summed(x, self.mix(x))


class MIMOVP(ModelMixin, ConfigMixin):
    """Frames to frames.

    Args:
        in_channels: c.
        patch_size: of the space-to-depth in front.
        dim: d.
        heads: of the attentions.
        num_encoder_layers, num_decoder_layers: 6 and 6 in the released code.
        official_range: the network works on [0, 1], as published; the interface is [-1, 1] all the same.

    Raises:
        ValueError: if heads do not divide the width.

    Example:
        >>> model = MIMOVP(dim=8, heads=2, num_encoder_layers=1, num_decoder_layers=1)
        >>> model(torch.zeros(1, 3, 1, 16, 16)).frames.shape
        torch.Size([1, 3, 1, 16, 16])
    """

    @register_to_config
    def __init__(
        self,
        *,  # diffusers forgets values passed by position when a model is rebuilt from its config
        in_channels: int = 1,
        patch_size: int = 2,
        dim: int = 128,
        heads: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        official_range: bool = True,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"MIMOVP: heads must divide dim, got dim={dim}, heads={heads}.")
        channels = in_channels * patch_size**2

        def stem() -> Unit:
            return Unit(nn.Conv2d(channels, dim, 3, 2, 1, bias=False), dim, act=True)

        self.encoder_stem, self.decoder_stem = stem(), stem()
        self.encoder = nn.ModuleList(Layer(dim, heads, crosses=False) for _ in range(num_encoder_layers))
        self.decoder = nn.ModuleList(Layer(dim, heads, crosses=True) for _ in range(num_decoder_layers))
        self.up = Unit(nn.ConvTranspose2d(dim, dim, 3, 2, 1, output_padding=1, bias=False), dim, act=True)
        self.to_frames = nn.ConvTranspose2d(dim, channels, 1, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Xavier-uniform convolutions."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, sample: Tensor, num_frames: int | None = None, return_dict: bool = True) -> FramesOutput | tuple[Tensor]:
        """Predict.

        Args:
            sample: [b, f, c, h, w] in [-1, 1], h and w multiples of twice the patch.
            num_frames: frames to predict; as many as given if None, more by feeding predictions back.
            return_dict: False returns a tuple.

        Raises:
            ValueError: if shapes do not fit, or nothing is asked for.
        """
        sizes = check_shape(sample, "MIMOVP: sample", "b f c h w", c=self.config["in_channels"])
        step = 2 * self.config["patch_size"]
        wanted = sizes["f"] if num_frames is None else num_frames
        if sizes["h"] % step or sizes["w"] % step or wanted < 1:
            raise ValueError(
                f"MIMOVP: rows and columns must be multiples of {step} and num_frames at least 1, got {list(sample.shape)}, {wanted}."
            )
        unit, parts, made = self.config["official_range"], [], 0
        x = (sample + 1) / 2 if unit else sample
        while made < wanted:
            x = unfold_frames(self.predictions(fold_frames(x, self.config["patch_size"]))[-1], self.config["patch_size"])
            parts.append(x)
            made += x.shape[1]
        frames = torch.cat(parts, dim=1)[:, :wanted]
        frames = frames * 2 - 1 if unit else frames
        return FramesOutput(frames=frames) if return_dict else (frames,)

    def predictions(self, folded: Tensor) -> list[Tensor]:
        """Return every decoder layer's prediction [b, f, p p c, h/p, w/p] in [0, 1], for folded frames of that shape."""
        memory: Any = self.encoder_stem(folded)
        for layer in self.encoder:
            memory = layer(memory)
        x, found = self.decoder_stem(folded), []
        for layer in self.decoder:
            x = layer(x, memory)
            found.append(self.to_frames(self.up(x).flatten(0, 1)).unflatten(0, x.shape[:2]).sigmoid())
        return found
