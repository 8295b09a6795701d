"""ViT-VQGAN stage 1: a transformer image tokenizer with a slot for the quantizer.

Yu et al. 2022, "Vector-quantized Image Modeling with Improved VQGAN" (arXiv 2110.04627). Loads the checkpoints of the public PyTorch
re-implementation (`genkit.convert.vit_vqgan`).

- Any picture whose sides the patch divides: the positional tables are closed forms and are made for the grid at hand.
- The quantizer is named in the config: l2-normalised codes as published, plain VQ, SimVQ; straight-through or rotated gradient.
- Patches as published (one strided convolution in, one transposed convolution out), or small convolution stacks at both ends
  (`stem="conv"`), which train much faster on few pictures.
- Without encoder blocks (`depth` 0) codes are local: each depends on its patch and what the stem sees around it.
- Pictures are [-1, 1] at the interface; an official network that computes in [0, 1] says so in its config (`official_range`).
- Fused attention, gradient checkpointing, fp32 code search under any autocast.

Legend: b batch, n tokens, d width, h w grid of tokens, H W pixels, p patch side, k codes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from genkit.blocks.embeddings import sincos_2d
from genkit.blocks.fast_linear import with_fast_linear
from genkit.blocks.layout import Layout
from genkit.blocks.stack import build as build_stack
from genkit.checks import choose
from genkit.tokenizers.vq_model import VQModel

_TOWER = {"heads": 8, "mlp_dim": 2048, "dim_head": 64, "act": "tanh"}
SIZES: dict[str, dict[str, Any]] = {
    "small": {"encoder_config": {"dim": 512, "depth": 8, **_TOWER}, "decoder_config": {"dim": 512, "depth": 8, **_TOWER}},
    "base": {
        "encoder_config": {"dim": 768, "depth": 12, **_TOWER, "heads": 12, "mlp_dim": 3072},
        "decoder_config": {"dim": 768, "depth": 12, **_TOWER, "heads": 12, "mlp_dim": 3072},
    },
    "large": {
        "encoder_config": {"dim": 512, "depth": 8, **_TOWER},
        "decoder_config": {"dim": 1280, "depth": 32, **_TOWER, "heads": 16, "mlp_dim": 5120},
    },
}


@functools.lru_cache(maxsize=32)
def _kept_table(h: int, w: int, dim: int) -> Tensor:
    """Return the fixed table [1, h*w, dim], fp32 on the CPU, made outside any inference mode so that every caller may use it."""
    with torch.inference_mode(False):
        return sincos_2d(h, w, dim)[None]


def add_positions(tokens: Tensor, h: int, w: int) -> Tensor:
    """Add the fixed table to tokens [b, h*w, d]."""
    table = sincos_2d(h, w, tokens.shape[-1])[None] if torch.compiler.is_compiling() else _kept_table(h, w, tokens.shape[-1])
    return tokens + table.to(tokens.device, tokens.dtype)


class ConvStem(nn.Module):
    """Pixels [b, c, H, W] to features [b, d, h, w] by 3x3 convolutions of stride 2; for patches whose side is a power of two."""

    def __init__(self, channels: int, dim: int, patch: tuple[int, int]) -> None:
        super().__init__()
        stages = _halvings(patch)
        widths = [channels, *(max(dim >> (stages - i), 16) for i in range(1, stages)), dim]
        layers: list[nn.Module] = []
        for i in range(stages):
            layers += [nn.GELU()] if i else []
            layers.append(nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ConvHead(nn.Module):
    """Features [b, d, h, w] to pixels [b, c, H, W]: per halving a 3x3 convolution and a pixel shuffle, then one 3x3 convolution."""

    def __init__(self, channels: int, dim: int, patch: tuple[int, int]) -> None:
        super().__init__()
        stages = _halvings(patch)
        widths = [max(dim >> i, 16) for i in range(stages + 1)]
        layers: list[nn.Module] = []
        for i in range(stages):
            layers += [nn.Conv2d(widths[i], 4 * widths[i + 1], 3, padding=1), nn.PixelShuffle(2), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _halvings(patch: tuple[int, int]) -> int:
    """Return log2 of a square patch's side."""
    stages = int(math.log2(patch[0]))
    if patch[0] != patch[1] or 2**stages != patch[0] or stages < 1:
        raise ValueError(
            f"ViTVQModel: stem='conv' needs a square patch whose side is a power of two from 2, got {patch}; use stem='patch'."
        )
    return stages


def _tower(
    dim: int, depth: int, heads: int, mlp_dim: int, dim_head: int = 64, act: str = "tanh", stack: str | None = None
) -> nn.ModuleList:
    """Build `depth` pre-norm blocks of width `dim`; `act` is the MLP's activation (the reference uses tanh in every block)."""
    if stack is not None:
        found = build_stack(stack, dim, heads=heads, norm="ln", residual="pre")
        if len(found) != depth:
            raise ValueError(f"ViTVQModel: depth={depth}, got {len(found)} blocks in {stack!r}.")
        return found
    if not depth:
        return nn.ModuleList()
    identity = heads == 1 and dim_head == dim  # the reference then has no output projection
    attention = f"attention(key_dim={dim_head}, qkv_bias=False{', out_proj=False' if identity else ''})"
    return build_stack(f"({attention} + mlp(hidden={mlp_dim}, act='{act}')) * {depth}", dim, heads=heads, norm="ln", residual="pre")


class ViTEncoder(nn.Module):
    """Pixels [b, c, H, W] to tokens [b, n, d]."""

    def __init__(self, channels: int, patch: tuple[int, int], stem: str, tower: Mapping[str, Any]) -> None:
        super().__init__()
        self.dim = tower["dim"]
        self.stem = ConvStem(channels, self.dim, patch) if stem == "conv" else nn.Conv2d(channels, self.dim, patch, stride=patch)
        self.blocks = _tower(**tower)
        self.norm = nn.LayerNorm(self.dim)

    def forward(self, x: Tensor, checkpointing: bool = False) -> Tensor:
        features = self.stem(x)
        h, w = features.shape[-2:]
        tokens = rearrange(features, "b d h w -> b (h w) d")
        if len(self.blocks):  # without blocks a code depends on its neighbourhood alone, not on its place
            tokens = add_positions(tokens, h, w)
        return self.norm(_run(self.blocks, tokens, (h, w), checkpointing))


class ViTDecoder(nn.Module):
    """Tokens [b, n, d] of an h x w grid to pixels [b, c, H, W]."""

    def __init__(self, channels: int, patch: tuple[int, int], stem: str, tower: Mapping[str, Any]) -> None:
        super().__init__()
        self.dim = tower["dim"]
        self.blocks = _tower(**tower)
        self.norm = nn.LayerNorm(self.dim)
        self.head = ConvHead(channels, self.dim, patch) if stem == "conv" else nn.ConvTranspose2d(self.dim, channels, patch, stride=patch)

    def forward(self, tokens: Tensor, h: int, w: int, checkpointing: bool = False) -> Tensor:
        tokens = self.norm(_run(self.blocks, add_positions(tokens, h, w), (h, w), checkpointing))
        return self.head(rearrange(tokens, "b (h w) d -> b d h w", h=h, w=w))


def _run(blocks: nn.ModuleList, tokens: Tensor, grid: tuple[int, int], checkpointing: bool) -> Tensor:
    """Apply blocks to tokens [b, n, d] of an h x w grid, recomputing each in the backward pass if `checkpointing`."""
    layout = Layout(grid=grid)
    for block in blocks:
        if checkpointing:
            tokens = torch.utils.checkpoint.checkpoint(block, tokens, None, layout, use_reentrant=False)
        else:
            tokens = block(tokens, layout=layout)
    return tokens


class ViTVQModel(VQModel):
    """ViT-VQGAN stage 1.

    Args:
        patch_size: pixels per token side, an int or [rows, columns].
        encoder_config: dim, depth (0 for local codes), heads, mlp_dim, dim_head (64), act ("tanh"); dim a multiple of 4, heads * dim_head
            free of dim. `stack` may give a stack string of `depth` blocks in place of attention and MLP.
        decoder_config: the same for the decoder.
        quantizer_config: config of `build_quantizer`: name, codebook_size, dim, ...
        in_channels: picture channels.
        stem: "patch" as published or "conv" (ours), for both ends.
        official_range: whether the network computes in [0, 1] as the released weights do; the interface stays [-1, 1].
        sample_size: picture side [H, W] or int it was trained at; only a default for tools, any other size works.

    Raises:
        ValueError: if sizes or options do not fit; names them.

    Example:
        >>> tower = {"dim": 32, "depth": 1, "heads": 2, "mlp_dim": 64, "dim_head": 16}
        >>> model = ViTVQModel(4, tower, tower, {"name": "simvq", "codebook_size": 64, "dim": 8})
        >>> tuple(model.encode(torch.zeros(1, 3, 16, 24)).indices.shape)
        (1, 4, 6)
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["Block"]
    _no_split_modules = ["Block"]
    _keep_in_fp32_modules = ["quantizer"]

    @register_to_config
    def __init__(
        self,
        patch_size: int | Sequence[int],
        encoder_config: dict[str, Any],
        decoder_config: dict[str, Any],
        quantizer_config: dict[str, Any],
        in_channels: int = 3,
        stem: str = "patch",
        official_range: bool = False,
        sample_size: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        choose(stem, ("patch", "conv"), "stem")
        self.patch = (patch_size, patch_size) if isinstance(patch_size, int) else (patch_size[0], patch_size[1])
        for name, tower in (("encoder_config", encoder_config), ("decoder_config", decoder_config)):
            _check_tower(name, tower)
        self.encoder = ViTEncoder(in_channels, self.patch, stem, encoder_config)
        self.build_codes(quantizer_config)
        self.pre_quant = nn.Linear(encoder_config["dim"], self.quantizer.dim)
        self.post_quant = nn.Linear(self.quantizer.dim, decoder_config["dim"])
        self.decoder = ViTDecoder(in_channels, self.patch, stem, decoder_config)
        self.gradient_checkpointing = False
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the towers as published: Linear xavier-uniform with zero bias, patch convolutions xavier-uniform on [out, rest]."""
        for tower in (self.encoder, self.decoder):
            for module in tower.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
                elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and self.config["stem"] == "patch":
                    nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))

    @with_fast_linear
    def encode_latents(self, x: Tensor) -> Tensor:
        """Turn pictures [b, c, H, W] in [-1, 1] into latents [b, n, c] before quantization.

        Raises:
            ValueError: for another number of axes or channels, or sides that the patch does not divide.
        """
        return self.pre_quant(self.encoder(self.checked(x), self.gradient_checkpointing and self.training))

    @with_fast_linear
    def decode_latents(self, quantized: Tensor, grid: tuple[int, int]) -> Tensor:
        """Turn quantized latents [b, n, c] of a grid (h, w) into pictures [b, 3, H, W]."""
        tokens = self.post_quant(quantized.to(self.post_quant.weight.dtype))
        sample = self.decoder(tokens, *grid, checkpointing=self.gradient_checkpointing and self.training)
        return self.to_interface(sample)

    @property
    def last_layer(self) -> Tensor:
        """The weight that makes the pixels."""
        head: Any = self.decoder.head
        layer: Any = head.layers[-1] if isinstance(head, ConvHead) else head
        weight: Tensor = layer.weight
        return weight

    def decoding_numbers(self, height: int, width: int) -> int:
        """Return how many numbers the decoder holds at its widest for one picture."""
        h, w = self.grid_for(height, width)
        tower = self.config["decoder_config"]
        return int(h * w * 4 * max(tower["dim"], tower["mlp_dim"]) + 28 * 3 * height * width)


def _check_tower(name: str, tower: Mapping[str, Any]) -> None:
    """Check one tower's config; raises ValueError naming the key."""
    accepted = {"dim", "depth", "heads", "mlp_dim", "dim_head", "act", "stack"}
    for key in tower:
        choose(key, accepted, f"key of {name}")
    missing = {"dim", "depth", "heads", "mlp_dim"} - tower.keys()
    if missing:
        raise ValueError(f"ViTVQModel: {name} needs {sorted(missing)}, got {sorted(tower)}.")
    if tower["dim"] % 4:
        raise ValueError(f"ViTVQModel: {name}.dim must be a multiple of 4 for the 2-D sin-cos table, got {tower['dim']}.")
