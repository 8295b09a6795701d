"""Runners of the golden cases of efficient blocks: outputs, inner tensors, gradients, batch statistics."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks import integer
from genkit.blocks.embeddings import point_sincos
from genkit.blocks.folding import fold_batch_norms
from genkit.blocks.group import group_places
from genkit.blocks.heads import split_heads
from genkit.blocks.layout import Layout
from genkit.blocks.retention import Retention, decays
from genkit.convert import _blocks
from genkit.convert.base import KeyTable
from genkit.parity.base import Case, keep

LAYERS = ("x", "x_shift", "y", "y_shift")
SUBMODELS = ("s", "m", "l", "xl")


def _gradients(module: nn.Module, table: KeyTable) -> dict[str, Tensor]:
    """Return the gradients of a module under the official names of its weights."""
    shadow = copy.deepcopy(module)
    with torch.no_grad():
        for mine, theirs in zip(shadow.parameters(), module.parameters(), strict=True):
            mine.copy_(torch.zeros_like(mine) if theirs.grad is None else theirs.grad)
    return {f"grad.{key}": value for key, value in table.to_official(shadow.state_dict()).items()}


def _run(
    case: Case, block: Any, table: KeyTable, x: Tensor, layout: Layout | None, watched: Mapping[str, nn.Module], *, grad: Tensor
) -> dict[str, Tensor]:
    """Return what block cases store, of tokens x [b, n, d] and the gradient [b, n, d] of the result.

    Args:
        case: tells which tensors are stored.
        block: the block in evaluation mode.
        table: official names of its weights.
        x: the tokens.
        layout: of the tokens.
        watched: modules by official name, whose results are kept.
        grad: what the sum of the result is weighed with for gradients.
    """
    results: dict[str, Tensor] = {}
    block = block.to(case.device).requires_grad_(True)
    start = copy.deepcopy(block)
    hooks = [module.register_forward_hook(keep(results, f"mid.{name}")) for name, module in watched.items()]
    x = x.detach().requires_grad_(True)
    results["out"] = block(x, layout=layout)
    for hook in hooks:
        hook.remove()
    (results["out"] * grad).sum().backward()
    results |= _gradients(block, table) | {"grad_in.x": cast(Tensor, x.grad)}
    if "fused_out" in case.output_names:
        results["fused_out"] = fold_batch_norms(start)(x, layout=layout)
    if "train_out" in case.output_names:
        results["train_out"] = start.train()(x, layout=layout)
        results |= {f"train_buf.{key}": value for key, value in table.to_official(start.state_dict()).items()}
    return results


def _on_maps(case: Case, block: Any, table: KeyTable, watched: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Run a block whose tensors are stored as maps [b, d, h, w]."""
    x, grad = case.inputs["x"], case.inputs["grad_out"]
    grid = (x.shape[2], x.shape[3])
    results = _run(case, block, table, _tokens(x), Layout(grid=grid), watched, grad=_tokens(grad))
    as_map = {name: value.transpose(1, 2).unflatten(2, grid) for name, value in results.items() if value.ndim == 3}
    return _stored(case, results | as_map)


def _tokens(x: Tensor) -> Tensor:
    """[b, d, h, w] -> [b, h * w, d]."""
    return x.flatten(2).transpose(1, 2)


def _stored(case: Case, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave what the case stores."""
    return {name: value for name, value in results.items() if not case.output_names or name in case.output_names}


def cga_block(case: Case) -> dict[str, Tensor]:
    """Kind efficient_blocks/cga_block: EfficientViT."""
    config, x = case.config, case.inputs["x"]
    window = min(config["window_resolution"], config["resolution"])
    block, table, _ = _blocks.efficient_vit_block(case.weights(), key_dim=config["kd"], window=window)
    branches = cast(Sequence[Any], block.branches)
    mixer = branches[2].f
    inner: dict[str, Tensor] = {}
    watched = {"": mixer.proj_norm}
    for i, head in enumerate(mixer.heads):
        watched |= {f"qkvs.{i}": head.qkv_norm, f"dws.{i}": head.norm}
    hooks = [module.register_forward_hook(keep(inner, f"mid.mixer.m.attn.{name}".rstrip("."))) for name, module in watched.items()]
    block(_tokens(x), layout=Layout(grid=(x.shape[2], x.shape[3])))
    for hook in hooks:
        hook.remove()
    folded = {name: value.transpose(1, 2).unflatten(2, (window, window)) for name, value in inner.items()}
    outer = dict(zip(("dw0", "ffn0", "mixer", "dw1", "ffn1"), branches, strict=True))
    return _on_maps(case, block, table, outer) | _stored(case, folded)


def shsa_block(case: Case) -> dict[str, Tensor]:
    """Kind efficient_blocks/shsa_block: SHViT."""
    block, _ = _blocks.shvit_block(case.weights(), qk_dim=case.config["qk_dim"])
    branches = cast(Sequence[Any], block.branches)
    if len(branches) == 2:
        return _on_maps(case, block, _blocks.SHVIT_EARLY, {"conv": branches[0], "ffn": branches[1]})
    watched = {"conv": branches[0], "mixer": branches[1], "ffn": branches[2], "mixer.m.qkv": branches[1].f.qkv_norm}
    results: dict[str, Tensor] = {}
    hook = branches[1].f.norm.register_forward_hook(keep(results, "mid.mixer.m.pre_norm"))
    x = case.inputs["x"]
    block(_tokens(x), layout=Layout(grid=tuple(x.shape[2:])))
    hook.remove()
    normed = results["mid.mixer.m.pre_norm"].unflatten(2, x.shape[2:])
    return _on_maps(case, block, _blocks.SHVIT, watched) | _stored(case, {"mid.mixer.m.pre_norm": normed})


def efficientformer_meta4d(case: Case) -> dict[str, Tensor]:
    """Kind efficient_blocks/efficientformer_meta4d: EfficientFormer on maps."""
    block, _ = _blocks.efficientformer_map_block(case.weights(), pool_size=case.config["pool_size"])
    branches = cast(Sequence[Any], block.branches)
    return _on_maps(case, block, _blocks.META4D, {"token_mixer": branches[0].f, "mlp": branches[1].f})


def efficientformer_meta3d(case: Case) -> dict[str, Tensor]:
    """Kind efficient_blocks/efficientformer_meta3d: EfficientFormer on tokens."""
    options, x = case.config["attention"], case.inputs["x"]
    heads, side = options["num_heads"], options["resolution"]
    block, table, _ = _blocks.efficientformer_token_block(case.weights(), heads=heads, key_dim=options["key_dim"], resolution=side)
    mixer, mlp = (branch.f for branch in cast(Sequence[Any], block.branches))
    parts: dict[str, Tensor] = {}
    hooks = [getattr(mixer, name).register_forward_hook(keep(parts, name)) for name in ("q", "kv")]
    layout = Layout(grid=(side, side))
    results = _run(case, block, table, x, layout, {"token_mixer": mixer, "mlp": mlp}, grad=case.inputs["grad_out"])
    for hook in hooks:
        hook.remove()
    k, v = parts["kv"].split([parts["q"].shape[2], parts["kv"].shape[2] - parts["q"].shape[2]], dim=2)
    by_head = [part.unflatten(2, (heads, -1)) for part in (parts["q"], k, v)]
    results["mid.token_mixer.qkv"] = torch.cat(by_head, dim=3).flatten(2)
    results["bias_full"] = mixer.bias_table((side, side))[0]
    return _stored(case, results)


def tinyvit_block(case: Case) -> dict[str, Tensor]:
    """Kind efficient_blocks/tinyvit_block: TinyViT."""
    config = case.config
    block, table, _ = _blocks.tiny_vit_block(case.weights(), heads=config["num_heads"], window_size=config["window_size"])
    window, conv, mlp = (branch.f for branch in cast(Sequence[Any], block.branches))
    grid = tuple(config["input_resolution"])
    watched = {"attn": window.attention, "local_conv": conv, "mlp": mlp}
    results = _run(case, block, table, case.inputs["x"], Layout(grid=grid), watched, grad=case.inputs["grad_out"])
    results["mid.local_conv"] = results["mid.local_conv"].transpose(1, 2).unflatten(2, grid)
    return _stored(case, results)


def nextvit_ncb(case: Case) -> dict[str, Tensor]:
    """Kind efficient_blocks/nextvit_ncb: Next-ViT's convolution block of equal size and width."""
    block, _ = _blocks.next_vit_conv_block(case.weights())
    branches = cast(Sequence[Any], block.branches)
    results = _on_maps(case, block, _blocks.NCB, {"mhca": branches[0].f, "mlp": branches[1].f})
    return results | _stored(case, {"mid.patch_embed": case.inputs["x"]})


def nextvit_ntb(case: Case) -> dict[str, Tensor]:
    """Kind efficient_blocks/nextvit_ntb: Next-ViT's transformer block."""
    config, x = case.config, case.inputs["x"]
    sizes = {name: config[name] for name in ("head_dim", "stride")}
    block, _ = _blocks.next_vit_transformer_block(case.weights(), in_dim=config["in_channels"], r=config["sr_ratio"], **sizes)
    attention, grid = cast(Any, block.attention.f), (math.ceil(x.shape[2] / config["stride"]), math.ceil(x.shape[3] / config["stride"]))
    pooled: dict[str, Tensor] = {}
    watched = {"e_mhsa": attention, "mhca": block.conv.f, "mlp": block.mlp.f}
    hooks = [block.embed.register_forward_hook(lambda module, args, output: pooled.update({"mid.patch_embed": output[0]}))]
    if config["sr_ratio"] > 1:
        hooks.append(attention.norm.register_forward_hook(lambda module, args, output: pooled.update({"mid.e_mhsa.sr": args[0]})))
    with torch.no_grad():
        block(_tokens(x), layout=Layout(grid=(x.shape[2], x.shape[3])))
    for hook in hooks:
        hook.remove()
    layout = Layout(grid=(x.shape[2], x.shape[3]))
    results = _run(case, block, _blocks.NTB, _tokens(x), layout, watched, grad=_tokens(case.inputs["grad_out"])) | pooled
    sides = {name: grid for name, value in results.items() if value.ndim == 3 and "e_mhsa" not in name} | {"grad_in.x": x.shape[2:]}
    maps = {name: results[name].transpose(1, 2).unflatten(2, side) for name, side in sides.items()}
    if "mid.e_mhsa.sr" in pooled:
        maps["mid.e_mhsa.sr"] = pooled["mid.e_mhsa.sr"].transpose(1, 2)
    return _stored(case, results | maps)


def svga_block(case: Case) -> dict[str, Tensor]:
    """Kind efficient_blocks/svga_block: MobileViG."""
    block, _ = _blocks.mobile_vig_block(case.weights(), k=case.config["K"])
    branches = cast(Sequence[Any], block.branches)
    mixer = branches[0].f
    results: dict[str, Tensor] = {}
    hook = mixer.edges_norm.register_forward_hook(keep(results, "edges"))
    x = case.inputs["x"]
    block(_tokens(x), layout=Layout(grid=tuple(x.shape[2:])))
    hook.remove()
    edges = F.gelu(results["edges"]).transpose(1, 2).unflatten(2, x.shape[2:])
    return _on_maps(case, block, _blocks.VIG, {"0": branches[0], "0.fc1": mixer.norm1}) | _stored(case, {"mid.0.graph_conv": edges})


def efficientmod_block(case: Case) -> dict[str, Tensor]:
    """Kind efficient_blocks/efficientmod_block: EfficientMod's modulation."""
    config = case.config
    block, _ = _blocks.efficient_mod_block(case.weights(), act=config["mlp_ratio"] > 1 or config["conv_group_dim"] > 1)
    mixer = cast(Any, block.branches[0]).f
    watched = {"mlp": mixer, "mlp.context_layer": mixer.g, "mlp.fc1": mixer.fc1}
    return _channels_last(case, block, _blocks.EFFICIENT_MOD, watched)


def efficientmod_attention(case: Case) -> dict[str, Tensor]:
    """Kind efficient_blocks/efficientmod_attention: EfficientMod's attention."""
    block, _ = _blocks.efficient_mod_attention(case.weights(), heads=case.config["num_heads"])
    branches = cast(Sequence[Any], block.branches)
    return _channels_last(case, block, _blocks.EFFICIENT_MOD_ATTENTION, {"attn": branches[0].f, "mlp": branches[1].f})


def _channels_last(case: Case, block: Any, table: KeyTable, watched: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Run a block whose tensors are stored as maps [b, h, w, d]."""
    x, grad = case.inputs["x"], case.inputs["grad_out"]
    grid = (x.shape[1], x.shape[2])
    results = _run(case, block, table, x.flatten(1, 2), Layout(grid=grid), watched, grad=grad.flatten(1, 2))
    maps = {name for name, shape in case.output_shapes.items() if len(shape) == 4}
    return _stored(case, {name: value.unflatten(1, grid) if name in maps and value.ndim == 3 else value for name, value in results.items()})


def adaptformer(case: Case) -> dict[str, Tensor]:
    """Kind efficient_blocks/adaptformer: AdaptFormer."""
    config = case.config
    text = config["ffn_adapter_scalar"]
    scale = None if text == "learnable_scalar" else float(text)
    mode, norm = config["ffn_option"], config["ffn_adapter_layernorm_option"]
    block, _ = _blocks.adaptformer_block(case.weights(), heads=config["num_heads"], mode=mode, scale=scale, norm=norm)
    first, second = cast(Sequence[Any], block.branches)
    watched = {"attn": first.f, "fc2": second.f, "adaptmlp": second.adapter}
    results = _run(case, block, _blocks.ADAPTFORMER, case.inputs["x"], None, watched, grad=case.inputs["grad_out"])
    if mode == "sequential":  # there the official module adds its residual itself
        results["mid.adaptmlp"] = results["mid.adaptmlp"] + results["mid.fc2"]
    return _stored(case, results)


def resformer_block(case: Case) -> dict[str, Tensor]:
    """Kind efficient_blocks/resformer_block: ResFormer's positions and block."""
    side, grad = case.config["grid"], case.inputs["grad_out"]
    parts, _ = _blocks.resformer_block(case.weights(), heads=case.config["num_heads"])
    parts = parts.to(case.device).requires_grad_(True)
    x = case.inputs["x"].detach().requires_grad_(True)
    placed = x + F.pad(parts["positions"]((side, side)), (0, 0, 1, 0))
    results: dict[str, Tensor] = {"after_pos_embed": placed}
    hook = cast(Any, parts["block"]).branches[0].f.register_forward_hook(keep(results, "mid.block.attn"))
    results["out"] = parts["block"](placed, layout=Layout(grid=(side, side), prefix=1))
    hook.remove()
    (results["out"] * grad).sum().backward()
    return _stored(case, results | _gradients(parts, _blocks.RESFORMER) | {"grad_in.x": cast(Tensor, x.grad)})


def cvt_block(case: Case) -> dict[str, Tensor]:
    """Kind efficient_blocks/cvt_block: CvT with convolutions or means in front of its projections."""
    config = case.config
    act = "quick_gelu" if config["quick_gelu"] else "gelu"
    block, _ = _blocks.cvt_block(case.weights(), heads=config["num_heads"], stride_kv=config["stride_kv"], act=act)
    mixer, mlp = (branch.f for branch in cast(Sequence[Any], block.branches))
    watched = {"attn": mixer, "mlp": mlp}
    if mixer.q_conv is not None:
        watched |= {f"attn.conv_proj_{c}": getattr(mixer, f"{c}_conv") for c in "qkv"}
    else:
        watched["attn.conv_proj_k"] = mixer.norm
    layout = Layout(grid=(config["h"], config["w"]), prefix=int(config["with_cls_token"]))
    return _stored(case, _run(case, block, _blocks.CVT, case.inputs["x"], layout, watched, grad=case.inputs["grad_out"]))


def retention(case: Case) -> dict[str, Tensor]:
    """Kind efficient_blocks/retention: ViR's block as its upload trains, and retention proper in its three forms."""
    x, heads = case.inputs["x"], case.config["num_heads"]
    trained, _ = _blocks.vir_block(case.weights(), heads=heads, softmax=True)
    results = _run(case, trained, _blocks.VIR, x, None, {}, grad=case.inputs["grad_out"])
    block, _ = _blocks.vir_block(case.weights(), heads=heads, chunk=case.config["chunk"])
    mixer = cast(Retention, cast(Any, block.branches[0]).f)
    b, n, _ = x.shape
    with torch.no_grad():
        results["softmax_parallel"] = cast(Any, trained.branches[0]).f(x)
        results["linear_parallel"] = mixer(x)
        whole, one, blocks = (
            owner.new_cache(b, n, device=x.device, dtype=x.dtype) for owner in cast(Any, (mixer, mixer, block))
        )  # fmt: skip
        results["chunkwise"], results["chunkwise_state"] = mixer(x, cache=whole), whole["state"]
        results["recurrent"] = torch.cat([mixer(token, cache=one) for token in x.split(1, dim=1)], dim=1)
        results["recurrent_state"] = one["state"]
        results["block_recurrent"] = torch.cat([block(token, cache=blocks) for token in x.split(1, dim=1)], dim=1)
    distance = torch.arange(n)[:, None] - torch.arange(n)
    results["gammas"] = decays(heads)
    results["mask"] = torch.where(distance >= 0, decays(heads).view(-1, 1, 1) ** distance.clamp(min=0), 0.0)
    return _stored(case, results)


def matformer_ffn(case: Case) -> dict[str, Tensor]:
    """Kind efficient_blocks/matformer_ffn: every nested width of the reproduction, of the gated form and of the plain one."""
    nested, weights = case.config["scale_factors"], case.weights()
    x, grad = case.inputs["x"], case.inputs["grad_out"]
    results: dict[str, Tensor] = {}
    released, conventional = (_blocks.matformer_mlp(weights, nested=nested, gated=gated)[0] for gated in ("product", True))
    plain_weights = {key: value for key, value in weights.items() if not key.startswith("gate_proj")}
    plain, _ = _blocks.matformer_mlp(plain_weights, nested=nested, gated=False, act="gelu")
    for name, width in zip(SUBMODELS, nested, strict=True):
        released.zero_grad()
        mine = x.detach().requires_grad_(True)
        out = released(mine, width=width)
        (out * grad).sum().backward()
        results |= {f"{name}.out": out, f"{name}.grad_in.x": cast(Tensor, mine.grad)}
        results |= {f"{name}.{key}": value for key, value in _gradients(released, _blocks.MATFORMER).items()}
        results |= {f"{name}.out_swiglu": conventional(x, width=width), f"{name}.out_gelu_mlp": plain(x, width=width)}
    return _stored(case, results)


def ecoformer_attention(case: Case) -> dict[str, Tensor]:
    """Kind efficient_blocks/ecoformer_attention: as released, and the fitting of its hash function."""
    mixer, _ = _blocks.ecoformer_attention(case.weights())
    mixer = mixer.to(case.device).requires_grad_(True)
    fitted, results = copy.deepcopy(mixer), dict[str, Tensor]()
    hooks = [mixer.hash.register_forward_hook(keep(results, "code"))]
    hooks.append(mixer.proj.register_forward_hook(lambda module, args, output: results.update(heads=args[0])))
    x = case.inputs["x"].detach().requires_grad_(True)
    results["out"] = mixer(x)
    for hook in hooks:
        hook.remove()
    (results["out"] * case.inputs["grad_out"]).sum().backward()
    results["mid.fast_attention"] = split_heads(results.pop("heads"), mixer.heads)
    results |= _gradients(mixer, _blocks.ECOFORMER) | {"grad_in.x": cast(Tensor, x.grad)}
    with torch.no_grad():
        results["train.similarity"] = fitted.fit_hash(x, case.inputs["anchor_tokens"], case.config["topk"])
        results["train.code"] = fitted.hash(fitted.queries(x))
    parts = {"A": fitted.hash.weight, "anchor": fitted.hash.anchors, "mvec": fitted.hash.mean}
    return _stored(case, results | {f"train.{name}": value for name, value in parts.items()})


def factorized_attention3d(case: Case) -> dict[str, Tensor]:
    """Kind efficient_blocks/factorized_attention3d: IFactFormer, on a grid with coordinates of its own."""
    config, grid = case.config, tuple(case.config["grid"])
    sizes = {"heads": config["heads"], "key_mult": config["kernel_multiplier"], "scale": config["scaling_factor"]}
    branch, _ = _blocks.factorized_attention(case.weights(), **sizes)
    pos = torch.stack(torch.meshgrid(*(case.inputs[f"pos_{axis}"].flatten() for axis in _blocks.AXES), indexing="ij"), dim=-1)
    layout = Layout(grid=grid, pos=pos.flatten(0, 2)[None])
    x, grad = (case.inputs[name].flatten(1, 3) for name in ("x", "grad_out"))
    results = _run(case, branch, _blocks.FACTFORMER, x, layout, {}, grad=grad)
    return _stored(case, results | {name: results[name].unflatten(1, grid) for name in ("out", "grad_in.x")})


def memory_layer(case: Case) -> dict[str, Tensor]:
    """Kind efficient_blocks/memory_layer: as released, and the paper's score."""
    config, weights = case.config, case.weights()
    sizes = {"in_features": config["hidden_size"], "bits": config["code_length"]}
    layer, _ = _blocks.memory_layer(weights, **sizes)
    layer = layer.to(case.device).requires_grad_(True)
    x = case.inputs["x"].detach().requires_grad_(True)
    out = layer(x)
    (out * case.inputs["grad_out"]).sum().backward()
    codes, score = layer.codes(x)
    _, paper = _blocks.memory_layer(weights, **sizes, score="paper")[0].to(case.device).codes(x)
    results = {"out": out, "code": codes.flatten(0, 1).int(), "score": score.flatten(0, 1), "score_paper": paper.flatten(0, 1)}
    return _stored(case, results | _gradients(layer, _blocks.MEMORY) | {"grad_in.x": cast(Tensor, x.grad)})


def lmu_cell(case: Case) -> dict[str, Tensor]:
    """Kind efficient_blocks/lmu_cell: LMUFormer's memory as a convolution and step by step."""
    cell, _ = _blocks.legendre_memory(case.weights(), theta=case.config["theta"])
    x = case.inputs["x"]
    results = _run(case, cell, _blocks.LMU, x, None, {}, grad=case.inputs["grad_out"])
    with torch.no_grad():
        cache = cell.new_cache(len(x), x.shape[1], device=x.device, dtype=x.dtype)
        results["recurrent"] = torch.cat([cell(token, cache=cache) for token in x.split(1, dim=1)], dim=1)
    return _stored(case, results | {"recurrent_state": cache["state"]})


def ivit_ops(case: Case) -> dict[str, Tensor]:
    """Kind efficient_blocks/ivit_ops: the integer modules of I-ViT, and what they stand for."""
    config, weights, x = case.config, case.weights(), case.inputs["x"]
    act_scale = integer.scale_of(x.amin(), x.amax(), config["act_bits"])
    act = integer.quantised(x, act_scale, config["act_bits"])
    weight, bias = weights["linear.weight"], weights["linear.bias"]
    rows = weight.abs().amax(1, keepdim=True) / 127
    scale = rows[:, 0] * act_scale
    whole, offset = (weight / rows).round().clamp(-128, 127), (bias / scale).round()
    out = F.linear(act / act_scale, whole, offset) * scale
    norm = integer.integer_layer_norm(act, act_scale, weights["layernorm.weight"], weights["layernorm.bias"])
    gelu = integer.shift_gelu(act, act_scale[None])
    logits = case.inputs["logits"]
    logit_scale = integer.scale_of(logits.amin(), logits.amax(), 8)[None]
    given = integer.quantised(logits, logit_scale, 8)
    softmax = integer.shiftmax(given, logit_scale, config["softmax_bits"])
    again = integer.requantised([(out, scale), (act[..., : config["out"]], act_scale)])
    results = {
        "act.out": act, "act.scale": act_scale, "linear.weight_integer": whole, "linear.bias_integer": offset, "linear.out": out,
        "linear.scale": scale, "softmax.in": given, "softmax.in_scale": logit_scale,
        "gelu.float": F.gelu(act), "softmax.float": given.softmax(-1),
        "layernorm.float": F.layer_norm(act, act.shape[-1:], weights["layernorm.weight"], weights["layernorm.bias"]),
    }  # fmt: skip
    for name, (value, unit) in {"layernorm": norm, "gelu": gelu, "softmax": softmax, "requant": again}.items():
        results |= {f"{name}.out": value, f"{name}.scale": unit}
    return _stored(case, results)


def fca_block(case: Case) -> dict[str, Tensor]:
    """Kind efficient_blocks/fca_block: FcaFormer, with summaries of earlier blocks from the second of a stage on."""
    config = case.config
    h, w = config["input_resolution"]
    block, table, _ = _blocks.fca_block(case.weights(), heads=config["num_heads"], grid=(h, w))
    block = block.to(case.device).requires_grad_(True)
    start, results = copy.deepcopy(block), dict[str, Tensor]()
    given = {name: case.inputs[name].detach().requires_grad_(True) for name in ("x", "s") if name in case.inputs}
    hooks = [part.register_forward_hook(keep(results, f"mid.{name}")) for name, part in (("local_conv", block.conv), ("mlp", block.mlp.f))]
    results["out"], summary = block(given["x"], given.get("s"))
    for hook in hooks:
        hook.remove()
    (results["out"] * case.inputs["grad_out"]).sum().backward()
    results |= _gradients(block, table) | {f"grad_in.{name}": cast(Tensor, value.grad) for name, value in given.items()}
    if summary is not None:
        results["cross_tokens"] = summary
    results["mid.local_conv"] = results["mid.local_conv"].transpose(1, 2).unflatten(2, (h, w))
    results["train_out"] = start.train()(given["x"], given.get("s"))[0]
    results |= {f"train_buf.{key}": value for key, value in table.to_official(start.state_dict()).items()}
    return _stored(case, results)


def flatformer_block(case: Case) -> dict[str, Tensor]:
    """Kind efficient_blocks/flatformer_block: four layers of groups on samples of different sizes, one after the other."""
    config = case.config
    sides, window = config["sparse_shape"][:2], tuple(config["window_shape"][:2])
    scale = tuple(2 * 3.1415 / side for side in sides) if config["normalize_pos"] else (1, 1)
    sizes = {"heads": config["num_heads"], "group_size": config["group_size"], "act": config["activation"]}
    blocks, _ = _blocks.flatformer_block(case.weights(), window=window, pos_scale=scale, **sizes)
    blocks = blocks.to(case.device).requires_grad_(True)
    x, coords = case.inputs["x"].detach().requires_grad_(True), case.inputs["coords"]
    _, counts = torch.unique_consecutive(coords[:, 0], return_counts=True)
    found: dict[str, list[Tensor]] = {}
    first = windows = 0
    for rows, places in zip(x.split(counts.tolist()), coords.split(counts.tolist()), strict=True):
        layout, tokens = Layout(pos=places[None, :, [3, 2]].float()), rows[None]
        groups = group_places(len(rows), config["group_size"], x.device)
        kept: dict[str, Tensor] = {
            "map.flat2win": groups.flatten() + first,
            "map.win2flat": torch.arange(len(rows), device=x.device) + windows,
        }
        for i, block in enumerate(cast(Sequence[Any], blocks)):
            attention, mlp = block.branches
            order = attention.f.order(layout, len(rows), x.device)
            kept[f"map.{LAYERS[i]}"] = order[0] + first
            inside = tokens[0][order[0][groups]]
            kept[f"mid.block.{i}"] = mlp(attention.norm(inside + attention.f.in_groups(tokens, order, layout)[0])).flatten(0, 1)
            tokens = block(tokens, layout=layout)
        scaled = places[:, [3, 2]].float() * torch.tensor(scale, device=x.device)
        kept |= {"out": tokens[0], "pe": point_sincos(scaled, x.shape[1])}
        for name, part in kept.items():
            found.setdefault(name, []).append(part)
        first, windows = first + len(rows), windows + groups.numel()
    results = {name: torch.cat(parts) for name, parts in found.items()}
    (results["out"] * case.inputs["grad_out"]).sum().backward()
    return _stored(case, results | _gradients(blocks, _blocks.FLATFORMER) | {"grad_in.x": cast(Tensor, x.grad)})
