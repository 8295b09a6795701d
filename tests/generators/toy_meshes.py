"""Small networks of the mesh systems."""

from __future__ import annotations

from typing import Any

import torch

from genkit.generators.mesh_transformer import MeshTransformer
from genkit.pipelines.meshanything import MeshAnythingPipeline
from genkit.tokenizers.mesh_vae import MeshVQModel
from genkit.tokenizers.point_encoder import PointEncoder

POINTS: dict[str, Any] = {"num_latents": 3, "width": 16, "heads": 2, "embed_dim": 4, "num_encoder_layers": 1, "num_decoder_layers": 1}
SIZES: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "hidden": 24, "point_width": 16, "num_points": 4, "max_tokens": 60}
CODES: dict[str, Any] = {"layout": "faces", "num_codes": 7, "code_dim": 6}
DECODER: dict[str, Any] = {
    "codebook_size": 7, "codebook_dim": 6, "width": 16, "depth": 1, "heads": 2, "hidden": 24, "num_faces": 6, "point_width": 16,
    "num_points": 4,
}  # fmt: skip


def mesh_transformer(**options: Any) -> MeshTransformer:
    """A network that is not indifferent: its start values are too small to tell ids apart."""
    torch.manual_seed(0)
    model = MeshTransformer(**{**SIZES, **options}).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def point_encoder() -> PointEncoder:
    torch.manual_seed(1)
    return PointEncoder(**POINTS).eval().requires_grad_(False)


def mesh_decoder(**options: Any) -> MeshVQModel:
    torch.manual_seed(2)
    return MeshVQModel(**{**DECODER, **options}).eval()


def mesh_pipeline(codes: bool = False, **options: Any) -> MeshAnythingPipeline:
    """Return a pipeline of random networks."""
    decoder = mesh_decoder().requires_grad_(False) if codes else None
    transformer = mesh_transformer(**(CODES | {"max_tokens": 56} if codes else {}), **options)
    return _joined(transformer, point_encoder(), decoder)


def official_mesh_pipeline(codes: bool) -> MeshAnythingPipeline:
    """Return a pipeline of random networks whose numbers of heads, tokens and faces are the released ones."""
    torch.manual_seed(0)
    encoder = PointEncoder(**{**POINTS, "width": 24, "heads": 12}).eval().requires_grad_(False)
    sizes = {"point_width": 24, "heads": 16, **(CODES | {"max_tokens": 7202} if codes else {})}
    decoder = mesh_decoder(width=24, heads=12, point_width=24, num_faces=800, official_padding=True).requires_grad_(False)
    return _joined(mesh_transformer(**sizes), encoder, decoder if codes else None)


def _joined(transformer: MeshTransformer, encoder: PointEncoder, decoder: MeshVQModel | None) -> MeshAnythingPipeline:
    if decoder is not None and transformer.codebook is not None:
        decoder.table.data.copy_(transformer.codebook.data)
    pipe = MeshAnythingPipeline(transformer, encoder, decoder, num_points=50)
    pipe.set_progress_bar_config(disable=True)
    return pipe
