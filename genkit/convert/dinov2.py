"""DINOv2 as Hunyuan3D-2's files hold it (names of transformers 4), to the model of the transformers that is installed.

Files of the whole generator hold it under `conditioner.main_image_encoder.model.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genkit.convert.base import ConversionReport, KeyTable, OfficialModel, Row, build_empty, fill

if TYPE_CHECKING:
    from transformers import Dinov2Model

COMPONENT, PIPELINE = "image_encoder", None
FILES = ("model.fp16.safetensors", "model.fp16.ckpt")
WRAPPERS = ("conditioner", "state_dict")
HEAD_WIDTH = 64  # of every released size
PREFIXES = ("conditioner.", "main_image_encoder.", "model.")
OFFICIAL: tuple[OfficialModel, ...] = ()  # part of the files of `shape_dit`

TABLE = KeyTable(
    "dinov2",
    [
        *(
            Row(f"encoder.layer.{{i}}.attention.attention.{name}.{{p}}", f"encoder.layer.{{i}}.attention.{name[0]}_proj.{{p}}")
            for name in ("query", "key", "value")
        ),
        Row("encoder.layer.{i}.attention.output.dense.{p}", "encoder.layer.{i}.attention.o_proj.{p}"),
        Row(
            ("encoder.layer.{i}.mlp.weights_in.{p}",), ("encoder.layer.{i}.mlp.gate_proj.{p}", "encoder.layer.{i}.mlp.up_proj.{p}"),
            lambda t: list(t[0].chunk(2)), lambda t: [torch.cat(t)],
        ),
        Row("encoder.layer.{i}.mlp.weights_out.{p}", "encoder.layer.{i}.mlp.down_proj.{p}"),
        Row("encoder.{rest}", "encoder.{rest}"),
        Row("embeddings.{rest}", "embeddings.{rest}"),
        Row("layernorm.{p}", "layernorm.{p}"),
    ],
)  # fmt: skip


def _own(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the encoder's entries of a file, without prefixes."""
    found = dict(state)
    for prefix in PREFIXES:
        if any(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    return found


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether keys are those of DINOv2 in the names of transformers 4."""
    return {"embeddings.cls_token", "encoder.layer.0.attention.attention.query.weight", "layernorm.weight"} <= _own(shapes).keys()


def from_official(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, patch_size: int = 14
) -> tuple[Dinov2Model, ConversionReport]:
    """Build the encoder of a state dict; sizes come from shapes.

    Args:
        state: tensors by key.
        num_heads: 64 channels each if None, as in every released size.
        patch_size: for the picture's size.

    Returns:
        The encoder in fp32 eval mode and the report.

    Raises:
        ValueError: if keys or shapes do not fit.
    """
    from transformers import Dinov2Config, Dinov2Model

    own = _own(state)
    width, tokens = own["embeddings.cls_token"].shape[-1], own["embeddings.position_embeddings"].shape[1] - 1
    swiglu = "encoder.layer.0.mlp.weights_in.weight" in own
    hidden = own["encoder.layer.0.mlp.fc1.weight"].shape[0] if not swiglu else 4 * width
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=1 + max(int(match[1]) for key in own if (match := re.match(r"encoder\.layer\.(\d+)\.", key))),
        num_attention_heads=width // HEAD_WIDTH if num_heads is None else num_heads,
        mlp_ratio=hidden // width,
        image_size=patch_size * round(tokens**0.5),
        patch_size=patch_size,
        use_swiglu_ffn=swiglu,
        qkv_bias="encoder.layer.0.attention.attention.query.bias" in own,
    )
    model = build_empty(Dinov2Model, config=config)
    ours, report = TABLE.to_ours(own, model.state_dict())
    return fill(model, ours), report


def to_official(model: Dinov2Model) -> dict[str, Tensor]:
    """Return the state dict in the names of transformers 4, bare keys."""
    return TABLE.to_official(model.state_dict())
