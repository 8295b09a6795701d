"""Hunyuan3D-2 and FlashVDM: the official shape VAEs, with and without encoder, base and slim head.

Fused projections interleave q, k and v inside each head; here they stand one after the other. Files of the whole generator (prefixes
`model.`, `vae.`, `conditioner.`) give their VAE.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from genkit.convert.base import ConversionReport, Drop, KeyTable, OfficialModel, Row, build_empty, fill
from genkit.tokenizers.shape_vae import SIZES, ShapeVAE

COMPONENT, PIPELINE = "vae", "ShapeReconstructionPipeline"
FILES = ("model.fp16.safetensors", "model.fp16.ckpt")
WRAPPERS = ("vae", "state_dict")
HEADS = 16  # of every released file
TOLD = ("heads", "num_latents", "scale_factor", "include_pi", "pc_size", "pc_sharpedge_size", "downsample_ratio")
OFFICIAL = (
    OfficialModel(
        name="hunyuan3d-vae-v2-0-withencoder", source="tencent/Hunyuan3D-2", files=FILES, licence="Tencent Hunyuan community (restricted)",
        parameters=327_746_177, memory_gb=1.5, note="3,072 latent tokens; not for the EU, the UK and South Korea",
    ),
    OfficialModel(
        name="hunyuan3d-vae-v2-mini-withencoder", source="tencent/Hunyuan3D-2mini", files=FILES,
        licence="Tencent Hunyuan community (restricted)", parameters=327_746_177, memory_gb=1.5,
        note="512 latent tokens; not for the EU, the UK and South Korea",
    ),
)  # fmt: skip


def _interleaved(parts: int, heads: int) -> tuple[Callable[[list[Tensor]], list[Tensor]], Callable[[list[Tensor]], list[Tensor]]]:
    """Return the split of rows [heads, parts, hd] into q and [k; v] (or [k; v] alone), and its inverse."""

    def split(tensors: list[Tensor]) -> list[Tensor]:
        rows = tensors[0].unflatten(0, (heads, parts, -1)).transpose(0, 1).flatten(1, 2)  # parts, heads * hd, ...
        pair = torch.cat([rows[-2], rows[-1]])
        return [rows[0].clone(), pair] if parts == 3 else [pair]

    def join(tensors: list[Tensor]) -> list[Tensor]:
        rows = torch.cat([tensors[0][None], tensors[1].unflatten(0, (2, -1))]) if parts == 3 else tensors[0].unflatten(0, (2, -1))
        return [rows.unflatten(1, (heads, -1)).transpose(0, 1).flatten(0, 2).contiguous()]

    return split, join


def block_rows(official: str, ours: str, heads: int, cross: bool) -> list[Row]:
    """Return the rows of a block."""
    attention, mlp = f"{ours}.branches.0", f"{ours}.branches.1"
    rows = [Row(f"{official}.ln_1.{{p}}", f"{attention}.norm.{{p}}")]
    if cross:
        split, join = _interleaved(2, heads)
        rows += [
            Row(f"{official}.ln_2.{{p}}", f"{attention}.context_norm.{{p}}"),
            Row(f"{official}.attn.c_q.{{p}}", f"{attention}.f.q.{{p}}"),
            Row((f"{official}.attn.c_kv.{{p}}",), (f"{attention}.f.context_kv.{{p}}",), lambda t: split([t])[0], lambda t: join([t])[0]),
            Row(f"{official}.ln_3.{{p}}", f"{mlp}.norm.{{p}}"),
        ]
    else:
        split, join = _interleaved(3, heads)
        rows += [
            Row((f"{official}.attn.c_qkv.{{p}}",), (f"{attention}.f.q.{{p}}", f"{attention}.f.kv.{{p}}"), split, join),
            Row(f"{official}.ln_2.{{p}}", f"{mlp}.norm.{{p}}"),
        ]
    return [
        *rows,
        Row(f"{official}.attn.attention.q_norm.{{p}}", f"{attention}.f.q_norm.{{p}}"),
        Row(f"{official}.attn.attention.k_norm.{{p}}", f"{attention}.f.k_norm.{{p}}"),
        Row(f"{official}.attn.c_proj.{{p}}", f"{attention}.f.proj.{{p}}"),
        Row(f"{official}.mlp.c_fc.{{p}}", f"{mlp}.f.fc1.{{p}}"),
        Row(f"{official}.mlp.c_proj.{{p}}", f"{mlp}.f.fc2.{{p}}"),
    ]


def _table(heads: int, head_heads: int, with_encoder: bool) -> KeyTable:
    rows: list[Row | Drop] = [
        Row("post_kl.{p}", "post_kl.{p}"),
        *block_rows("transformer.resblocks.{i}", "blocks.{i}", heads, cross=False),
        Row("geo_decoder.query_proj.{p}", "head.query_proj.{p}"),
        Row("geo_decoder.latents_proj.{p}", "head.latents_proj.{p}"),
        *block_rows("geo_decoder.cross_attn_decoder", "head.block", head_heads, cross=True),
        Row("geo_decoder.ln_post.{p}", "head.ln_post.{p}"),
        Row("geo_decoder.output_proj.{p}", "head.out.{p}"),
    ]
    if with_encoder:
        rows += [
            Row("pre_kl.{p}", "pre_kl.{p}"),
            Row("encoder.input_proj.{p}", "encoder.input_proj.{p}"),
            *block_rows("encoder.cross_attn", "encoder.cross", heads, cross=True),
            *block_rows("encoder.self_attn.resblocks.{i}", "encoder.blocks.{i}", heads, cross=False),
            Row("encoder.ln_post.{p}", "encoder.ln_post.{p}"),
        ]
    return KeyTable("flashvdm", rows)


def settings(file: Path, component: str) -> dict[str, Any]:
    """Return the `params` of a component in the config.yaml beside a file; nothing where there is none.

    Raises:
        ValueError: if config.yaml is no mapping.
    """
    path = file.with_name("config.yaml")
    if not path.is_file():
        return {}
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds no settings of components; download it again.")
    own = content.get(component, content if "params" in content else {})
    return dict(own.get("params") or {})


def options(file: Path) -> dict[str, Any]:
    """Return what config.yaml tells of the VAE."""
    return {name: value for name, value in settings(file, "vae").items() if name in TOLD}


def _own(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the VAE's entries of a file, without prefix."""
    if any(key.startswith("vae.") for key in state):
        return {key.removeprefix("vae."): value for key, value in state.items() if key.startswith("vae.")}
    return dict(state)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether keys are those of a shape VAE, or of a generator with one."""
    return {"post_kl.weight", "geo_decoder.query_proj.weight", "transformer.resblocks.0.attn.c_qkv.weight"} <= _own(shapes).keys()


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for key in state if (match := re.match(pattern, key)))


def from_official(
    state: Mapping[str, Tensor],
    *,
    heads: int = HEADS,
    num_latents: int = 3072,
    scale_factor: float | None = None,
    include_pi: bool = False,
    pc_size: int | None = None,
    pc_sharpedge_size: int | None = None,
    downsample_ratio: int = 20,
    encoder: bool = True,
) -> tuple[ShapeVAE, ConversionReport]:
    """Build the VAE of an official state dict; sizes come from shapes.

    Args:
        state: official tensors by key.
        heads: not in the file; 16 in every released one.
        num_latents, include_pi, downsample_ratio: not in the file but in its config.yaml.
        scale_factor, pc_size, pc_sharpedge_size: likewise; those of the released 3,072- and 512-token models if None.
        encoder: read the encoder too, where the file has one.

    Returns:
        The VAE in fp32 eval mode and the report.

    Raises:
        ValueError: if keys or shapes do not fit.
    """
    own = _own(state)
    width, embed = own["post_kl.weight"].shape
    inner = own["geo_decoder.output_proj.weight"].shape[1]
    with_encoder = encoder and "pre_kl.weight" in own
    known = {size["num_latents"]: size for size in SIZES.values()}.get(num_latents, {})
    num_freqs = (own["geo_decoder.query_proj.weight"].shape[1] - 3) // 6
    options: dict[str, Any] = {}
    if with_encoder:
        options["num_encoder_layers"] = _count(own, r"encoder\.self_attn\.resblocks\.(\d+)\.")
        options["point_feats"] = own["encoder.input_proj.weight"].shape[1] - 3 - 6 * num_freqs
        options["encoder_ln_post"] = "encoder.ln_post.weight" in own
    for name, value in {"scale_factor": scale_factor, "pc_size": pc_size, "pc_sharpedge_size": pc_sharpedge_size}.items():
        if value is not None or name in known:
            options[name] = value if value is not None else known[name]
    model = build_empty(
        ShapeVAE,
        num_latents=num_latents,
        embed_dim=embed,
        width=width,
        heads=heads,
        num_decoder_layers=_count(own, r"transformer\.resblocks\.(\d+)\."),
        num_freqs=num_freqs,
        include_pi=include_pi,
        downsample_ratio=downsample_ratio,
        qkv_bias="transformer.resblocks.0.attn.c_qkv.bias" in own,
        qk_norm="transformer.resblocks.0.attn.attention.q_norm.weight" in own,
        head_downsample=width // inner,
        head_mlp_ratio=own["geo_decoder.cross_attn_decoder.mlp.c_fc.weight"].shape[0] / inner,
        head_ln_post="geo_decoder.ln_post.weight" in own,
        **options,
    )
    table = _table(heads, heads * inner // width, with_encoder)
    if not with_encoder:
        table.drops += [Drop("encoder.{rest}", "encoder not wanted"), Drop("pre_kl.{p}", "encoder not wanted")]
    ours, report = table.to_ours(own, model.state_dict())
    return fill(model, ours), report


def to_official(model: ShapeVAE) -> dict[str, Tensor]:
    """Return the official state dict, bare keys."""
    c = model.config
    return _table(c["heads"], c["heads"] // c["head_downsample"], model.encoder is not None).to_official(model.state_dict())
