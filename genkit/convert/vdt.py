"""VDT: the official flat state dicts (with or without `module.`, under "ema" or "model").

Fused q, k, v become q and kv; the linear pair behind temporal attention is merged on request, exactly. Positional tables are kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from genkit.blocks.axial import AxialAttention
from genkit.convert.base import ConversionReport, KeyTable, OfficialModel, Row, build_empty, fill, joined, split_qkv
from genkit.generators.vdt import VDTTransformer3DModel

COMPONENT, PIPELINE = "transformer", "VDTPipeline"
WRAPPERS = ("ema", "model", "state_dict")
FILES = ("vdt_sky.pt", "physion_collide.pt", "model.pt")
OFFICIAL = (
    OfficialModel(
        name="vdt-sky", source="the authors' Google Drive", files=("vdt_sky.pt",), licence="CC BY-NC 4.0", parameters=859_704_224,
        memory_gb=3.8, note="VDT-L/2, Sky Time-Lapse, 256x256, 16 frames; non-commercial",
    ),
    OfficialModel(
        name="vdt-physion", source="the authors' Google Drive", files=("physion_collide.pt",), licence="CC BY-NC 4.0",
        parameters=859_704_224, memory_gb=3.8, note="VDT-L/2, Physion Collide, 128x128, 16 frames; non-commercial",
    ),
)  # fmt: skip


def _table(temporal: bool) -> KeyTable:
    """Return the rows; an image model has its spatial branch first."""
    block, first = "blocks.{i}", 1 if temporal else 0
    space, mlp = f"{block}.branches.{first}.f", f"{block}.branches.{first + 1}.f"
    rows = [
        Row("pos_embed", "pos_embed"),
        Row("time_embed", "time_embed"),
        Row("x_embedder.proj.{p}", "patch.{p}"),
        Row("t_embedder.mlp.0.{p}", "timestep.fc1.{p}"),
        Row("t_embedder.mlp.2.{p}", "timestep.fc2.{p}"),
        Row("y_embedder.embedding_table.weight", "label.weight"),
        Row((f"{block}.attn.qkv.{{p}}",), (f"{space}.q.{{p}}", f"{space}.kv.{{p}}"), split_qkv, joined),
        Row(f"{block}.attn.proj.{{p}}", f"{space}.proj.{{p}}"),
        Row(f"{block}.mlp.fc1.{{p}}", f"{mlp}.fc1.{{p}}"),
        Row(f"{block}.mlp.fc2.{{p}}", f"{mlp}.fc2.{{p}}"),
        Row(f"{block}.adaLN_modulation.1.{{p}}", f"{block}.modulation.linear.{{p}}"),
        Row("final_layer.linear.{p}", "head.{p}"),
        Row("final_layer.adaLN_modulation.1.{p}", "modulation.linear.{p}"),
    ]
    if temporal:
        time = f"{block}.branches.0"
        rows += [
            Row(f"{block}.temporal_norm1.{{p}}", f"{time}.norm.{{p}}"),
            Row((f"{block}.temporal_attn.qkv.{{p}}",), (f"{time}.f.q.{{p}}", f"{time}.f.kv.{{p}}"), split_qkv, joined),
            Row(f"{block}.temporal_attn.proj.{{p}}", f"{time}.f.proj.{{p}}"),
            Row(f"{block}.temporal_fc.{{p}}", f"{time}.f.proj2.{{p}}"),
        ]
    return KeyTable("vdt", rows)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether keys are those of VDT."""
    return {
        "x_embedder.proj.weight",
        "blocks.0.attn.qkv.weight",
        "final_layer.linear.weight",
        "blocks.0.temporal_fc.weight",
    } <= shapes.keys()


def from_official(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, class_dropout: float = 0.1, merge: bool = True
) -> tuple[VDTTransformer3DModel, ConversionReport]:
    """Build the transformer of an official state dict.

    Args:
        state: official tensors by key.
        num_heads: the one number that shapes do not tell; 6 for width 384, 16 for 1152 as published if None.
        class_dropout: 0 for files whose label table has no null row.
        merge: make the linear pair behind temporal attention one.

    Returns:
        The model in fp32 eval mode and the report.

    Raises:
        ValueError: if keys or shapes do not fit.
    """
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    heads = {384: 6, 1152: 16}.get(width) if num_heads is None else num_heads
    if heads is None:
        raise ValueError(f"vdt: give num_heads; it is known for the published widths 384 and 1152 only, this file has {width}.")
    temporal = "time_embed" in state
    side = math.isqrt(state["pos_embed"].shape[1]) * patch
    model = build_empty(
        VDTTransformer3DModel,
        sample_size=side,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        depth=1 + max(int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))),
        num_heads=heads,
        mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / width,
        num_frames=state["time_embed"].shape[1] if temporal else 1,
        num_classes=len(state["y_embedder.embedding_table.weight"]) - (1 if class_dropout > 0 else 0),
        class_dropout=class_dropout,
        learn_sigma=len(state["final_layer.linear.weight"]) == 2 * channels * patch**2,
        temporal=temporal,
    )
    ours, report = _table(temporal).to_ours(state, model.state_dict())
    fill(model, ours)
    if merge:
        model.merge_temporal()
    return model, report


def to_official(model: VDTTransformer3DModel) -> dict[str, Tensor]:
    """Return the official state dict; a merged map becomes itself, followed by the identity.

    Raises:
        ValueError: if the model has what the official layout has no name for (text).
    """
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, AxialAttention) and module.config.out_layers == 2 and isinstance(module.proj2, nn.Identity):
            width = module.proj.out_features
            state |= {f"{name}.proj2.weight": torch.eye(width), f"{name}.proj2.bias": torch.zeros(width)}
    return _table(model.config["temporal"]).to_official(state)
