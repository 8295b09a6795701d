"""Frames to latents and back, through diffusers' VAE or an image tokenizer of ours, a few frames at a time.

A tokenizer's latents are those before quantization, each channel with mean 0 and variance 1 over the training data. On the way back they
may snap to codes, where small errors of a generator vanish and details of the frames too.

Letters: b clips, f frames, c channels, h w of a latent, H W of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from genkit.tokenizers.vq_model import VQModel

FRAMES_AT_ONCE = 8
FrameCoder: TypeAlias = AutoencoderKL | VQModel


@dataclass(frozen=True)
class FrameLatents:
    """A way from frames to latents and back.

    Args:
        coder: VAE or tokenizer; None for pixels.
        mean, std: of a tokenizer's latents, by channel.
        at_once: frames that are encoded or decoded together.
        snap: whether a tokenizer's latents snap to codes before they are decoded.

    Raises:
        ValueError: for a tokenizer without mean and std, or with some of another number of channels.
    """

    coder: FrameCoder | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    at_once: int = FRAMES_AT_ONCE
    snap: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.coder, VQModel) and not len(self.mean or ()) == len(self.std or ()) == self.coder.quantizer.dim:
            wanted, given = self.coder.quantizer.dim, (len(self.mean or ()), len(self.std or ()))
            raise ValueError(f"latents of this tokenizer have {wanted} channels; latents_mean and latents_std must too, got {given}.")

    @property
    def channels(self) -> int:
        """C."""
        if self.coder is None:
            return 3
        return self.coder.quantizer.dim if isinstance(self.coder, VQModel) else int(self.coder.config["latent_channels"])

    @property
    def factor(self) -> int:
        """Pixels of a latent's side.

        Raises:
            ValueError: for a tokenizer whose patches are not square.
        """
        if self.coder is None:
            return 1
        if isinstance(self.coder, VQModel):
            if self.coder.patch[0] != self.coder.patch[1]:
                raise ValueError(f"video needs a tokenizer with square patches, got {self.coder.patch}.")
            return self.coder.patch[0]
        return int(2 ** (len(self.coder.config["block_out_channels"]) - 1))

    def encode(self, video: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return latents [b, f, c, h, w] of frames [b, f, 3, H, W] in [-1, 1].

        Args:
            video: the frames.
            noise: [b, f, c, h, w] standard normal, to draw from a VAE's posterior; its mean if None. Tokenizers have none.
        """
        if self.coder is None:
            return video
        frames = video.flatten(0, 1).split(self.at_once)
        noises = [None] * len(frames) if noise is None else noise.flatten(0, 1).split(self.at_once)
        parts = [self._encode(*pair) for pair in zip(frames, noises, strict=True)]
        return torch.cat(parts).unflatten(0, video.shape[:2]).to(video.dtype)

    def _encode(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        coder: Any = self.coder
        weight = next(coder.parameters())
        if isinstance(coder, VQModel):
            grid = coder.grid_for(*frames.shape[-2:])
            latents = coder.encode_latents(frames.to(weight)).transpose(1, 2).unflatten(2, grid)
            mean, std = self._statistics(latents)
            return (latents - mean) / std
        posterior = coder.encode(frames.to(weight)).latent_dist
        latents = posterior.mode() if noise is None else posterior.mean + posterior.std * noise.to(weight)
        scaled: Tensor = latents * coder.config["scaling_factor"]
        return scaled

    def decode(self, latents: Tensor) -> Tensor:
        """Return frames [b, f, 3, H, W] of latents [b, f, c, h, w]."""
        if self.coder is None:
            return latents
        parts = [self._decode(part).float() for part in latents.flatten(0, 1).split(self.at_once)]
        return torch.cat(parts).unflatten(0, latents.shape[:2])

    def _decode(self, latents: Tensor) -> Tensor:
        coder: Any = self.coder
        weight = next(coder.parameters())
        if isinstance(coder, VQModel):
            mean, std = self._statistics(latents)
            tokens = (latents * std + mean).flatten(2).transpose(1, 2).to(weight)
            tokens = coder.quantizer(tokens).quantized if self.snap else tokens
            return coder.decode_latents(tokens, (latents.shape[2], latents.shape[3]))
        found: Tensor = coder.decode((latents / coder.config["scaling_factor"]).to(weight)).sample
        return found

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(list(values or ())).to(like).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return mean, std

    def decoding_bytes(self, height: int, width: int) -> int:
        """Estimate the bytes of one frame's widest layer in the decoder."""
        if self.coder is None:
            return 0
        if isinstance(self.coder, VQModel):
            return 4 * self.coder.decoding_numbers(height, width)
        return int(self.coder.config["block_out_channels"][0] * height * width * 4 * 4)


@torch.no_grad()
def latent_statistics(tokenizer: VQModel, frames: Tensor) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation by channel of a tokenizer's latents of frames [n, 3, H, W]."""
    parts = [tokenizer.encode_latents(part) for part in frames.split(FRAMES_AT_ONCE)]
    latents = torch.cat(parts).flatten(0, 1).double()
    return latents.mean(0).tolist(), latents.std(0).clamp_min(1e-6).tolist()
