"""The mesh decoder inside the file of MeshAnything V1: fused fast-path layers, and the table that it shares with the transformer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genkit.convert.base import ConversionReport, KeyTable, Row, build_empty, fill, joined, split_qkv
from genkit.tokenizers.mesh_vae import COORDINATES, MeshVQModel

COMPONENT, PIPELINE = "vq_model", None
FILES = ("MeshAnything_350m.pth",)
OFFICIAL = ()
HEADS, NUM_FACES = 12, 800
CODEBOOK = "transformer.model.decoder.quantize_codebooks"


_LAYER, _ATTENTION, _MLP = "decoder.layer.{i}", "blocks.{i}.branches.0", "blocks.{i}.branches.1"
TABLE = KeyTable(
    "mesh_vq",
    [
        Row(CODEBOOK, "quantizer.layers.0.embedding.weight", lambda table: table[0], lambda table: table[None]),
        Row("pos_embedding.weight", "position_embed.weight"),
        Row("layernorm.{p}", "face_norm.{p}"),
        Row("point_layernorm.{p}", "point_norm.{p}"),
        Row("point_pe.weight", "point_embed.weight"),
        Row("cond_proj.{p}", "cond_proj.{p}"),
        Row("cond_head_proj.{p}", "cond_head_proj.{p}"),
        Row("project_down_codebook.{p}", "face_proj.{p}"),
        Row("to_coor_logits.0.{p}", "head.{p}"),
        Row((f"{_LAYER}.in_proj_{{p}}",), (f"{_ATTENTION}.f.q.{{p}}", f"{_ATTENTION}.f.kv.{{p}}"), split_qkv, joined),
        Row(f"{_LAYER}.out_proj_{{p}}", f"{_ATTENTION}.f.proj.{{p}}"),
        Row(f"{_LAYER}.norm1_{{p}}", f"{_ATTENTION}.norm.{{p}}"),
        Row(f"{_LAYER}.linear1_{{p}}", f"{_MLP}.f.fc1.{{p}}"),
        Row(f"{_LAYER}.linear2_{{p}}", f"{_MLP}.f.fc2.{{p}}"),
        Row(f"{_LAYER}.norm2_{{p}}", f"{_MLP}.norm.{{p}}"),
    ],
)


def _own(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the decoder's entries of a file, without prefix, and the table of codes."""
    own = {key.removeprefix("tokenizer."): value for key, value in state.items() if key.startswith("tokenizer.")}
    return own | ({CODEBOOK: state[CODEBOOK]} if CODEBOOK in state else {})


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether keys are those of a file with the mesh decoder."""
    return {"decoder.layer.0.in_proj_weight", "project_down_codebook.weight", "to_coor_logits.0.weight"} <= _own(shapes).keys()


def from_official(state: Mapping[str, Tensor], *, heads: int = HEADS, num_faces: int = NUM_FACES) -> tuple[MeshVQModel, ConversionReport]:
    """Build the decoder of an official state dict; other sizes come from shapes.

    Args:
        state: official tensors by key.
        heads, num_faces: not in the file; as released if not given.

    Returns:
        The decoder in fp32 eval mode and the report.

    Raises:
        ValueError: if keys or shapes do not fit.
    """
    own = _own(state)
    width, inner = own["project_down_codebook.weight"].shape
    model = build_empty(
        MeshVQModel,
        codebook_size=own[CODEBOOK].shape[1],
        codebook_dim=inner // 3,
        width=width,
        depth=1 + max(int(match[1]) for key in own if (match := re.match(r"decoder\.layer\.(\d+)\.", key))),
        heads=heads,
        hidden=len(own["decoder.layer.0.linear1_weight"]),
        bins=len(own["to_coor_logits.0.weight"]) // COORDINATES,
        num_faces=num_faces,
        num_positions=len(own["pos_embedding.weight"]),
        point_width=own["cond_proj.weight"].shape[1],
        num_points=len(own["point_pe.weight"]),
        official_padding=True,
    )
    ours, report = TABLE.to_ours(own, model.state_dict())
    return fill(model, ours), report


def to_official(model: MeshVQModel) -> dict[str, Tensor]:
    """Return the official state dict: the decoder under `tokenizer.`, the table under the transformer's name."""
    state = TABLE.to_official({key: value for key, value in model.state_dict().items() if not key.startswith("encoder.")})
    return {key if key == CODEBOOK else f"tokenizer.{key}": value for key, value in state.items()}
