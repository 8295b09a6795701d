"""Blocks of published efficient transformers, from their official state dicts to stacks of `genkit.blocks` and back.

Maps [b, d, h, w] of the official code are tokens [b, h * w, d] here, and its 1 x 1 convolutions linear maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genkit.blocks import stack
from genkit.blocks.adapter import add_adapters
from genkit.blocks.axial_kernel import AxialKernelConfig
from genkit.blocks.branch import Block, Branch
from genkit.blocks.conv import ConvConfig
from genkit.blocks.embeddings import ConvPositions
from genkit.blocks.fca import FcaBlock
from genkit.blocks.hash_attention import HashAttention
from genkit.blocks.linear import LinearConfig
from genkit.blocks.lmu import LegendreMemory, LMUConfig
from genkit.blocks.memory import MemoryLayer
from genkit.blocks.mlp import MLP, MLPConfig
from genkit.blocks.next_vit import NextViTBlock
from genkit.blocks.window import WindowConfig
from genkit.convert.base import ConversionReport, Drop, KeyTable, Row, halves, joined, split_qkv


def _to_linear(weight: Tensor) -> Tensor:
    """[o, i, 1, 1] -> [o, i]."""
    return weight.flatten(1)


def _to_conv(weight: Tensor) -> Tensor:
    """[o, i] -> [o, i, 1, 1]."""
    return weight[:, :, None, None]


def _as_linear(official: str, ours: str) -> Row:
    """A 1 x 1 convolution's weight that is a linear map's here."""
    return Row(f"{official}.weight", f"{ours}.weight", _to_linear, _to_conv)


def _conv_norm(official: str, layer: str, norm: str, *, is_linear: bool = True) -> list[Row]:
    """A convolution `c` with the batch norm `bn` behind it."""
    weight = _as_linear(f"{official}.c", layer) if is_linear else Row(f"{official}.c.weight", f"{layer}.weight")
    return [weight, Row(f"{official}.bn.{{rest}}", f"{norm}.{{rest}}")]


def _norm_behind(official: str, layer: str, norm: str) -> list[Row]:
    """A convolution `0` and the batch norm `1` of a sequence."""
    return [
        _as_linear(f"{official}.0", layer),
        Row(f"{official}.0.bias", f"{layer}.bias"),
        Row(f"{official}.1.{{rest}}", f"{norm}.{{rest}}"),
    ]


def _split_heads(heads: int, key_dim: int) -> tuple[Any, Any]:
    """Return functions from rows [q | k | v] of each head to q and kv, heads contiguous, and back."""

    def load(tensors: list[Tensor]) -> list[Tensor]:
        rows = tensors[0].unflatten(0, (heads, -1))
        q, k, v = rows.split([key_dim, key_dim, rows.shape[1] - 2 * key_dim], dim=1)
        return [q.flatten(0, 1), torch.cat([k.flatten(0, 1), v.flatten(0, 1)])]

    def save(tensors: list[Tensor]) -> list[Tensor]:
        k, v = tensors[1].split([heads * key_dim, len(tensors[1]) - heads * key_dim])
        return [torch.cat([part.unflatten(0, (heads, -1)) for part in (tensors[0], k, v)], dim=1).flatten(0, 1)]

    return load, save


def _bias_row(official: str, ours: str, sides: tuple[int, int]) -> Row:
    """A table of biases, which is flat in official files."""
    return Row(
        f"{official}.attention_biases", f"{ours}.bias_table.table", lambda flat: flat.unflatten(1, sides), lambda table: table.flatten(1)
    )


def table_attention_rows(official: str, ours: str, *, heads: int, key_dim: int, sides: tuple[int, int]) -> list[Row]:
    """Return the rows of attention with a table of biases by distance, whose q, k and v lie head by head.

    Args:
        official, ours: names of the attention.
        heads, key_dim: of the attention.
        sides: (rows, columns) of the table, which is flat in official files.
    """
    load, save = _split_heads(heads, key_dim)
    return [
        Row((f"{official}.qkv.{{p}}",), (f"{ours}.q.{{p}}", f"{ours}.kv.{{p}}"), load, save),
        Row(f"{official}.proj.{{p}}", f"{ours}.proj.{{p}}"),
        _bias_row(official, ours, sides),
    ]


def _shvit(attends: bool) -> KeyTable:
    """Return the rows of SHViT's block; early ones do not attend."""
    rows = _conv_norm("conv.m", "branches.0.f.filters", "branches.0.f.norm", is_linear=False)
    if attends:
        rows += [
            Row("mixer.m.pre_norm.{p}", "branches.1.f.norm.{p}"),
            *_conv_norm("mixer.m.qkv", "branches.1.f.qkv", "branches.1.f.qkv_norm"),
        ]
        rows += _conv_norm("mixer.m.proj.1", "branches.1.f.proj", "branches.1.f.proj_norm")
    ffn = f"branches.{int(attends) + 1}.f"
    return KeyTable("shvit", rows + [row for i in (1, 2) for row in _conv_norm(f"ffn.m.pw{i}", f"{ffn}.fc{i}", f"{ffn}.norm{i}")])


SHVIT, SHVIT_EARLY = _shvit(attends=True), _shvit(attends=False)
META4D = KeyTable("efficientformer", [
    Row("layer_scale_1", "branches.0.layer_scale"),
    Row("layer_scale_2", "branches.1.layer_scale"),
    *(_as_linear(f"mlp.fc{i}", f"branches.1.f.fc{i}") for i in (1, 2)),
    *(Row(f"mlp.fc{i}.bias", f"branches.1.f.fc{i}.bias") for i in (1, 2)),
    *(Row(f"mlp.norm{i}.{{rest}}", f"branches.1.f.norm{i}.{{rest}}") for i in (1, 2)),
])  # fmt: skip
NCB = KeyTable("next_vit", [
    Row("mhca.group_conv3x3.weight", "branches.0.f.filters.weight"),
    Row("mhca.norm.{rest}", "branches.0.f.norm.{rest}"),
    _as_linear("mhca.projection", "branches.0.f.proj"),
    Row("norm.{rest}", "branches.1.norm.{rest}"),
    *(_as_linear(f"mlp.conv{i}", f"branches.1.f.fc{i}") for i in (1, 2)),
    *(Row(f"mlp.conv{i}.bias", f"branches.1.f.fc{i}.bias") for i in (1, 2)),
])  # fmt: skip
NTB = KeyTable("next_vit", [
    *(row for official, ours in (("patch_embed", "embed"), ("projection", "narrow")) for row in (
        _as_linear(f"{official}.conv", f"{ours}.proj"), Row(f"{official}.norm.{{rest}}", f"{ours}.norm.{{rest}}"),
    )),
    Row("norm1.{rest}", "attention.norm.{rest}"),
    Row("e_mhsa.norm.{rest}", "attention.f.norm.{rest}"),
    Row("e_mhsa.{rest}", "attention.f.{rest}"),
    Row("mhca.group_conv3x3.weight", "conv.f.filters.weight"),
    Row("mhca.norm.{rest}", "conv.f.norm.{rest}"),
    _as_linear("mhca.projection", "conv.f.proj"),
    Row("norm2.{rest}", "mlp.norm.{rest}"),
    *(_as_linear(f"mlp.conv{i}", f"mlp.f.fc{i}") for i in (1, 2)),
    *(Row(f"mlp.conv{i}.bias", f"mlp.f.fc{i}.bias") for i in (1, 2)),
])  # fmt: skip
CVT = KeyTable("cvt", [
    *(Row(f"attn.conv_proj_{c}.conv.weight", f"branches.0.f.{c}_conv.filters.weight") for c in "qkv"),
    *(Row(f"attn.conv_proj_{c}.bn.{{rest}}", f"branches.0.f.{c}_conv.norm.{{rest}}") for c in "qkv"),
    *(Row(f"attn.proj_{c}.{{p}}", f"branches.0.f.{c}.{{p}}") for c in "qkv"),
    Row("attn.proj.{p}", "branches.0.f.proj.{p}"),
    Row("norm1.{p}", "branches.0.norm.{p}"),
    Row("norm2.{p}", "branches.1.norm.{p}"),
    Row("mlp.{rest}", "branches.1.f.{rest}"),
])  # fmt: skip
VIR = KeyTable("vir", [
    Row(("retention.qkv.{p}",), ("branches.0.f.q.{p}", "branches.0.f.kv.{p}"), split_qkv, joined),
    Row("retention.out_proj.{p}", "branches.0.f.proj.{p}"),
    *(Row(f"norm{i}.{{p}}", f"branches.{i - 1}.norm.{{p}}") for i in (1, 2)),
    *(Row(f"ls{i}.gamma", f"branches.{i - 1}.layer_scale") for i in (1, 2)),
    Row("mlp.{rest}", "branches.1.f.{rest}"),
])  # fmt: skip
VIG = KeyTable("mobile_vig", [
    *(row for i in (1, 2) for row in _norm_behind(f"0.fc{i}", f"branches.0.f.fc{i}", f"branches.0.f.norm{i}")),
    *_norm_behind("0.graph_conv.nn", "branches.0.f.edges", "branches.0.f.edges_norm"),
    *(row for i in (1, 2) for row in _norm_behind(f"1.fc{i}", f"branches.1.f.fc{i}", f"branches.1.f.norm{i}")),
])  # fmt: skip
EFFICIENT_MOD = KeyTable("efficient_mod", [
    Row("gamma_1", "branches.0.layer_scale"),
    Row("norm.{p}", "branches.0.norm.{p}"),
    Row("mlp.context_layer.context_list.{i}.{p}", "branches.0.f.filters.{i}.{p}"),
    *(Row(f"mlp.context_layer.{name}.{{p}}", f"branches.0.f.{name}.{{p}}") for name in "fg"),
    *(Row(f"mlp.fc{i}.{{p}}", f"branches.0.f.fc{i}.{{p}}") for i in (1, 2)),
])  # fmt: skip
EFFICIENT_MOD_ATTENTION = KeyTable("efficient_mod", [
    Row(("attn.qkv.{p}",), ("branches.0.f.q.{p}", "branches.0.f.kv.{p}"), split_qkv, joined),
    Row("attn.proj.{p}", "branches.0.f.proj.{p}"),
    *(Row(f"attn.{c}_norm.{{p}}", f"branches.0.f.{c}_norm.{{p}}") for c in "qk"),
    *(Row(f"norm{i}.{{p}}", f"branches.{i - 1}.norm.{{p}}") for i in (1, 2)),
    *(Row(f"ls{i}.gamma", f"branches.{i - 1}.layer_scale") for i in (1, 2)),
    Row("mlp.{rest}", "branches.1.f.{rest}"),
])  # fmt: skip
RESFORMER = KeyTable("resformer", [
    Row("pos_embed.embed_layer.{p}", "positions.filters.{p}"),
    Row(("block.attn.qkv.{p}",), ("block.branches.0.f.q.{p}", "block.branches.0.f.kv.{p}"), split_qkv, joined),
    Row("block.attn.proj.{p}", "block.branches.0.f.proj.{p}"),
    Row("block.attn.get_v.{p}", "block.branches.0.f.local_v.{p}"),
    *(Row(f"block.norm{i}.{{p}}", f"block.branches.{i - 1}.norm.{{p}}") for i in (1, 2)),
    Row("block.mlp.{rest}", "block.branches.1.f.{rest}"),
])  # fmt: skip
ADAPTFORMER = KeyTable("adaptformer", [
    Row("attn.q_proj.{p}", "branches.0.f.q.{p}"),
    Row(("attn.k_proj.{p}", "attn.v_proj.{p}"), ("branches.0.f.kv.{p}",), joined, halves),
    Row("attn.proj.{p}", "branches.0.f.proj.{p}"),
    *(Row(f"norm{i}.{{p}}", f"branches.{i - 1}.norm.{{p}}") for i in (1, 2)),
    *(Row(f"fc{i}.{{p}}", f"branches.1.f.fc{i}.{{p}}") for i in (1, 2)),
    Row("adaptmlp.adapter_layer_norm_before.{p}", "branches.1.adapter.norm.{p}"),
    *(Row(f"adaptmlp.{name}_proj.{{p}}", f"branches.1.adapter.{name}.{{p}}") for name in ("down", "up")),
    Row("adaptmlp.scale", "branches.1.adapter.scale"),
])  # fmt: skip
MATFORMER = KeyTable("matformer", [
    Row("gate_proj.weight", "gate.weight"), Row("up_proj.weight", "fc1.weight"), Row("down_proj.weight", "fc2.weight"),
])  # fmt: skip
AXES = "xyz"  # of the official code; here "fhw"


def _factformer() -> KeyTable:
    """The table of IFactFormer's attention; the reducers of its second and third axis stand behind a rearrangement."""
    rows = [Row("in_norm.{p}", "norm.{p}"), Row("to_in.weight", "f.fc_in.weight"), Row("to_v.weight", "f.v.weight")]
    for i, axis in enumerate(AXES):
        official, ours = f"to_{axis}.{min(i, 1)}", f"f.kernels.{i}"
        rows += [
            Row(f"{official}.to_in.weight", f"{ours}.fc_in.weight"),
            Row(f"{official}.out_ffn.norm.{{p}}", f"{ours}.norm.{{p}}"),
            Row(f"{official}.out_ffn.fn.net.0.{{p}}", f"{ours}.fc1.{{p}}"),
            Row(f"{official}.out_ffn.fn.net.3.{{p}}", f"{ours}.fc2.{{p}}"),
            *(Row(f"low_rank_kernel_{axis}.to_{c}.weight", f"{ours}.{c}.weight") for c in "qk"),
        ]
    frequencies = [Drop(f"low_rank_kernel_{axis}.pos_emb.inv_freq", "follows from the width") for axis in AXES]
    return KeyTable("factformer", [*rows, Row("to_out.2.weight", "f.fc1.weight"), Row("to_out.4.weight", "f.fc2.weight"), *frequencies])


FACTFORMER = _factformer()
MEMORY = KeyTable("memoryformer", [Row("tables", "tables"), Row("bias", "bias"), Row("hash.projection.{p}", "projection.{p}")])
LMU = KeyTable("lmuformer", [
    Row("W_u.{p}", "u.{p}"), Row("W_h.{p}", "proj.{p}"), Row("A", "transition"),
    Row("B", "entry", lambda column: column.flatten(), lambda column: column[:, None]), Drop("H", "follows from A and B"),
])  # fmt: skip
ECOFORMER = KeyTable("ecoformer", [
    Row("to_qk.{p}", "qk.{p}"), Row("to_v.{p}", "v.{p}"), Row("proj.{p}", "proj.{p}"),
    Row("fast_attention.ksh.A", "hash.weight"), Row("fast_attention.ksh.anchor", "hash.anchors"),
    Row("fast_attention.ksh.mvec", "hash.mean"),
    Drop("fast_attention.projection_matrix", "never used"),
])  # fmt: skip
FLATFORMER = KeyTable("flatformer", [
    Row(("block.{i}.attn.attn.in_proj_weight",), ("{i}.branches.0.f.q.weight", "{i}.branches.0.f.kv.weight"), split_qkv, joined),
    Row(("block.{i}.attn.attn.in_proj_bias",), ("{i}.branches.0.f.q.bias", "{i}.branches.0.f.kv.bias"), split_qkv, joined),
    Row("block.{i}.attn.attn.out_proj.{p}", "{i}.branches.0.f.proj.{p}"),
    Row("block.{i}.norm1.{p}", "{i}.branches.0.norm.{p}"),
    Row("block.{i}.norm2.{p}", "{i}.branches.1.norm.{p}"),
    *(Row(f"block.{{i}}.fc{j}.{{p}}", f"{{i}}.branches.1.f.fc{j}.{{p}}") for j in (1, 2)),
])  # fmt: skip


def _one(text: str, dim: int, **options: Any) -> Block:
    """Return the block of a stack of one."""
    (block,) = stack.build(text, dim, **options)
    assert isinstance(block, Block)
    return block


def _fill(block: Block, table: KeyTable, state: Mapping[str, Tensor]) -> tuple[Block, ConversionReport]:
    """Load a block, in evaluation mode."""
    ours, report = table.to_ours(state, block.state_dict())
    block.load_state_dict(ours)
    return block.eval(), report


def shvit_block(state: Mapping[str, Tensor], *, qk_dim: int = 16) -> tuple[Block, ConversionReport]:
    """Return SHViT's block: a convolution, attention of one head in blocks that have it, an MLP, all with batch norms.

    Args:
        state: official tensors by key.
        qk_dim: width of queries and keys.
    """
    dim, hidden = len(state["conv.m.c.weight"]), len(state["ffn.m.pw1.c.weight"])
    norm = state.get("mixer.m.pre_norm.weight")
    attention = [] if norm is None else [f"shsa(p={len(norm)}, qk_dim={qk_dim}, norm='gn1', bn=True)"]
    text = " + ".join(["conv(norm='bn', bias=False)", *attention, f"bn_mlp(ratio={hidden / dim})"])
    return _fill(_one(text, dim, norm="none"), SHVIT if attention else SHVIT_EARLY, state)


def efficient_vit_block(state: Mapping[str, Tensor], *, key_dim: int, window: int) -> tuple[Block, KeyTable, ConversionReport]:
    """Return EfficientViT's block: convolution, MLP, cascaded group attention, convolution, MLP, all with batch norms.

    Args:
        state: official tensors by key.
        key_dim: width of queries and keys of a head.
        window: side of a window.

    Returns:
        The block, the names of its weights, and the report.
    """
    filters = [value for key, value in state.items() if ".dws." in key and key.endswith("c.weight")]
    names = [f"mixer.m.attn.dws.{i}.c.weight" for i in range(len(filters))]
    kernels = tuple(state[name].shape[-1] for name in names)
    hidden, dim = state["ffn0.m.pw1.c.weight"].shape[:2]
    local = f"conv(norm='bn', bias=False) + bn_mlp(ratio={hidden / dim})"
    mixer = f"cga(window={window}, heads={len(kernels)}, key_dim={key_dim}, kernels={kernels}, norm='bn')"
    ours = "branches.2.f"
    rows = [*_conv_norm("mixer.m.attn.proj.1", f"{ours}.proj", f"{ours}.proj_norm")]
    for i, (conv, mlp) in enumerate(((0, 1), (3, 4))):
        rows += _conv_norm(f"dw{i}.m", f"branches.{conv}.f.filters", f"branches.{conv}.f.norm", is_linear=False)
        for j in (1, 2):
            rows += _conv_norm(f"ffn{i}.m.pw{j}", f"branches.{mlp}.f.fc{j}", f"branches.{mlp}.f.norm{j}")
    rows += _conv_norm("mixer.m.attn.qkvs.{i}", f"{ours}.heads.{{i}}.qkv", f"{ours}.heads.{{i}}.qkv_norm")
    rows += _conv_norm("mixer.m.attn.dws.{i}", f"{ours}.heads.{{i}}.filters", f"{ours}.heads.{{i}}.norm", is_linear=False)
    rows.append(_bias_row("mixer.m.attn", ours, (window, window)))
    table = KeyTable("efficient_vit", [*rows, Drop("mixer.m.attn.attention_bias_idxs", "follows from the window")])
    block, report = _fill(_one(f"{local} + {mixer} + {local}", dim, norm="none"), table, state)
    return block, table, report


def efficientformer_map_block(state: Mapping[str, Tensor], *, pool_size: int = 3) -> tuple[Block, ConversionReport]:
    """Return EfficientFormer's block on maps: pooling and an MLP with batch norms, each with a learned factor per channel.

    Args:
        state: official tensors by key.
        pool_size: side of the pooled neighbourhood.
    """
    hidden, dim = state["mlp.fc1.weight"].shape[:2]
    text = f"conv(kind='pool', k={pool_size}) + bn_mlp(ratio={hidden / dim}, act='gelu', bias=True)"
    return _fill(_one(text, dim, norm="none", layer_scale=1e-5), META4D, state)


def efficientformer_token_block(
    state: Mapping[str, Tensor], *, heads: int, key_dim: int, resolution: int
) -> tuple[Block, KeyTable, ConversionReport]:
    """Return EfficientFormer's block on tokens: attention with a table of biases, and an MLP, each with a learned factor per channel.

    Args:
        state: official tensors by key.
        heads, key_dim: of the attention.
        resolution: side of the grid that it is made for.

    Returns:
        The block, the names of its weights, and the report.
    """
    hidden, dim = state["mlp.fc1.weight"].shape
    ratio = state["token_mixer.proj.weight"].shape[1] / (heads * key_dim)
    sides = (resolution, resolution)
    mixer = f"attention(heads={heads}, key_dim={key_dim}, value_ratio={ratio}, pos_bias='table_abs', table={sides})"
    table = KeyTable("efficientformer", [
        *table_attention_rows("token_mixer", "branches.0.f", heads=heads, key_dim=key_dim, sides=sides),
        *(Row(f"layer_scale_{i}", f"branches.{i - 1}.layer_scale") for i in (1, 2)),
        *(Row(f"norm{i}.{{p}}", f"branches.{i - 1}.norm.{{p}}") for i in (1, 2)),
        Row("mlp.{rest}", "branches.1.f.{rest}"),
        Drop("token_mixer.attention_bias_idxs", "follows from the resolution"),
    ])  # fmt: skip
    block, report = _fill(_one(f"{mixer} + mlp(hidden={hidden})", dim, layer_scale=1e-5), table, state)
    return block, table, report


def tiny_vit_block(state: Mapping[str, Tensor], *, heads: int, window_size: int) -> tuple[Block, KeyTable, ConversionReport]:
    """Return TinyViT's block: attention in windows with a table of biases, a depthwise convolution, an MLP.

    Args:
        state: official tensors by key.
        heads: of the attention.
        window_size: side of a window.

    Returns:
        The block, the names of its weights, and the report.
    """
    hidden, dim = state["mlp.fc1.weight"].shape
    k = state["local_conv.c.weight"].shape[-1]
    mixers = (
        WindowConfig(window_size, pad="zero", norm="ln", heads=heads, pos_bias="table_abs"),
        ConvConfig(k=k, norm="bn", bias=False),
        MLPConfig(hidden=hidden),
    )
    settings = (("none", "pre"), ("none", "none"), ("ln", "pre"))
    pairs = zip(mixers, settings, strict=True)
    block = Block([Branch(mixer.build(dim), dim, norm, residual=residual) for mixer, (norm, residual) in pairs], dim)
    sides = (window_size, window_size)
    table = KeyTable("tinyvit", [
        *table_attention_rows("attn", "branches.0.f.attention", heads=heads, key_dim=dim // heads, sides=sides),
        Row("attn.norm.{p}", "branches.0.f.norm.{p}"),
        *_conv_norm("local_conv", "branches.1.f.filters", "branches.1.f.norm", is_linear=False),
        Row("mlp.norm.{p}", "branches.2.norm.{p}"),
        Row("mlp.{rest}", "branches.2.f.{rest}"),
        Drop("attn.attention_bias_idxs", "follows from the window"),
    ])  # fmt: skip
    block, report = _fill(block, table, state)
    return block, table, report


def next_vit_conv_block(state: Mapping[str, Tensor]) -> tuple[Block, ConversionReport]:
    """Return Next-ViT's convolution block (NCB) that keeps size and width: multi-head convolution, and an MLP behind a batch norm.

    Args:
        state: official tensors by key.
    """
    filters = state["mhca.group_conv3x3.weight"]
    dim, heads = len(filters), len(filters) // filters.shape[1]
    mixers = (ConvConfig("mhca", heads=heads, norm="bn"), MLPConfig(hidden=len(state["mlp.conv1.weight"]), act="relu"))
    branches = [Branch(mixer.build(dim), dim, norm) for mixer, norm in zip(mixers, ("none", "bn"), strict=True)]
    return _fill(Block(branches, dim), NCB, state)


def next_vit_transformer_block(
    state: Mapping[str, Tensor], *, in_dim: int, head_dim: int, r: int = 1, stride: int = 1
) -> tuple[NextViTBlock, ConversionReport]:
    """Return Next-ViT's transformer block (NTB).

    Args:
        state: official tensors by key.
        in_dim: width of the tokens.
        head_dim: width of a head.
        r: keys are means of runs of r * r tokens.
        stride: 2 halves the sides of the grid.
    """
    dim, attention_dim, hidden = len(state["norm2.weight"]), len(state["norm1.weight"]), len(state["mlp.conv1.weight"])
    block = NextViTBlock(in_dim, dim, attention_dim=attention_dim, head_dim=head_dim, r=r, stride=stride, hidden=hidden)
    ours, report = NTB.to_ours(state, block.state_dict())
    block.load_state_dict(ours)
    return block.eval(), report


def cvt_block(state: Mapping[str, Tensor], *, heads: int, stride_kv: int = 2, act: str = "quick_gelu") -> tuple[Block, ConversionReport]:
    """Return CvT's block that keeps the width: attention behind convolutions or, for keys and values, means; an MLP.

    Args:
        state: official tensors by key.
        heads: of the attention.
        stride_kv: of what is in front of keys and values.
        act: of the MLP; official models have "quick_gelu".
    """
    hidden, dim = state["mlp.fc1.weight"].shape
    by_conv = "attn.conv_proj_k.conv.weight" in state
    kv = "q_conv=True, kv='conv', norm='bn'" if by_conv else "kv='avg'"
    bias = "attn.proj_q.bias" in state
    mixer = f"reduced(r={stride_kv}, {kv}, heads={heads}, qkv_bias={bias}, scale='dim')"
    return _fill(_one(f"{mixer} + mlp(hidden={hidden}, act={act!r})", dim), CVT, state)


def vir_block(state: Mapping[str, Tensor], *, heads: int, softmax: bool = False, chunk: int = 64) -> tuple[Block, ConversionReport]:
    """Return ViR's block: retention and an MLP, each with a learned factor per channel.

    Args:
        state: official tensors by key.
        heads: of the retention.
        softmax: as the upload trains, see `RetentionConfig`.
        chunk: tokens of a chunk.
    """
    hidden, dim = state["mlp.fc1.weight"].shape
    text = f"retention(heads={heads}, softmax={softmax}, chunk={chunk}) + mlp(hidden={hidden})"
    return _fill(_one(text, dim, eps=1e-6, layer_scale=1.0), VIR, state)


def mobile_vig_block(state: Mapping[str, Tensor], *, k: int = 2) -> tuple[Block, ConversionReport]:
    """Return MobileViG's pair: graph convolution and an MLP, all with batch norms.

    Args:
        state: official tensors by key.
        k: distance between neighbours.
    """
    hidden, dim = state["1.fc1.0.weight"].shape[:2]
    text = f"graph(K={k}, norm='bn') + bn_mlp(ratio={hidden / dim}, act='gelu', bias=True)"
    return _fill(_one(text, dim, norm="none"), VIG, state)


def efficient_mod_block(state: Mapping[str, Tensor], *, act: bool | None = None) -> tuple[Block, ConversionReport]:
    """Return EfficientMod's block of one branch.

    Args:
        state: official tensors by key.
        act: whether hidden units are activated; as published if None.
    """
    hidden, dim = state["mlp.fc1.weight"].shape
    filters = [value.shape[-1] for key, value in sorted(state.items()) if key.endswith("weight") and "context_list" in key]
    text = f"modulation(e={hidden // dim}, k={tuple(filters)}, act={act}, bias={'mlp.fc1.bias' in state})"
    return _fill(_one(text, dim, layer_scale=1e-4 if "gamma_1" in state else None), EFFICIENT_MOD, state)


def efficient_mod_attention(state: Mapping[str, Tensor], *, heads: int) -> tuple[Block, ConversionReport]:
    """Return EfficientMod's block of attention and MLP, whose heads are at least 32 wide.

    Args:
        state: official tensors by key.
        heads: of the attention.
    """
    hidden, dim = state["mlp.fc1.weight"].shape
    width = len(state["attn.qkv.weight"]) // (3 * heads)
    norm = "ln" if "attn.q_norm.weight" in state else "none"
    bias = "attn.qkv.bias" in state
    text = f"attention(heads={heads}, key_dim={width}, qkv_bias={bias}, qk_norm={norm!r}) + mlp(hidden={hidden})"
    return _fill(_one(text, dim, layer_scale=1.0 if "ls1.gamma" in state else None), EFFICIENT_MOD_ATTENTION, state)


def adaptformer_block(
    state: Mapping[str, Tensor], *, heads: int, mode: str = "parallel", scale: float | None = 0.1, norm: str = "none"
) -> tuple[Block, ConversionReport]:
    """Return AdaptFormer's block: attention and an MLP with an adapter.

    Args:
        state: official tensors by key.
        heads: of the attention.
        mode, scale, norm: of the adapter.
    """
    hidden, dim = state["fc1.weight"].shape
    block = _one(f"attention(heads={heads}) + mlp(hidden={hidden})", dim, eps=1e-6)
    add_adapters(block, len(state["adaptmlp.down_proj.weight"]), scale=scale, norm=norm, mode=mode)
    return _fill(block, ADAPTFORMER, state)


def resformer_block(state: Mapping[str, Tensor], *, heads: int) -> tuple[nn.ModuleDict, ConversionReport]:
    """Return ResFormer's `positions` and a `block` of attention with filtered values and an MLP.

    Args:
        state: official tensors by key.
        heads: of the attention.
    """
    hidden, dim = state["block.mlp.fc1.weight"].shape
    k = state["block.attn.get_v.weight"].shape[-1]
    block = _one(f"attention(heads={heads}, local_v_conv={k}) + mlp(hidden={hidden})", dim, eps=1e-6)
    parts = nn.ModuleDict({"positions": ConvPositions(dim), "block": block})
    ours, report = RESFORMER.to_ours(state, parts.state_dict())
    parts.load_state_dict(ours)
    return parts.eval(), report


def matformer_mlp(
    state: Mapping[str, Tensor], *, nested: Sequence[float], gated: bool | str = "product", act: str = "silu"
) -> tuple[MLP, ConversionReport]:
    """Return MatFormer's feed-forward mixer of nested widths.

    Args:
        state: official tensors by key.
        nested: the widths, as fractions.
        gated: "product" as the public reproduction has it, or True for silu(gate) * up.
        act: of the hidden units.
    """
    hidden, dim = state["up_proj.weight"].shape
    mlp = MLPConfig(hidden=hidden, act=act, gated=gated, bias=False, nested=tuple(nested)).build(dim)
    ours, report = MATFORMER.to_ours(state, mlp.state_dict())
    mlp.load_state_dict(ours)
    return mlp.eval(), report


def factorized_attention(state: Mapping[str, Tensor], *, heads: int, key_mult: int, scale: float) -> tuple[Branch, ConversionReport]:
    """Return IFactFormer's attention in three dimensions with the norm in front of it, without a residual.

    Args:
        state: official tensors by key.
        heads, key_mult, scale: see `AxialKernelConfig`.
    """
    dim, width = state["to_v.weight"].shape[1], len(state["to_v.weight"])
    mode = "parallel" if state["to_out.2.weight"].shape[1] == 3 * width else "chained"
    sizes = {"head_dim": width // heads, "latent": len(state["to_x.0.out_ffn.fn.net.3.weight"])}
    config = AxialKernelConfig("fhw", mode, key_mult=key_mult, heads=heads, scale=scale, **sizes)
    branch = Branch(config.build(dim), dim, residual="none")
    ours, report = FACTFORMER.to_ours(state, branch.state_dict())
    branch.load_state_dict(ours)
    return branch.eval(), report


def memory_layer(
    state: Mapping[str, Tensor], *, in_features: int, bits: int, score: str = "released"
) -> tuple[MemoryLayer, ConversionReport]:
    """Return MemoryFormer's layer.

    Args:
        state: official tensors by key.
        in_features: of the layer.
        bits: of a code.
        score: see `MemoryLayer`.
    """
    rows, out = state["tables"].shape
    layer = MemoryLayer(in_features, out, bits, tables=rows >> bits, projected="hash.projection.weight" in state, score=score)
    ours, report = MEMORY.to_ours(state, layer.state_dict())
    layer.load_state_dict(ours)
    return layer.eval(), report


def legendre_memory(state: Mapping[str, Tensor], *, theta: float) -> tuple[LegendreMemory, ConversionReport]:
    """Return LMUFormer's memory cell.

    Args:
        state: official tensors by key.
        theta: length of the window, in tokens.
    """
    out, width = state["W_h.weight"].shape
    dim = state["W_u.weight"].shape[1]
    cell = LegendreMemory(dim, LMUConfig(memory=width - dim, theta=theta), out)
    ours, report = LMU.to_ours(state, cell.state_dict())
    cell.load_state_dict(ours)
    return cell.eval(), report


def ecoformer_attention(state: Mapping[str, Tensor], *, compat: bool = True) -> tuple[HashAttention, ConversionReport]:
    """Return EcoFormer's attention on binary codes.

    Args:
        state: official tensors by key.
        compat: as released, see `LinearConfig`.
    """
    (heads, bits, anchors), dim = state["fast_attention.ksh.A"].shape, len(state["to_v.weight"])
    config = LinearConfig("hash", heads=heads, bits=bits, anchors=anchors, compat=compat)
    mixer = HashAttention(dim, config, heads)
    ours, report = ECOFORMER.to_ours(state, mixer.state_dict())
    mixer.load_state_dict(ours)
    return mixer.eval(), report


def _fca(sides: tuple[int, int]) -> KeyTable:
    """The table of FcaFormer's block on a grid."""
    return KeyTable("fcaformer", [
        Row(("qkv.{p}",), ("q.{p}", "kv.{p}"), split_qkv, joined),
        Row("proj.{p}", "proj.{p}"),
        Row("attention_biases", "bias_table.table", lambda flat: flat.unflatten(1, sides), lambda table: table.flatten(1)),
        Row("gamma_1", "gain"), Row("gamma_2", "mlp.layer_scale"),
        Row("s_scale_factors", "context_scale"), Row("s_token_bias", "context_bias"), Row("s_norm.{p}", "context_norm.{p}"),
        Row("dw_conv.weight", "summary.weight"),
        *_conv_norm("local_conv", "conv.f.filters", "conv.f.norm", is_linear=False),
        Row("norm1.{p}", "norm.{p}"), Row("norm2.{p}", "mlp.norm.0.{p}"), Row("mlp.norm.{p}", "mlp.norm.1.{p}"),
        *(Row(f"mlp.fc{i}.{{p}}", f"mlp.f.fc{i}.{{p}}") for i in (1, 2)),
    ])  # fmt: skip


def fca_block(state: Mapping[str, Tensor], *, heads: int, grid: tuple[int, int]) -> tuple[FcaBlock, KeyTable, ConversionReport]:
    """Return FcaFormer's block and the names of its weights.

    Args:
        state: official tensors by key.
        heads: of the attention.
        grid: (h, w) that the block is made for.
    """
    hidden, dim = state["mlp.fc1.weight"].shape
    summaries = state["s_scale_factors"].shape[1] if "s_scale_factors" in state else 0
    block = FcaBlock(dim, heads, grid, summaries, hidden, "dw_conv.weight" in state)
    table = _fca(grid)
    ours, report = table.to_ours(state, block.state_dict())
    block.load_state_dict(ours)
    return block.eval(), table, report


def flatformer_block(
    state: Mapping[str, Tensor],
    *,
    heads: int,
    group_size: int,
    window: tuple[float, float],
    pos_scale: tuple[float, float] = (1, 1),
    act: str = "gelu",
) -> tuple[nn.ModuleList, ConversionReport]:
    """Return FlatFormer's four blocks: groups along x and y, each also with windows that begin half a window earlier, and an MLP each.

    Args:
        state: official tensors by key.
        heads, group_size, window: of the groups; coordinates are (x, y).
        pos_scale: of the coordinates in the sines.
        act: of the MLPs.
    """
    hidden, dim = state["block.0.fc1.weight"].shape
    group = f"group(heads={heads}, size={group_size}, order='snake', window={tuple(window)}, pos='sincos', pos_scale={tuple(pos_scale)}"
    layers = [f"{group}, axis={axis}, shift={shift}) + mlp(hidden={hidden}, act={act!r})" for axis in (0, 1) for shift in (False, True)]
    blocks = stack.build(", ".join(layers), dim, residual="post")
    ours, report = FLATFORMER.to_ours(state, blocks.state_dict())
    blocks.load_state_dict(ours)
    return blocks.eval(), report
