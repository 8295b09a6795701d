"""What all image tokenizers with a codebook share: pictures to codes and back on any grid, whatever the network.

A subclass turns pictures into latents and quantized latents into pictures; the quantizer between them is named in its config.

Legend: b batch, n tokens, c width of a code, h w grid of tokens, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.utils import BaseOutput
from einops import rearrange
from torch import Tensor

from genkit.checks import check_shape
from genkit.tokenizers.quantizers import ResidualQuantizer, build_quantizer
from genkit.tokenizers.quantizers.base import VectorQuantizerBase
from genkit.tokenizers.tiling import Blend


@dataclass
class VQEncoderOutput(BaseOutput):
    """What `encode` returns.

    Attributes:
        latents: [b, n, c], before quantization.
        quantized: [b, n, c], the codes, with the estimator's gradient.
        indices: [b, h, w] int64.
        loss: scalar quantizer loss.
        terms: its unweighted parts by name.

    The defaults let accelerate rebuild the output from a dict when it casts to fp32.
    """

    latents: Tensor
    quantized: Tensor = None  # type: ignore[assignment]
    indices: Tensor = None  # type: ignore[assignment]
    loss: Tensor = None  # type: ignore[assignment]
    terms: dict[str, Tensor] = None  # type: ignore[assignment]


@dataclass
class DecoderOutput(BaseOutput):
    """What `decode` returns: `sample` [b, 3, H, W], about [-1, 1], not clamped."""

    sample: Tensor


@dataclass
class VQOutput(VQEncoderOutput):
    """What `forward` returns: the encoder's output and the reconstruction `sample` [b, 3, H, W]."""

    sample: Tensor = None  # type: ignore[assignment]


class VQModel(ModelMixin, ConfigMixin):
    """Base of image tokenizers. A subclass's config has `in_channels`, `official_range` and `sample_size`.

    Attributes:
        patch: pixels of a token, [rows, columns].
        quantizer: of its latents.
    """

    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ["quantizer"]
    patch: tuple[int, int]
    quantizer: VectorQuantizerBase

    def build_codes(self, config: Mapping[str, Any]) -> None:
        """Build the quantizer of a config, see `build_quantizer`.

        Raises:
            ValueError: for one with several codes per token.
        """
        quantizer = build_quantizer(config)
        if isinstance(quantizer, ResidualQuantizer):
            name = type(self).__name__
            raise ValueError(f"{name}: one code per token; num_levels would give several. Leave it out of quantizer_config.")
        self.quantizer = quantizer

    def grid_for(self, height: int, width: int) -> tuple[int, int]:
        """Return the token grid (h, w) of a picture of height x width pixels.

        Raises:
            ValueError: if the patch does not divide a side.
        """
        if height % self.patch[0] or width % self.patch[1] or not height or not width:
            raise ValueError(
                f"{type(self).__name__}: sides of the picture must be multiples of the patch {self.patch[0]}x{self.patch[1]}, "
                f"got {height}x{width}; resize or pad first."
            )
        return height // self.patch[0], width // self.patch[1]

    def checked(self, x: Tensor) -> Tensor:
        """Return pictures [b, c, H, W] in [-1, 1] as the network wants them.

        Raises:
            ValueError: for another number of axes or channels, or sides that the patch does not divide.
        """
        check_shape(x, f"{type(self).__name__}.encode: image", "b c H W", c=self.config["in_channels"])
        self.grid_for(x.shape[-2], x.shape[-1])
        return (x + 1) / 2 if self.config["official_range"] else x

    def to_interface(self, sample: Tensor) -> Tensor:
        """Return what the network made, about [-1, 1]."""
        return sample * 2 - 1 if self.config["official_range"] else sample

    def encode_latents(self, x: Tensor) -> Tensor:
        """Turn pictures [b, c, H, W] in [-1, 1] into latents [b, n, c] before quantization."""
        raise NotImplementedError

    def decode_latents(self, quantized: Tensor, grid: tuple[int, int]) -> Tensor:
        """Turn quantized latents [b, n, c] of a grid (h, w) into pictures [b, 3, H, W]."""
        raise NotImplementedError

    @property
    def last_layer(self) -> Tensor:
        """The weight that makes the pixels: where the gradients of losses are compared."""
        raise NotImplementedError

    def decoding_numbers(self, height: int, width: int) -> int:
        """Return how many numbers the decoder holds at its widest for one picture."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> VQEncoderOutput:
        """Turn pictures [b, c, H, W] in [-1, 1] into codes.

        Returns:
            latents and quantized [b, n, c], indices [b, h, w] int64 and the quantizer loss.

        Raises:
            ValueError: for another number of axes or channels, or sides that the patch does not divide.
        """
        return self._quantized(self.encode_latents(x), self.grid_for(x.shape[-2], x.shape[-1]))

    def _quantized(self, latents: Tensor, grid: tuple[int, int]) -> VQEncoderOutput:
        """Return what `encode` does for latents [b, n, c] of a grid."""
        out = self.quantizer(latents)
        indices = rearrange(out.indices, "b (h w) -> b h w", h=grid[0], w=grid[1])
        return VQEncoderOutput(latents=latents, quantized=out.quantized, indices=indices, loss=out.loss, terms=out.terms)

    def decode(self, indices: Tensor, grid: tuple[int, int] | None = None) -> DecoderOutput:
        """Turn codes into pictures.

        Args:
            indices: [b, h, w] or [b, n] int64; [b, n] needs `grid` unless n is a square.
            grid: (h, w) of flat indices.

        Returns:
            sample [b, 3, H, W], about [-1, 1], not clamped.

        Raises:
            ValueError: if an index is outside the codebook or the grid does not fit.
        """
        grid = self._checked_codes(indices, grid)
        return DecoderOutput(sample=self.decode_latents(self.quantizer.lookup(indices.flatten(1)), grid))

    def _checked_codes(self, indices: Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
        """Return the grid of codes [b, h, w] or [b, n]; raises ValueError as `decode` does."""
        name, codes = type(self).__name__, self.quantizer.codebook_size
        if indices.ndim == 3:
            grid = (indices.shape[1], indices.shape[2])
        elif grid is None:
            side = math.isqrt(indices.shape[-1])
            grid = (side, side)
        if indices.ndim not in (2, 3) or math.prod(indices.shape[1:]) != grid[0] * grid[1]:
            raise ValueError(
                f"{name}.decode: indices must be [b, h, w] or [b, n] of a grid {grid}, got {list(indices.shape)}; give grid=(h, w)."
            )
        if not torch.compiler.is_compiling() and indices.device.type == "cpu" and indices.numel():
            low, high = int(indices.min()), int(indices.max())
            if low < 0 or high >= codes:
                raise ValueError(f"{name}.decode: indices must lie in 0 .. {codes - 1}, got {low} .. {high}.")
        return grid

    def tiled_encode(self, x: Tensor, tile: int | Sequence[int] | None = None, overlap: float = 0.25) -> VQEncoderOutput:
        """Turn large pictures [b, c, H, W] in [-1, 1] into codes, a tile at a time: latents of tiles are averaged, then quantized once.

        Args:
            x: pictures; those not larger than a tile give what `encode` does.
            tile: sides of a tile in pixels, multiples of the patch; `sample_size` of the config if None.
            overlap: share of a tile that its neighbours also cover at least, in [0, 0.5].

        Returns:
            What `encode` does.

        Raises:
            ValueError: as `encode`, and for tiles that the patch does not divide or an overlap out of range.
        """
        check_shape(x, f"{type(self).__name__}.tiled_encode: image", "b c H W", c=self.config["in_channels"])
        grid = self.grid_for(x.shape[-2], x.shape[-1])
        blend, (ph, pw) = self._blend(grid, tile, overlap), self.patch

        def latents() -> Iterator[tuple[tuple[slice, slice], Tensor]]:
            for rows, columns in blend.tiles():
                part = x[:, :, rows.start * ph : rows.stop * ph, columns.start * pw : columns.stop * pw]
                yield (rows, columns), rearrange(self.encode_latents(part), "b (h w) c -> b c h w", h=blend.tile[0])

        return self._quantized(rearrange(blend.collect(latents()), "b c h w -> b (h w) c"), grid)

    def tiled_decode(
        self, indices: Tensor, grid: tuple[int, int] | None = None, tile: int | Sequence[int] | None = None, overlap: float = 0.25
    ) -> DecoderOutput:
        """Turn codes into large pictures, a tile at a time; see `decode` and `tiled_encode` for the arguments and errors."""
        grid = self._checked_codes(indices, grid)
        blend = self._blend(grid, tile, overlap)
        codes = rearrange(indices.flatten(1), "b (h w) -> b h w", h=grid[0])

        def pixels() -> Iterator[tuple[tuple[slice, slice], Tensor]]:
            for rows, columns in blend.tiles():
                yield (rows, columns), self.decode_latents(self.quantizer.lookup(codes[:, rows, columns].flatten(1)), blend.tile)

        return DecoderOutput(sample=blend.collect(pixels(), self.patch))

    def _blend(self, grid: tuple[int, int], tile: int | Sequence[int] | None, overlap: float) -> Blend:
        """Return the tiles of a grid; raises ValueError as `tiled_encode` does."""
        name, sides = type(self).__name__, tile if tile is not None else self.config["sample_size"]
        if sides is None:
            raise ValueError(f"{name}: its config names no sample_size; say how large tiles are, tile=256.")
        if not 0 <= overlap <= 0.5:
            raise ValueError(f"{name}: overlap must lie in [0, 0.5], got {overlap}.")
        h, w = self.grid_for(*([sides] * 2 if isinstance(sides, int) else sides))
        return Blend(grid, (h, w), (min(math.ceil(h * overlap), h - 1), min(math.ceil(w * overlap), w - 1)))

    def forward(self, x: Tensor, quantize: bool = True) -> VQOutput:
        """Encode and reconstruct pictures [b, c, H, W] in [-1, 1]; the training step's one evaluation.

        Args:
            x: pictures.
            quantize: whether the decoder sees codes; without, `latents` and `sample` alone are set (a start of training, see
                `VectorQuantizerBase.fit`).
        """
        if not quantize:
            latents = self.encode_latents(x)
            return VQOutput(latents=latents, sample=self.decode_latents(latents, self.grid_for(x.shape[-2], x.shape[-1])))
        encoded = self.encode(x)
        sample = self.decode_latents(encoded.quantized, (encoded.indices.shape[1], encoded.indices.shape[2]))
        return VQOutput(**encoded, sample=sample)
