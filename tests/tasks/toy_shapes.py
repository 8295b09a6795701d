"""Prepared boxes with pictures, a VAE, and a pipeline of random networks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from transformers import Dinov2Config, Dinov2Model

from genkit.data.mesh_fields import FieldCounts
from genkit.data.rendering import turntable
from genkit.data.shape_samples import prepare
from genkit.generators.shape_dit import ShapeDiT
from genkit.pipelines.shape import ShapePipeline
from genkit.schedulers.flow_matching import FlowMatchingScheduler
from tests.data.toy import write_views
from tests.pipelines.toy import text_parts
from tests.pipelines.toy_shapes import ball_vae

COUNTS = FieldCounts(volume=30, near=30, sharp=12, surface=32, edges=32)
ENCODER = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
MODEL = {"hidden_size": 16, "num_heads": 2, "depth": 1, "depth_single": 1}
BOXES = ((1, 1, 1), (1, 2, 0.5), (0.3, 1, 1))


def shape_data(folder: Path) -> dict[str, str]:
    """Write boxes with four views each, the last one white; their prepared shapes; a VAE."""
    meshes = [trimesh.creation.box(extents) for extents in BOXES]
    rows = [np.concatenate([np.asarray(view) for view in turntable(mesh, 4, 32)], axis=1) for mesh in meshes]
    rows[2][:, 96:] = 255
    columns = {name: [np.asarray(getattr(mesh, name)).tolist() for mesh in meshes] for name in ("vertices", "faces")}
    path = write_views(folder / "train.parquet", rows, **columns)
    prepare(path, folder / "shapes", COUNTS)
    ball_vae(num_encoder_layers=1).save_pretrained(folder / "vae")
    return {"data": str(path), "shapes": str(folder / "shapes"), "vae": str(folder / "vae")}


def shape_teacher(**options: Any) -> ShapePipeline:
    """Return a pipeline of random networks for pictures and text."""
    torch.manual_seed(0)
    transformer = ShapeDiT(in_channels=4, context_in_dim=12, **{**MODEL, **options}).eval()
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    if transformer.guidance_in is not None:
        torch.nn.init.zeros_(transformer.guidance_in.fc2.weight)
    encoder = Dinov2Model(Dinov2Config(**ENCODER)).eval()
    return ShapePipeline(
        transformer, ball_vae(), FlowMatchingScheduler(), encoder, **text_parts(), condition_size=32, octree_resolution=24,
        num_inference_steps=3, guidance_scale=2.0,
    )  # fmt: skip
