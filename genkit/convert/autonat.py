"""AutoNAT: official checkpoints of the plain masked-token transformer (`nnet_ema.pth`, pickled tensors, or the same as safetensors).

Sizes are read from the shapes; the number of heads is 8 in all released files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from genkit.convert.base import ConversionReport, Drop, KeyTable, OfficialModel, Row, build_empty, fill, joined, split_qkv
from genkit.convert.enat import HEAD_ROWS, square_grid
from genkit.generators.nat import NATTransformer2DModel

COMPONENT, PIPELINE = "transformer", "ENATPipeline"
FILES = ("nnet_ema.pth", "nnet_ema.safetensors", "nnet.pth")
OFFICIAL = (
    OfficialModel(
        name="autonat-l-256", source="Google Drive, linked in the authors' repository (arXiv 2406.05478)", files=("nnet_ema.pth",),
        licence="MIT", parameters=193_655_297, memory_gb=1.0,
        note="class-conditional ImageNet 256x256, 1000 classes, 8 searched steps; needs the MaskGIT VQGAN tokenizer",
    ),
)  # fmt: skip


def _block_rows(official: str, ours: str) -> list[Row]:
    """Return the rows of a block."""
    found = [
        Row((f"{official}.attn.qkv.{kind}",), (f"{ours}.0.f.q.{kind}", f"{ours}.0.f.kv.{kind}"), load=split_qkv,
            save=joined)
        for kind in ("weight", "bias")
    ]  # fmt: skip
    return [
        *found,
        Row(f"{official}.norm1.{{p}}", f"{ours}.0.norm.{{p}}"),
        Row(f"{official}.attn.proj.{{p}}", f"{ours}.0.f.proj.{{p}}"),
        Row(f"{official}.norm2.{{p}}", f"{ours}.1.norm.{{p}}"),
        Row(f"{official}.mlp.{{rest}}", f"{ours}.1.f.{{rest}}"),
    ]


def table(half: int) -> KeyTable:
    """Return the table of a network with `half` blocks on either side of the middle one."""
    places = [(f"in_blocks.{i}", i) for i in range(half)] + [("mid_block", half)]
    places += [(f"out_blocks.{i}", half + 1 + i) for i in range(half)]
    rows: list[Row | Drop] = []
    for side, ours in (("token_emb", "embedding"), ("context_embed", "class_embedding")):
        rows += [
            Row(f"{side}.word_embeddings.weight", f"{ours}.word.weight"),
            Row(f"{side}.position_embeddings.weight", f"{ours}.position"),
            Row(f"{side}.LayerNorm.{{p}}", f"{ours}.norm.{{p}}"),
        ]
    for official, i in places:
        rows += _block_rows(official, f"blocks.{i}.branches")
    rows += [Row("out_blocks.{i}.skip_linear.{p}", "skips.{i}.{p}"), *HEAD_ROWS, Drop("{rest}.position_ids", "a counter 0 .. n - 1")]
    return KeyTable("autonat", rows)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether keys and shapes are those of an AutoNAT checkpoint."""
    return {"token_emb.word_embeddings.weight", "context_embed.word_embeddings.weight", "mid_block.attn.qkv.weight"} <= shapes.keys()


def from_official(
    state: Mapping[str, Tensor],
    *,
    num_heads: int = 8,
    sample_size: int | Sequence[int] | None = None,
    dropout: float = 0.1,
) -> tuple[NATTransformer2DModel, ConversionReport]:
    """Build the transformer of an official state dict.

    Args:
        state: official tensors by key, without wrapper.
        num_heads: attention heads.
        sample_size: side or [rows, columns] of the token grid; None takes the square that the positional table fits.
        dropout: of the embedded tokens, in training.

    Returns:
        The model in fp32 eval mode and the report.

    Raises:
        ValueError: if keys or shapes do not fit each other or the options.
    """
    needed = ("token_emb.position_embeddings.weight", "token_emb.word_embeddings.weight", "context_embed.word_embeddings.weight")
    missing = [key for key in (*needed, "mid_block.mlp.fc1.weight") if key not in state]
    if missing:
        raise ValueError(f"autonat: missing {', '.join(missing)}; this is not an AutoNAT checkpoint.")
    (tokens, dim), num_ids, num_labels = state[needed[0]].shape, len(state[needed[1]]), len(state[needed[2]])
    half = len({m[1] for key in state if (m := re.match(r"in_blocks\.(\d+)\.", key))})
    model = build_empty(
        NATTransformer2DModel,
        sample_size=square_grid(tokens, sample_size),
        hidden_size=dim,
        num_heads=num_heads,
        depth=2 * half,
        codebook_size=num_ids - 1,
        num_classes=num_labels - 1,
        mlp_ratio=len(state["mid_block.mlp.fc1.weight"]) / dim,
        qkv_bias="mid_block.attn.qkv.bias" in state,
        skip="out_blocks.0.skip_linear.weight" in state,
        dropout=dropout,
    )
    ours, report = table(half).to_ours(state, model.state_dict())
    return fill(model, ours), report


def to_official(model: NATTransformer2DModel) -> dict[str, Tensor]:
    """Return the official state dict of a class model.

    Raises:
        ValueError: if the model has what the official layout has no name for (text).
    """
    return table(len(model.blocks) // 2).to_official(model.state_dict())
