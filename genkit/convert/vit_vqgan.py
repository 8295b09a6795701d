"""ViT-VQGAN stage 1: checkpoints of the public PyTorch re-implementation (Lightning, pickled or as safetensors).

Everything is read from the shapes: depth from the layer numbers, widths from the tensors, heads from the attention rows (head width 64
unless told). The two positional tables are closed forms: they are checked against the formula and not stored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from genkit.blocks.embeddings import sincos_2d
from genkit.convert.base import ConversionReport, Drop, KeyTable, OfficialModel, Row, build_empty, fill, joined, split_qkv
from genkit.tokenizers.vit_vqgan import ViTVQModel

COMPONENT, PIPELINE = "vqvae", None
FILES = ("imagenet_vitvq_base.ckpt", "imagenet_vitvq_small.ckpt")
OFFICIAL = (
    OfficialModel(
        name="vitvqgan-imagenet-small", source="Hugging Face hub", files=("imagenet_vitvq_small.ckpt",), licence="MIT",
        parameters=51_956_771, memory_gb=0.5, hub_id="thuanz123/vitvqgan-imagenet-small", note="ViT-VQGAN stage 1, 256x256, 8192 codes",
    ),
    OfficialModel(
        name="vitvqgan-imagenet-base", source="Hugging Face hub", files=("imagenet_vitvq_base.ckpt",), licence="MIT",
        parameters=172_237_347, memory_gb=1.2, hub_id="thuanz123/vitvqgan-imagenet-base", note="ViT-VQGAN stage 1, 256x256, 8192 codes",
    ),
)  # fmt: skip


def _tower_rows(side: str) -> list[Row]:
    """Return the rows of one tower ("encoder" or "decoder")."""
    official, ours = f"{side}.transformer.layers.{{i}}", f"{side}.blocks.{{i}}.branches"
    return [
        Row(f"{official}.0.norm.{{p}}", f"{ours}.0.norm.{{p}}"),
        Row((f"{official}.0.fn.to_qkv.weight",), (f"{ours}.0.f.q.weight", f"{ours}.0.f.kv.weight"),
            load=split_qkv, save=joined),
        Row(f"{official}.0.fn.to_out.{{p}}", f"{ours}.0.f.proj.{{p}}"),
        Row(f"{official}.1.norm.{{p}}", f"{ours}.1.norm.{{p}}"),
        Row(f"{official}.1.fn.net.0.{{p}}", f"{ours}.1.f.fc1.{{p}}"),
        Row(f"{official}.1.fn.net.2.{{p}}", f"{ours}.1.f.fc2.{{p}}"),
        Row(f"{side}.transformer.norm.{{p}}", f"{side}.norm.{{p}}"),
    ]  # fmt: skip


TABLE = KeyTable(
    "vit_vqgan",
    [
        Row("encoder.to_patch_embedding.0.{p}", "encoder.stem.{p}"),
        Row("decoder.to_pixel.1.{p}", "decoder.head.{p}"),
        Row("{end}_quant.{p}", "{end}_quant.{p}"),
        Row("quantizer.embedding.weight", "quantizer.embedding.weight"),
        *_tower_rows("encoder"),
        *_tower_rows("decoder"),
        Drop("encoder.en_pos_embedding", "positional table, a closed form; equal to ours"),
        Drop("decoder.de_pos_embedding", "positional table, a closed form; equal to ours"),
        Drop("loss.{rest}", "discriminator and perceptual network of the training"),
    ],
)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether keys and shapes are those of a stage-1 checkpoint."""
    return {"encoder.to_patch_embedding.0.weight", "decoder.to_pixel.1.weight", "quantizer.embedding.weight"} <= shapes.keys()


def from_official(
    state: Mapping[str, Tensor],
    *,
    dim_head: int | Sequence[int] = 64,
    beta: float = 0.25,
    use_norm: bool = True,
    image_size: int | Sequence[int] | None = None,
) -> tuple[ViTVQModel, ConversionReport]:
    """Build the tokenizer of an official state dict.

    Args:
        state: official tensors by key, without wrapper.
        dim_head: head width, one for both towers or [encoder, decoder]; the only number that shapes do not tell.
        beta: weight of the commitment term in the quantizer's loss.
        use_norm: whether codes are l2-normalised, as in all released weights.
        image_size: side or [height, width] of the training pictures; None takes the square that the positional table fits.

    Returns:
        The model in fp32 eval mode and the report.

    Raises:
        ValueError: if keys or shapes do not fit, or a positional table differs from the formula.
    """
    patch = tuple(state["encoder.to_patch_embedding.0.weight"].shape[2:])
    heads = (dim_head, dim_head) if isinstance(dim_head, int) else tuple(dim_head)
    size = _image_size(state["encoder.en_pos_embedding"].shape[1], patch, image_size)
    codes = state["quantizer.embedding.weight"].shape
    model = build_empty(
        ViTVQModel,
        patch_size=list(patch),
        encoder_config=_tower_config(state, "encoder", heads[0]),
        decoder_config=_tower_config(state, "decoder", heads[1]),
        quantizer_config={"name": "l2_vq" if use_norm else "vq", "codebook_size": codes[0], "dim": codes[1], "beta": beta},
        official_range=True,
        sample_size=list(size),
    )
    _check_tables(state, model.grid_for(*size))
    ours, report = TABLE.to_ours(state, model.state_dict())
    return fill(model, ours), report


def to_official(model: ViTVQModel) -> dict[str, Tensor]:
    """Return the official state dict of a model with published ends, positional tables included.

    Raises:
        ValueError: if the model has what the official layout has no name for (conv stem, SimVQ).
    """
    official = TABLE.to_official(model.state_dict())
    size = model.config["sample_size"]
    h, w = model.grid_for(*((size, size) if isinstance(size, int) else size))
    return official | {
        "encoder.en_pos_embedding": sincos_2d(h, w, model.encoder.dim)[None],
        "decoder.de_pos_embedding": sincos_2d(h, w, model.decoder.dim)[None],
    }


def _tower_config(state: Mapping[str, Tensor], side: str, dim_head: int) -> dict[str, Any]:
    """Read one tower's config from the shapes."""
    prefix = f"{side}.transformer.layers."
    depth = 1 + max(int(match[1]) for key in state if (match := re.match(re.escape(prefix) + r"(\d+)\.", key)))
    rows, dim = state[f"{prefix}0.0.fn.to_qkv.weight"].shape
    if rows % (3 * dim_head):
        raise ValueError(f"vit_vqgan: {side} has attention rows {rows}, not a multiple of 3 * dim_head={3 * dim_head}; give dim_head.")
    mlp_dim = state[f"{prefix}0.1.fn.net.0.weight"].shape[0]
    return {"dim": dim, "depth": depth, "heads": rows // (3 * dim_head), "mlp_dim": mlp_dim, "dim_head": dim_head, "act": "tanh"}


def _image_size(tokens: int, patch: Sequence[int], image_size: int | Sequence[int] | None) -> tuple[int, int]:
    """Return (height, width) of the pictures behind a table of `tokens` rows."""
    if image_size is None:
        side = math.isqrt(tokens)
        size = (side * patch[0], side * patch[1])
    else:
        size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
    if (size[0] // patch[0]) * (size[1] // patch[1]) != tokens:
        raise ValueError(
            f"vit_vqgan: the positional table has {tokens} rows, a picture of {size} in patches {tuple(patch)} has another number; "
            "give image_size."
        )
    return size


def _check_tables(state: Mapping[str, Tensor], grid: tuple[int, int]) -> None:
    """Raise ValueError if a stored positional table differs from the formula."""
    for key in ("encoder.en_pos_embedding", "decoder.de_pos_embedding"):
        table = state[key].float()
        error = (table[0] - sincos_2d(*grid, table.shape[-1])).abs().max().item()
        if error > 1e-3:
            raise ValueError(
                f"vit_vqgan: {key} differs from the 2-D sin-cos table by {error:.3g}; this is not a stage-1 checkpoint of this layout."
            )
