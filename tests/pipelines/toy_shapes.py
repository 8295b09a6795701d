"""A shape VAE that makes a ball of everything, a pipeline around it, and pictures of an object."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import Dinov2Config, Dinov2Model

from genkit.generators.shape_dit import ShapeDiT
from genkit.pipelines.shape import ShapePipeline
from genkit.schedulers.flow_matching import FlowMatchingScheduler
from genkit.tokenizers.shape_vae import ShapeVAE

ENCODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


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


def object_picture(mode: str = "RGB", background: tuple[int, ...] = (255, 255, 255), width: int = 16) -> Image.Image:
    image = Image.new(mode, (40, 32), background)
    ImageDraw.Draw(image).ellipse((8, 6, 8 + width, 24), fill=(200, 30, 30, 255)[: len(mode)])
    return image


def ball_pipeline(**options: Any) -> ShapePipeline:
    torch.manual_seed(0)
    transformer = ShapeDiT(in_channels=4, context_in_dim=16, hidden_size=16, num_heads=2, depth=1, depth_single=1).eval()
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    pipe = ShapePipeline(
        transformer, ball_vae(), FlowMatchingScheduler(), Dinov2Model(Dinov2Config(**ENCODER)).eval(), condition_size=28,
        octree_resolution=24, decoder="hierarchical", **options,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
