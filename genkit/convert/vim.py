"""VIM stage 2: checkpoints of the public PyTorch re-implementation (its GPT alone, or a Lightning file with stage 1 beside it).

No weights were released; this reads what users train with that code. Sizes come from the shapes, but the number of heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from genkit.convert.base import ConversionReport, Drop, KeyTable, OfficialModel, Row, build_empty, fill
from genkit.convert.enat import square_grid
from genkit.generators.vim import VIMTransformer2DModel

COMPONENT, PIPELINE = "transformer", "VIMPipeline"
FILES: tuple[str, ...] = ()
OFFICIAL: tuple[OfficialModel, ...] = ()
PREFIX = "transformer."


def _flat(table: Tensor) -> Tensor:
    return table[0]


def _rows(kind: str) -> Row:
    """Return the row of keys and values, two layers there and one here."""
    names = (f"blocks.{{i}}.attn.key.{kind}", f"blocks.{{i}}.attn.value.{kind}")
    return Row(names, (f"blocks.{{i}}.branches.0.f.inner.kv.{kind}",), load=lambda x: [torch.cat(x)], save=lambda x: list(x[0].chunk(2)))


TABLE = KeyTable(
    "vim",
    [
        Row("tok_emb_cond.weight", "class_embed.weight"),
        Row("tok_emb_code.weight", "code_embed.weight"),
        Row("pos_emb_cond", "class_position", load=_flat, save=lambda table: table[None]),
        Row("pos_emb_code", "code_position", load=_flat, save=lambda table: table[None]),
        Row("blocks.{i}.ln1.{p}", "blocks.{i}.branches.0.norm.{p}"),
        Row("blocks.{i}.attn.query.{p}", "blocks.{i}.branches.0.f.inner.q.{p}"),
        _rows("weight"),
        _rows("bias"),
        Row("blocks.{i}.attn.proj.{p}", "blocks.{i}.branches.0.f.inner.proj.{p}"),
        Row("blocks.{i}.attn.time_mix", "blocks.{i}.branches.0.f.time_mix", load=torch.flatten, save=lambda m: m[None, None]),
        Row("blocks.{i}.ln2.{p}", "blocks.{i}.branches.1.norm.{p}"),
        Row("blocks.{i}.mlp.p0.{p}", "blocks.{i}.branches.1.f.fc1.{p}"),
        Row("blocks.{i}.mlp.p1.{p}", "blocks.{i}.branches.1.f.fc2.{p}"),
        Row("layer_norm.{p}", "norm.{p}"),
        Row("head.weight", "head.weight"),
        Drop("stage1_model.{rest}", "the tokenizer; convert it as vit_vqgan"),
        Drop("cond_model.{rest}", "turns labels into condition tokens without weights of its own"),
    ],
)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether keys and shapes are those of a stage-2 checkpoint."""
    return {"tok_emb_code.weight", "blocks.0.attn.time_mix"} <= {key.removeprefix(PREFIX) for key in shapes}


def from_official(
    state: Mapping[str, Tensor],
    *,
    num_heads: int = 16,
    sample_size: int | Sequence[int] | None = None,
    forgetful_cache: bool = False,
) -> tuple[VIMTransformer2DModel, ConversionReport]:
    """Build the transformer of an official state dict.

    Args:
        state: official tensors by key, with or without the prefix `transformer.`.
        num_heads: attention heads, 16 in the shipped configuration.
        sample_size: side or [rows, columns] of the token grid; None takes the square that the positional table fits.
        forgetful_cache: sample with the released sampler's defect.

    Returns:
        The model in fp32 eval mode and the report.

    Raises:
        ValueError: if keys or shapes do not fit each other or the options.
    """
    bare = {key.removeprefix(PREFIX): value for key, value in state.items()}
    missing = [key for key in ("pos_emb_code", "pos_emb_cond", "tok_emb_code.weight", "tok_emb_cond.weight") if key not in bare]
    if missing:
        raise ValueError(f"vim: missing {', '.join(missing)}; this is not a stage-2 checkpoint.")
    depth = 1 + max(int(key.split(".")[1]) for key in bare if key.startswith("blocks."))
    (codes, dim), (_, tokens, _) = bare["tok_emb_code.weight"].shape, bare["pos_emb_code"].shape
    model = build_empty(
        VIMTransformer2DModel,
        sample_size=square_grid(tokens, sample_size) if sample_size or math.isqrt(tokens) ** 2 == tokens else [1, tokens],
        codebook_size=codes,
        hidden_size=dim,
        num_heads=num_heads,
        depth=depth,
        mlp_ratio=len(bare["blocks.0.mlp.p0.weight"]) / dim,
        num_classes=len(bare["tok_emb_cond.weight"]),
        num_cond_tokens=bare["pos_emb_cond"].shape[1],
        qkv_bias="blocks.0.attn.query.bias" in bare,
        forgetful_cache=forgetful_cache,
    )
    ours, report = TABLE.to_ours(bare, model.state_dict())
    return fill(model, ours), report


def to_official(model: VIMTransformer2DModel) -> dict[str, Tensor]:
    """Return the official state dict of a model, without prefix."""
    return TABLE.to_official(model.state_dict())
