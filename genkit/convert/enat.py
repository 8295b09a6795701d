"""ENAT: official checkpoints (`nnet_ema.pth`, pickled tensors, or the same as safetensors).

Sizes are read from the shapes. The files do not tell the number of heads (64 channels each in all released ones), nor where the encoder
ends and the decoder begins (two decoder blocks in all released ones).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from genkit.convert.base import ConversionReport, Drop, KeyTable, OfficialModel, Row, build_empty, fill
from genkit.generators.enat import ENATTransformer2DModel

COMPONENT, PIPELINE = "transformer", "ENATPipeline"
FILES = ("nnet_ema.pth", "nnet_ema_512.pth", "nnet_ema.safetensors", "nnet_ema_512.safetensors", "nnet.pth")
SOURCE = "Google Drive, linked in the authors' repository (arXiv 2411.06959)"
OFFICIAL = (
    OfficialModel(
        name="enat-l-256", source=SOURCE, files=("nnet_ema.pth",), licence="none stated", parameters=574_298_113, memory_gb=2.6,
        note="class-conditional ImageNet 256x256, 1000 classes; needs the MaskGIT VQGAN tokenizer",
    ),
    OfficialModel(
        name="enat-l-512", source=SOURCE, files=("nnet_ema_512.pth",), licence="none stated", parameters=575_084_545, memory_gb=2.8,
        note="class-conditional ImageNet 512x512, 1000 classes; needs the MaskGIT VQGAN tokenizer",
    ),
)  # fmt: skip

DEAD = "prev_embedder."
_OURS, _OFFICIAL = "blocks.{i}.branches", "blocks.{i}"


def _dead_weights(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return zeros for the unused MLP that strict readers of an official file look for (hidden width 4 d, whatever mlp_ratio is)."""
    bias = ours["head.fc.bias"]
    dim = len(bias)
    shapes = {"fc1.weight": (4 * dim, dim), "fc1.bias": (4 * dim,), "fc2.weight": (dim, 4 * dim), "fc2.bias": (dim,)}
    return {DEAD + name: bias.new_zeros(shape) for name, shape in shapes.items()}


HEAD_ROWS = (  # of ENAT and NAT
    Row("norm.{p}", "norm.{p}"),
    Row("mlm_layer.bias", "head.bias", load=torch.flatten, save=lambda bias: bias[None, None]),
    Row("mlm_layer.fc.{p}", "head.fc.{p}"),
    Row("mlm_layer.ln.{p}", "head.norm.{p}"),
)
TABLE = KeyTable(
    "enat",
    [
        Row("x_embedder.word_embeddings.weight", "embedding.word.weight"),
        Row("x_embedder.position_embeddings.weight", "embedding.position"),
        Row("x_embedder.LayerNorm.{p}", "embedding.norm.{p}"),
        Row("y_embedder.embedding_table.weight", "class_embedding.weight"),
        Row("prev_proj.norm.{p}", "reuse.norm.{p}"),
        Row("prev_proj.mlp.{rest}", "reuse.f.{rest}"),
        Row(f"{_OFFICIAL}.attn.q.{{p}}", f"{_OURS}.0.f.q.{{p}}"),
        Row(f"{_OFFICIAL}.attn.kv.A.{{p}}", f"{_OURS}.0.f.context_kv.{{p}}"),
        Row(f"{_OFFICIAL}.attn.kv.B.{{p}}", f"{_OURS}.0.f.kv.{{p}}"),
        Row(f"{_OFFICIAL}.attn.proj.{{p}}", f"{_OURS}.0.f.proj.{{p}}"),
        Row(f"{_OFFICIAL}.mlp.{{rest}}", f"{_OURS}.1.f.{{rest}}"),
        Row(f"{_OFFICIAL}.adaLN_modulation.1.{{p}}", "blocks.{i}.modulation.linear.{p}"),
        *HEAD_ROWS,
        Drop("prev_embedder.{rest}", "an MLP that the official network never calls", make=_dead_weights),
        Drop("x_embedder.position_ids", "a counter 0 .. n - 1"),
        Drop("{rest}.position_ids", "a counter 0 .. n - 1"),
    ],
)

_LEFT_OVER: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()
"""Unused tensors of the file a model came from, so that the way back gives the same file; gone with the model."""


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether keys and shapes are those of an ENAT checkpoint."""
    needed = {"x_embedder.word_embeddings.weight", "y_embedder.embedding_table.weight", "blocks.0.attn.kv.A.weight", "mlm_layer.bias"}
    return needed <= shapes.keys()


def from_official(
    state: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    num_decoder_layers: int = 2,
    sample_size: int | Sequence[int] | None = None,
    dropout: float = 0.1,
    class_dropout: float = 0.1,
) -> tuple[ENATTransformer2DModel, ConversionReport]:
    """Build the transformer of an official state dict.

    Args:
        state: official tensors by key, without wrapper.
        num_heads: attention heads; one per 64 channels if None, as in all released weights.
        num_decoder_layers: blocks at the end that form the decoder.
        sample_size: side or [rows, columns] of the token grid; None takes the square that the positional table fits.
        dropout: of the embedded tokens, in training.
        class_dropout: of the labels, in training.

    Returns:
        The model in fp32 eval mode and the report.

    Raises:
        ValueError: if keys or shapes do not fit each other or the options.
    """
    needed = ("x_embedder.position_embeddings.weight", "x_embedder.word_embeddings.weight", "y_embedder.embedding_table.weight")
    missing = [key for key in (*needed, "blocks.0.mlp.fc1.weight") if key not in state]
    if missing:
        raise ValueError(f"enat: missing {', '.join(missing)}; this is not an ENAT checkpoint.")
    (tokens, dim), num_ids, num_labels = state[needed[0]].shape, state[needed[1]].shape[0], state[needed[2]].shape[0]
    num_blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    if not 1 <= num_decoder_layers <= num_blocks:
        raise ValueError(f"enat: num_decoder_layers must lie in 1 .. {num_blocks}, the blocks in the file; got {num_decoder_layers}.")
    model = build_empty(
        ENATTransformer2DModel,
        sample_size=square_grid(tokens, sample_size),
        hidden_size=dim,
        num_heads=_heads(dim, num_heads),
        num_encoder_layers=num_blocks - num_decoder_layers,
        num_decoder_layers=num_decoder_layers,
        codebook_size=num_ids - 1,
        num_classes=num_labels - 1,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        dropout=dropout,
        class_dropout=class_dropout,
    )
    ours, report = TABLE.to_ours(state, model.state_dict())
    _LEFT_OVER[model] = {key: value for key, value in state.items() if key.startswith(DEAD)}
    return fill(model, ours), report


def to_official(model: ENATTransformer2DModel) -> dict[str, Tensor]:
    """Return the official state dict of a class model, the unused tensors included: those of its file, or zeros.

    Raises:
        ValueError: if the model has what the official layout has no name for (text, shared modulation).
    """
    return TABLE.to_official(model.state_dict()) | _LEFT_OVER.get(model, {})


def square_grid(tokens: int, sample_size: int | Sequence[int] | None) -> int | list[int]:
    """Return the sample size behind a positional table of `tokens` rows."""
    sides = [math.isqrt(tokens)] if sample_size is None else [sample_size] if isinstance(sample_size, int) else list(sample_size)
    if math.prod(sides) != tokens and sides[0] ** 2 != tokens:
        raise ValueError(f"the positional table has {tokens} rows, a grid of sides {sides} another number; give sample_size=[h, w].")
    return sides[0] if len(sides) == 1 else sides


def _heads(dim: int, num_heads: int | None) -> int:
    """Return the number of heads, one per 64 channels unless told."""
    if num_heads is None and dim % 64:
        raise ValueError(f"enat: width {dim} is not a multiple of 64, the head width of released files; give num_heads.")
    return dim // 64 if num_heads is None else num_heads
