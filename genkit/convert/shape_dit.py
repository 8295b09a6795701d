"""Hunyuan3D-2: the official shape transformers, base, mini, multi-view, fast and turbo.

Files of the whole generator hold it under `model.`, training checkpoints under `_forward_module.` and `model.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from genkit import convert
from genkit.convert import dinov2, flashvdm
from genkit.convert.base import ConversionReport, KeyTable, OfficialModel, Row, build_empty, fill
from genkit.generators.shape_dit import ShapeDiT
from genkit.schedulers.flow_matching import FlowMatchingScheduler
from genkit.weights import checkpoint_shapes

COMPONENT, PIPELINE = "transformer", "ShapePipeline"
FILES = ("model.fp16.safetensors", "model.fp16.ckpt")
WRAPPERS = ("model", "state_dict")
WHOLE = True
HEADS = 16  # of every released file
RESTRICTED = "Tencent Hunyuan community (restricted)"
NOTE = "not for the EU, the UK and South Korea"
OFFICIAL = tuple(
    OfficialModel(name=name, source=source, files=FILES, licence=RESTRICTED, parameters=parameters, memory_gb=memory, note=NOTE)
    for name, source, parameters, memory in (
        ("hunyuan3d-dit-v2-0", "tencent/Hunyuan3D-2", 1_113_274_432, 4.6),
        ("hunyuan3d-dit-v2-0-turbo", "tencent/Hunyuan3D-2", 1_114_587_200, 4.6),
        ("hunyuan3d-dit-v2-mini", "tencent/Hunyuan3D-2mini", 559_196_224, 2.4),
        ("hunyuan3d-dit-v2-mini-turbo", "tencent/Hunyuan3D-2mini", 560_508_992, 2.4),
        ("hunyuan3d-dit-v2-mv", "tencent/Hunyuan3D-2mv", 1_113_274_432, 4.6),
    )
)


def _stream(official: str, ours: str) -> list[Row]:
    """Return the rows of one stream."""
    return [
        Row(f"double_blocks.{{i}}.{official}_mod.lin.{{p}}", f"blocks.{{i}}.{ours}.modulation.linear.{{p}}"),
        Row(f"double_blocks.{{i}}.{official}_attn.qkv.{{p}}", f"blocks.{{i}}.{ours}.qkv.{{p}}"),
        Row(f"double_blocks.{{i}}.{official}_attn.norm.query_norm.scale", f"blocks.{{i}}.{ours}.q_norm.weight"),
        Row(f"double_blocks.{{i}}.{official}_attn.norm.key_norm.scale", f"blocks.{{i}}.{ours}.k_norm.weight"),
        Row(f"double_blocks.{{i}}.{official}_attn.proj.{{p}}", f"blocks.{{i}}.{ours}.proj.{{p}}"),
        Row(f"double_blocks.{{i}}.{official}_mlp.0.{{p}}", f"blocks.{{i}}.{ours}.mlp.fc1.{{p}}"),
        Row(f"double_blocks.{{i}}.{official}_mlp.2.{{p}}", f"blocks.{{i}}.{ours}.mlp.fc2.{{p}}"),
    ]


TABLE = KeyTable(
    "shape_dit",
    [
        Row("latent_in.{p}", "latent_in.{p}"),
        Row("cond_in.{p}", "context_in.{p}"),
        *(Row(f"{name}.{official}.{{p}}", f"{name}.{ours}.{{p}}") for name in ("time_in", "guidance_in") for official, ours in (
            ("in_layer", "fc1"), ("out_layer", "fc2"),
        )),
        *_stream("img", "latent"),
        *_stream("txt", "context"),
        Row("single_blocks.{i}.modulation.lin.{p}", "single_blocks.{i}.modulation.linear.{p}"),
        Row("single_blocks.{i}.linear1.{p}", "single_blocks.{i}.fused_in.{p}"),
        Row("single_blocks.{i}.linear2.{p}", "single_blocks.{i}.fused_out.{p}"),
        Row("single_blocks.{i}.norm.query_norm.scale", "single_blocks.{i}.q_norm.weight"),
        Row("single_blocks.{i}.norm.key_norm.scale", "single_blocks.{i}.k_norm.weight"),
        Row("final_layer.adaLN_modulation.1.{p}", "modulation.linear.{p}"),
        Row("final_layer.linear.{p}", "head.{p}"),
    ],
)  # fmt: skip


def options(file: Path) -> dict[str, Any]:
    """Return what config.yaml tells of the transformer."""
    names = {"num_heads": "num_heads", "time_factor": "max_period"}
    return {names[name]: value for name, value in flashvdm.settings(file, "model").items() if name in names}


def companions(file: Path) -> dict[str, Any]:
    """Return VAE, image encoder, scheduler and settings that lie in the file of a whole generator, or beside it.

    Steps and guidance are those of the released examples.
    """
    shapes = checkpoint_shapes(file)
    found: dict[str, Any] = {}
    if flashvdm.recognise(shapes):
        found["vae"] = convert.load("flashvdm", file)
    if dinov2.recognise(shapes):
        found["image_encoder"] = convert.load("dinov2", file)
        found["condition_size"] = flashvdm.settings(file, "image_processor").get("size", 512)
    told = flashvdm.settings(file, "scheduler")
    distilled = "guidance_in.in_layer.weight" in _own(shapes)
    if "pcm_timesteps" in told or "turbo" in str(file.parent.name):
        found["scheduler"] = FlowMatchingScheduler(steps="consistency", phases=told.get("pcm_timesteps", 100))
    else:
        names = ("num_train_timesteps", "shift", "use_dynamic_shifting")
        found["scheduler"] = FlowMatchingScheduler(**{name: told[name] for name in names if name in told})
    return {**found, "num_inference_steps": 5 if distilled and found["scheduler"].config["steps"] == "consistency" else 50}


def _own(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the transformer's entries of a file, without prefix."""
    bare = {key.removeprefix("_forward_module."): value for key, value in state.items()}
    if any(key.startswith("model.") for key in bare):
        return {key.removeprefix("model."): value for key, value in bare.items() if key.startswith("model.")}
    return bare


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether keys are those of a shape transformer, or of a generator with one."""
    return {"latent_in.weight", "cond_in.weight", "single_blocks.0.linear1.weight", "final_layer.linear.weight"} <= _own(shapes).keys()


def from_official(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, max_period: float = 1000.0
) -> tuple[ShapeDiT, ConversionReport]:
    """Build the transformer of an official state dict; sizes come from shapes.

    Args:
        state: official tensors by key.
        num_heads: from the width of the query norms if None.
        max_period: `time_factor` of its config.yaml.

    Returns:
        The transformer in fp32 eval mode and the report.

    Raises:
        ValueError: if keys or shapes do not fit.
    """
    own = _own(state)
    width, channels = own["latent_in.weight"].shape
    head_width = own["single_blocks.0.norm.query_norm.scale"].shape[0]

    def count(name: str) -> int:
        return 1 + max((int(match[1]) for key in own if (match := re.match(rf"{name}\.(\d+)\.", key))), default=-1)

    model = build_empty(
        ShapeDiT,
        in_channels=channels,
        context_in_dim=own["cond_in.weight"].shape[1],
        hidden_size=width,
        num_heads=width // head_width if num_heads is None else num_heads,
        mlp_ratio=own["single_blocks.0.linear2.weight"].shape[1] / width - 1,
        depth=count("double_blocks"),
        depth_single=count("single_blocks"),
        qkv_bias="double_blocks.0.img_attn.qkv.bias" in own,
        max_period=max_period,
        guidance_embed="guidance_in.in_layer.weight" in own,
    )
    ours, report = TABLE.to_ours(own, model.state_dict())
    return fill(model, ours), report


def to_official(model: ShapeDiT) -> dict[str, Tensor]:
    """Return the official state dict, bare keys."""
    return TABLE.to_official(model.state_dict())
