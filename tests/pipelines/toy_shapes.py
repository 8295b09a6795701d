"""A shape VAE that makes a ball of everything."""

from __future__ import annotations

from typing import Any

import torch

from genkit.tokenizers.shape_vae import ShapeVAE


def ball_vae(**options: Any) -> ShapeVAE:
    """A VAE whose field does not depend on its latents."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_latents": 8, "embed_dim": 4, "width": 16, "heads": 4, "num_encoder_layers": 1, "num_decoder_layers": 1}
    points = {"pc_size": 32, "pc_sharpedge_size": 32, "downsample_ratio": 4}
    vae = ShapeVAE(**{**sizes, **points, "head_ln_post": False, **options}).eval()
    head: Any = vae.head
    with torch.no_grad():
        for layer in (head.attention.proj, head.block.branches[1].f.fc2, head.query_proj, head.out):
            layer.weight.zero_()
            layer.bias.zero_()
        k = vae.config["num_freqs"]
        head.query_proj.weight[0, [3 + 3 * k + axis * k for axis in range(3)]] = 1
        head.query_proj.bias[0] = -2.6
        head.out.weight[0, 0] = 4
    return vae
