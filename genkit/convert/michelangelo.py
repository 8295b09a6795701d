"""Michelangelo's shape encoder ("shapevae-256"), alone or inside a MeshAnything file.

Fused projections interleave q, k and v inside each head, as in the files of Hunyuan3D. The field of the autoencoder and the projection to
CLIP's space are left out: no mesh generator uses them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genkit.convert.base import ConversionReport, Drop, KeyTable, OfficialModel, Row, build_empty, fill
from genkit.convert.flashvdm import block_rows
from genkit.tokenizers.point_encoder import PointEncoder

COMPONENT, PIPELINE = "point_encoder", None
FILES = ("shapevae-256.ckpt", "model.safetensors", "MeshAnything_350m.pth")
HEADS = 12
PREFIXES = ("point_encoder.model.", "model.")
OFFICIAL = (
    OfficialModel(
        name="michelangelo-shapevae-256", source="Maikou/Michelangelo", files=FILES[:1], licence="GPL-3.0", parameters=177_382_272,
        memory_gb=0.8, note="point encoder of MeshAnything, which carries it too",
    ),
)  # fmt: skip


def _table(heads: int) -> KeyTable:
    rows: list[Row | Drop] = [
        Row("shape_model.encoder.query", "query"),
        Row("shape_model.encoder.input_proj.{p}", "input_proj.{p}"),
        *block_rows("shape_model.encoder.cross_attn", "cross", heads, cross=True),
        *block_rows("shape_model.encoder.self_attn.resblocks.{i}", "blocks.{i}", heads, cross=False),
        Row("shape_model.encoder.ln_post.{p}", "ln_post.{p}"),
        Row("shape_model.pre_kl.{p}", "pre_kl.{p}"),
        Row("shape_model.post_kl.{p}", "post_kl.{p}"),
        *block_rows("shape_model.transformer.resblocks.{i}", "decoder_blocks.{i}", heads, cross=False),
        Drop("shape_projection", "to CLIP's space, unused", lambda ours: {"shape_projection": torch.zeros(2 * ours["query"].shape[1:])}),
        Drop("shape_model.geo_decoder.{rest}", "the autoencoder's field, unused"),
        Drop("clip_model.{rest}", "CLIP, unused"),
    ]
    return KeyTable("michelangelo", rows)


def _own(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the encoder's entries of a file, without prefix."""
    prefix = next((name for name in PREFIXES if any(key.startswith(f"{name}shape_model.") for key in state)), "")
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether keys are those of the encoder, or of a generator with one."""
    return {"shape_model.encoder.query", "shape_model.pre_kl.weight", "shape_model.encoder.input_proj.weight"} <= _own(shapes).keys()


def from_official(
    state: Mapping[str, Tensor], *, heads: int = HEADS, num_freqs: int = 8, include_pi: bool = False
) -> tuple[PointEncoder, ConversionReport]:
    """Build the encoder of an official state dict; other sizes come from shapes.

    Args:
        state: official tensors by key.
        heads, num_freqs, include_pi: not in the file; as released if not given.

    Returns:
        The encoder in fp32 eval mode and the report.

    Raises:
        ValueError: if keys or shapes do not fit.
    """
    own = _own(state)
    queries, width = own["shape_model.encoder.query"].shape

    def count(name: str) -> int:
        return 1 + max((int(match[1]) for key in own if (match := re.match(rf"{re.escape(name)}\.resblocks\.(\d+)\.", key))), default=-1)

    model = build_empty(
        PointEncoder,
        num_latents=queries - 1,
        width=width,
        heads=heads,
        embed_dim=own["shape_model.post_kl.weight"].shape[1],
        num_encoder_layers=count("shape_model.encoder.self_attn"),
        num_decoder_layers=count("shape_model.transformer"),
        num_freqs=num_freqs,
        include_pi=include_pi,
        point_feats=own["shape_model.encoder.input_proj.weight"].shape[1] - 3 - 6 * num_freqs,
        qkv_bias="shape_model.encoder.cross_attn.attn.c_q.bias" in own,
        use_ln_post="shape_model.encoder.ln_post.weight" in own,
    )
    ours, report = _table(heads).to_ours(own, model.state_dict())
    return fill(model, ours), report


def to_official(model: PointEncoder) -> dict[str, Tensor]:
    """Return the official state dict of encoder, bottleneck and decoder, prefix `model.`."""
    return {f"model.{key}": value for key, value in _table(model.config["heads"]).to_official(model.state_dict()).items()}
