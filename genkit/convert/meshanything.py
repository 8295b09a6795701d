"""MeshAnything V1 and V2: the official mesh transformers; their files also hold the point encoder, that of V1 the mesh decoder too.

The file of V1 is safetensors whatever its suffix says. V2 ties input and output table: either name may stand in a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit import convert
from genkit.convert import mesh_vq, michelangelo
from genkit.convert.base import ConversionReport, Drop, KeyTable, OfficialModel, Row, build_empty, fill, halves, joined
from genkit.generators.mesh_transformer import OFFSET, MeshTransformer
from genkit.tokenizers.mesh_tokens import SPECIALS
from genkit.weights import checkpoint_shapes

COMPONENT, PIPELINE = "transformer", "MeshAnythingPipeline"
FILES = ("MeshAnything_350m.pth", "model.safetensors")
WHOLE = True
HEADS, NUM_POINTS, V1_TOKENS = 16, 257, 7202
OFFICIAL = (
    OfficialModel(
        name="meshanything-v2-350m", source="Hugging Face hub", files=("model.safetensors",), licence="MIT (model card; code: S-Lab 1.0)",
        parameters=500_657_793, memory_gb=3.0, hub_id="Yiwen-ntu/meshanythingv2", note="meshes of up to 1,600 faces from point clouds",
    ),
    OfficialModel(
        name="meshanything-350m", source="Hugging Face hub", files=("MeshAnything_350m.pth",), licence="S-Lab 1.0 (non-commercial)",
        parameters=595_837_185, memory_gb=3.2, hub_id="Yiwen-ntu/MeshAnything", note="meshes of up to 800 faces from point clouds",
    ),
)  # fmt: skip

_DECODER, _TIED = "transformer.model.decoder", "transformer.model.decoder.embed_tokens.weight"
_LAYER, _ATTENTION, _MLP = f"{_DECODER}.layers.{{i}}", "blocks.{i}.branches.0", "blocks.{i}.branches.1"


def _unused_table(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_TIED: torch.zeros_like(ours["lm_head.weight"])} if "codebook" in ours else {}


TABLE = KeyTable(
    "meshanything",
    [
        Row("cond_head_proj.{p}", "cond_head_proj.{p}"),
        Row("cond_proj.{p}", "cond_proj.{p}"),
        Row("transformer.lm_head.weight", "lm_head.weight"),
        Row(f"{_DECODER}.embed_positions.weight", "position_embed.weight"),
        Row(f"{_DECODER}.token_embed_positions.weight", "slot_embed.weight"),
        Row(f"{_DECODER}.cond_embed.weight", "segment_embed.weight"),
        Row(f"{_DECODER}.extra_embeds.weight", "special_embed.weight"),
        Row(f"{_DECODER}.input_layer.{{p}}", "code_proj.{p}"),
        Row(f"{_DECODER}.quantize_codebooks", "codebook", lambda table: table[0], lambda table: table[None]),
        Row(f"{_LAYER}.self_attn.q_proj.{{p}}", f"{_ATTENTION}.f.q.{{p}}"),
        Row(tuple(f"{_LAYER}.self_attn.{x}_proj.{{p}}" for x in "kv"), (f"{_ATTENTION}.f.kv.{{p}}",), joined, halves),
        Row(f"{_LAYER}.self_attn.out_proj.{{p}}", f"{_ATTENTION}.f.proj.{{p}}"),
        Row(f"{_LAYER}.self_attn_layer_norm.{{p}}", f"{_ATTENTION}.norm.{{p}}"),
        Row(f"{_LAYER}.fc1.{{p}}", f"{_MLP}.f.fc1.{{p}}"),
        Row(f"{_LAYER}.fc2.{{p}}", f"{_MLP}.f.fc2.{{p}}"),
        Row(f"{_LAYER}.final_layer_norm.{{p}}", f"{_MLP}.norm.{{p}}"),
        Drop(_TIED, "tied to lm_head (V2), or unused (V1)", _unused_table),
        Drop("point_encoder.{rest}", "the point encoder, read by the michelangelo converter"),
        Drop("tokenizer.{rest}", "the mesh decoder, read by the mesh_vq converter"),
    ],
)


def companions(file: Path) -> dict[str, Any]:
    """Return point encoder, mesh decoder and settings of a file, as released."""
    shapes = checkpoint_shapes(file)
    found: dict[str, Any] = {"point_encoder": convert.load("michelangelo", file)} if michelangelo.recognise(shapes) else {}
    if mesh_vq.recognise(shapes):
        found["vq_model"] = convert.load("mesh_vq", file)
    return {**found, "num_points": 4096 if "vq_model" in found else 8192}


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether keys are those of a mesh transformer."""
    return {f"{_DECODER}.token_embed_positions.weight", f"{_DECODER}.cond_embed.weight", "cond_head_proj.weight"} <= shapes.keys()


def from_official(
    state: Mapping[str, Tensor], *, heads: int = HEADS, num_points: int | None = None, max_tokens: int | None = None, bins: int = 128
) -> tuple[MeshTransformer, ConversionReport]:
    """Build the transformer of an official state dict; other sizes come from shapes.

    Args:
        state: official tensors by key.
        heads: not in the file; 16 as released.
        num_points: prefix tokens; from the point encoder in the file, else 257.
        max_tokens: of a sequence; V2: all positions behind the prefix; V1: 7,202.
        bins: steps a side of V1's coordinates; the file tells those of V2.

    Returns:
        The transformer in fp32 eval mode and the report.

    Raises:
        ValueError: if keys or shapes do not fit.
    """
    state = dict(state)
    if "transformer.lm_head.weight" not in state and _TIED in state:
        state["transformer.lm_head.weight"] = state.pop(_TIED)
    codes = state.get(f"{_DECODER}.quantize_codebooks")
    query = state.get("point_encoder.model.shape_model.encoder.query")
    prefix = num_points or (NUM_POINTS if query is None else len(query))
    rows, width = state[f"{_DECODER}.embed_positions.weight"].shape
    own: dict[str, Any] = {"layout": "adjacent", "bins": len(state["transformer.lm_head.weight"]) - SPECIALS - 1}
    if codes is not None:
        own = {"layout": "faces", "bins": bins, "num_codes": codes.shape[1], "code_dim": codes.shape[2]}
    model = build_empty(
        MeshTransformer,
        **own,
        width=width,
        depth=1 + max(int(match[1]) for key in state if (match := re.match(rf"{re.escape(_DECODER)}\.layers\.(\d+)\.", key))),
        heads=heads,
        hidden=len(state[f"{_DECODER}.layers.0.fc1.weight"]),
        point_width=state["cond_head_proj.weight"].shape[1],
        num_points=prefix,
        max_tokens=max_tokens or (V1_TOKENS if codes is not None else rows - OFFSET - prefix),
        num_positions=rows - OFFSET,
    )
    ours, report = TABLE.to_ours(state, model.state_dict())
    return fill(model, ours), report


def to_official(model: MeshTransformer) -> dict[str, Tensor]:
    """Return the official state dict, without point encoder and mesh decoder."""
    return TABLE.to_official(model.state_dict())
