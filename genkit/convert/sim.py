"""SIM's one-step text-to-image student (SIM-DiT-600M), and PixArt-alpha in its authors' layout: both become diffusers' transformer.

Every key of the released file starts with `module.`; the rest is `model.*` and the table of noise levels `u`. Fused q, k, v are split.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from accelerate import init_empty_weights
from torch import Tensor

from genkit.convert.base import ConversionReport, Drop, KeyTable, OfficialModel, Row, fill, halves, joined
from genkit.generators.pixart import LATENT_CHANNELS, level_table

if TYPE_CHECKING:
    from diffusers import PixArtTransformer2DModel

COMPONENT, PIPELINE = "transformer", "PixArtOneStepPipeline"
WRAPPERS = ("ema", "state_dict")
FILES = ("SIM-DiT-600M.pth", "SIM_T2I_600M.pth", "model.pth")
OFFICIAL = (
    OfficialModel(
        name="sim-dit-600m", source="Hugging Face hub", files=FILES, licence="none stated (code: AGPL-3.0)", parameters=611_347_616,
        memory_gb=2.5, hub_id="maple-research-lab/SIM", note="one-step PixArt-alpha 512; needs a T5-XXL text encoder and SD's VAE",
    ),
)  # fmt: skip


def _thirds(tensors: list[Tensor]) -> list[Tensor]:
    return [part.clone() for part in tensors[0].chunk(3)]


_BLOCK, _OURS = "model.blocks.{i}", "transformer_blocks.{i}"
TABLE = KeyTable(
    "sim",
    [
        Row("model.x_embedder.proj.{p}", "pos_embed.proj.{p}"),
        Row("model.y_embedder.y_proj.fc1.{p}", "caption_projection.linear_1.{p}"),
        Row("model.y_embedder.y_proj.fc2.{p}", "caption_projection.linear_2.{p}"),
        Row("model.t_embedder.mlp.0.{p}", "adaln_single.emb.timestep_embedder.linear_1.{p}"),
        Row("model.t_embedder.mlp.2.{p}", "adaln_single.emb.timestep_embedder.linear_2.{p}"),
        Row("model.t_block.1.{p}", "adaln_single.linear.{p}"),
        Row(f"{_BLOCK}.scale_shift_table", f"{_OURS}.scale_shift_table"),
        Row((f"{_BLOCK}.attn.qkv.{{p}}",), tuple(f"{_OURS}.attn1.to_{x}.{{p}}" for x in "qkv"), _thirds, joined),
        Row(f"{_BLOCK}.attn.proj.{{p}}", f"{_OURS}.attn1.to_out.0.{{p}}"),
        Row(f"{_BLOCK}.cross_attn.q_linear.{{p}}", f"{_OURS}.attn2.to_q.{{p}}"),
        Row((f"{_BLOCK}.cross_attn.kv_linear.{{p}}",), tuple(f"{_OURS}.attn2.to_{x}.{{p}}" for x in "kv"), halves, joined),
        Row(f"{_BLOCK}.cross_attn.proj.{{p}}", f"{_OURS}.attn2.to_out.0.{{p}}"),
        Row(f"{_BLOCK}.mlp.fc1.{{p}}", f"{_OURS}.ff.net.0.proj.{{p}}"),
        Row(f"{_BLOCK}.mlp.fc2.{{p}}", f"{_OURS}.ff.net.2.{{p}}"),
        Row("model.final_layer.linear.{p}", "proj_out.{p}"),
        Row("model.final_layer.scale_shift_table", "scale_shift_table"),
        Drop("model.pos_embed", "positional table, a closed form; equal to ours"),
        Drop("model.y_embedder.y_embedding", "learnt empty caption; the pipeline encodes an empty text instead, and a student needs none"),
        Drop("u", "table of noise levels, made by formula"),
    ],
)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether keys are those of PixArt-alpha in its authors' layout."""
    return {"model.x_embedder.proj.weight", "model.y_embedder.y_proj.fc1.weight", "model.t_block.1.weight"} <= shapes.keys()


def from_official(state: Mapping[str, Tensor], *, num_heads: int | None = None) -> tuple[PixArtTransformer2DModel, ConversionReport]:
    """Build the transformer of an official state dict.

    Args:
        state: official tensors by key, `model.*` and `u`.
        num_heads: attention heads, the one number that shapes do not tell; width / 72 if None, as released.

    Returns:
        diffusers' model in fp32 eval mode and the report.

    Raises:
        ValueError: if keys or shapes do not fit, or a table differs from its formula.
    """
    from diffusers import PixArtTransformer2DModel

    stem, caption = state["model.x_embedder.proj.weight"], state["model.y_embedder.y_proj.fc1.weight"]
    width, patch = stem.shape[0], stem.shape[-1]
    heads = width // 72 if num_heads is None else num_heads
    if heads < 1 or width % heads:
        raise ValueError(f"sim: num_heads must divide the width {width}, got {num_heads if num_heads is not None else '72 channels each'}.")
    depth = 1 + max(int(match[1]) for key in state if (match := re.match(r"model\.blocks\.(\d+)\.", key)))
    tokens = state["model.pos_embed"].shape[1]
    side = round(tokens**0.5) * patch
    with init_empty_weights(include_buffers=False):
        model = PixArtTransformer2DModel(
            sample_size=side, num_layers=depth, num_attention_heads=heads, attention_head_dim=width // heads,
            in_channels=stem.shape[1], out_channels=state["model.final_layer.linear.weight"].shape[0] // patch**2, patch_size=patch,
            cross_attention_dim=width, caption_channels=caption.shape[1], norm_type="ada_norm_single",
            use_additional_conditions=False, interpolation_scale=1,
        )  # fmt: skip
    _check(state, model)
    ours, report = TABLE.to_ours(state, model.state_dict())
    fill(model, ours)
    return model, report


def to_official(model: PixArtTransformer2DModel) -> dict[str, Tensor]:
    """Return the official state dict, positional table and levels included, the learnt empty caption left out."""
    official = TABLE.to_official(model.state_dict())
    return official | {"model.pos_embed": model.pos_embed.pos_embed.clone(), "u": level_table().clone()}


def _check(state: Mapping[str, Tensor], model: PixArtTransformer2DModel) -> None:
    """Raise ValueError if a stored table differs from its formula."""
    tables = {"model.pos_embed": (model.pos_embed.pos_embed, 1e-4), "u": (level_table(), 1e-3)}
    for key, (formula, bound) in tables.items():
        if key in state:
            stored = state[key].float()
            if stored.shape != formula.shape or bool(((stored - formula).abs() > bound * formula.abs().clamp_min(1)).any()):
                raise ValueError(f"sim: {key} differs from its formula; this is no PixArt-alpha of {LATENT_CHANNELS}-channel latents.")
