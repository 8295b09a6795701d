"""PointEncoder: an oriented point cloud to a set of tokens that say what shape it is.

The shape encoder of Michelangelo (Zhao et al. 2023, arXiv 2306.17115), as MeshAnything uses it, frozen (`genkit.convert.michelangelo`).

- learned queries attend to all points, so that any number and order of points will do
- one global token and n local ones; the local ones also as the autoencoder behind the bottleneck sees them

Legend: b clouds, p points, n local tokens, d width, e width of the bottleneck.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from genkit.blocks.fast_linear import with_fast_linear
from genkit.blocks.norms import build_norm
from genkit.checks import check_shape
from genkit.tokenizers.shape_vae import cross_block, fourier_features, self_block

SIZES: dict[str, dict[str, Any]] = {
    "michelangelo_256": {
        "num_latents": 256, "width": 768, "heads": 12, "embed_dim": 64, "num_encoder_layers": 8, "num_decoder_layers": 16,
    }
}  # fmt: skip


@dataclass
class PointFeatures(BaseOutput):
    """What a point cloud becomes.

    Attributes:
        tokens: [b, 1 + n, d]; the first is global.
        shape_tokens: [b, n, d]: the local ones through bottleneck and decoder.
    """

    tokens: Tensor
    shape_tokens: Tensor


class PointEncoder(ModelMixin, ConfigMixin):
    """Points with normals to tokens.

    Args:
        num_latents: n.
        width: d.
        heads: of every attention.
        embed_dim: e.
        num_encoder_layers: self-attention blocks behind the cross-attention.
        num_decoder_layers: blocks behind the bottleneck.
        num_freqs, include_pi: of the Fourier features.
        point_feats: numbers of a point beside its position: its normal.
        qkv_bias: of all attentions.
        use_ln_post: a norm behind the encoder.

    Raises:
        ValueError: if heads do not divide the width.

    Example:
        >>> encoder = PointEncoder(num_latents=3, width=8, heads=2, embed_dim=2, num_encoder_layers=1, num_decoder_layers=1)
        >>> encoder(torch.randn(1, 20, 6)).tokens.shape
        torch.Size([1, 4, 8])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _repeated_blocks: ClassVar[list[str]] = ["Block"]

    @register_to_config
    def __init__(
        self,
        *,
        num_latents: int = 256,
        width: int = 768,
        heads: int = 12,
        embed_dim: int = 64,
        num_encoder_layers: int = 8,
        num_decoder_layers: int = 16,
        num_freqs: int = 8,
        include_pi: bool = False,
        point_feats: int = 3,
        qkv_bias: bool = False,
        use_ln_post: bool = True,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"PointEncoder: heads must divide width, got heads={heads}, width={width}.")
        self.query = nn.Parameter(torch.empty(1 + num_latents, width))
        self.input_proj = nn.Linear(3 + 6 * num_freqs + point_feats, width)
        self.cross = cross_block(width, heads, qkv_bias, False, width, eps=1e-5)
        self.blocks = nn.ModuleList(self_block(width, heads, qkv_bias, False, eps=1e-5) for _ in range(num_encoder_layers))
        self.ln_post = build_norm("ln" if use_ln_post else "none", width, eps=1e-5)
        self.pre_kl = nn.Linear(width, 2 * embed_dim)
        self.post_kl = nn.Linear(embed_dim, width)
        self.decoder_blocks = nn.ModuleList(self_block(width, heads, qkv_bias, False, eps=1e-5) for _ in range(num_decoder_layers))
        self.gradient_checkpointing = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the queries from N(0, 0.02^2 * 12), about the published spread; PyTorch's start values elsewhere."""
        nn.init.normal_(self.query, std=0.07)

    @with_fast_linear
    def encode(self, points: Tensor) -> Tensor:
        """Return tokens [b, 1 + n, d] of points [b, p, 3 + feats], positions within [-1, 1].

        Raises:
            ValueError: for rows of another width.
        """
        config = self.config
        check_shape(points, "PointEncoder: points", "b p d", d=3 + config["point_feats"])
        embedded = torch.cat(
            [fourier_features(points[..., :3], config["num_freqs"], config["include_pi"]), points[..., 3:].float()], dim=-1
        )
        data = self.input_proj(embedded.to(self.query.dtype))
        x = self._run(self.cross, self.query.expand(len(points), -1, -1), None, None, data)  # no condition, no layout, context
        for block in self.blocks:
            x = self._run(block, x)
        tokens: Tensor = self.ln_post(x)
        return tokens

    @with_fast_linear
    def shape(self, tokens: Tensor) -> Tensor:
        """Return the local tokens [b, n, d] of tokens [b, 1 + n, d] through the mean of the bottleneck and the decoder."""
        x = self.post_kl(self.pre_kl(tokens[:, 1:]).chunk(2, dim=-1)[0])
        for block in self.decoder_blocks:
            x = self._run(block, x)
        return x

    def forward(self, points: Tensor) -> PointFeatures:
        """Return both kinds of tokens of points [b, p, 3 + feats]."""
        tokens = self.encode(points)
        return PointFeatures(tokens=tokens, shape_tokens=self.shape(tokens))

    def _run(self, block: nn.Module, *args: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *args)
        found: Tensor = block(*args)
        return found
