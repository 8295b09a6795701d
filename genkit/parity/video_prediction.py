"""Runners of the video prediction golden cases: PredFormer's layouts and MIMO-VP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.convert import mimo_vp as mimo_layout
from genkit.convert import predformer as predformer_layout
from genkit.generators.mimo_vp import fold_frames, unfold_frames
from genkit.generators.predformer import interleaved_sines
from genkit.parity.base import Case, with_gradients

LAYOUTS = {"FullAttention": "full", "FacST": "fac_st", "FacTS": "fac_ts"}


def _keep(
    results: dict[str, Tensor], name: str, change: Callable[[Tensor], Tensor] = lambda x: x
) -> Callable[[nn.Module, Any, Tensor], None]:
    """Return a hook that stores a module's output under a name."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        results[name] = change(output)

    return hook


def predformer(case: Case) -> dict[str, Tensor]:
    """Kind video_prediction/predformer: outputs, layer outputs, loss and gradients of every layout; a roll-out."""
    weights, x, target = case.weights(), case.inputs["x"], case.inputs["target"]
    results: dict[str, Tensor] = {}
    for variant, config in case.config["configs"].items():
        state = {key.removeprefix(f"{variant}/"): value for key, value in weights.items() if key.startswith(f"{variant}/")}
        layout = LAYOUTS.get(variant, variant.partition("_")[2])
        model, _ = predformer_layout.from_official(
            state, layout=layout, heads=config["heads"], sample_size=[config["height"], config["width"]],
            in_channels=config["num_channels"], num_frames=config["pre_seq"],
        )  # fmt: skip
        model = model.to(case.device).requires_grad_(True)
        raw: dict[str, Tensor] = {}
        hooks = [model.embed.register_forward_hook(_keep(raw, "to_patch_embedding"))]
        for i, layer in enumerate(model.layers):
            names = predformer_layout.UNITS[layout]
            for name, unit in zip(names, cast(Any, layer), strict=True):
                hooks.append(unit.register_forward_hook(_keep(raw, name if layout in LAYOUTS.values() else f"blocks.{i}")))
        out = model.next_frames(x)
        for hook in hooks:
            hook.remove()
        loss = F.mse_loss(out, target)
        loss.backward()
        results |= {f"{variant}/out": out, f"{variant}/mse_loss": loss}
        results |= {f"{variant}/act.{name}": _as_stored(name, value, x.shape, layout) for name, value in raw.items()}
        gradients = predformer_layout.to_official(with_gradients(model))
        results |= {f"{variant}/grad.{key}": value for key, value in gradients.items()}
        if shape := case.output_shapes.get(f"{variant}/rollout"):
            results[f"{variant}/rollout"] = (model(x * 2 - 1, shape[1]).frames + 1) / 2
    table = interleaved_sines(x.shape[1] * len(out[0, 0, 0].flatten()) // model.patch**2, model.config["dim"])
    results["pos_embedding"] = table.view(1, x.shape[1], -1, model.config["dim"])
    return {name: value for name, value in results.items() if not case.output_names or name in case.output_names}


def _as_stored(name: str, value: Tensor, shape: torch.Size, layout: str) -> Tensor:
    """Return the output of a layer's last unit as [b, f, n, d]; whole units and the embedding as they are."""
    if not name.startswith("blocks."):
        return value
    b, f = shape[:2]
    return value.unflatten(0, (b, -1)).transpose(1, 2) if layout[-1] == "T" else value.unflatten(0, (b, f))


def mimo_vp(case: Case) -> dict[str, Tensor]:
    """Kind video_prediction/mimo_vp: predictions of all decoder layers, the deep loss and its gradients."""
    config, video, target = case.config, case.inputs["video"], case.inputs["target"]
    p = config["patch_size"]
    model, _ = mimo_layout.from_official(case.weights(), heads=config["heads"], patch_size=p)
    model = model.to(case.device).requires_grad_(True)
    raw: dict[str, Tensor] = {}
    watched: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        for i, layer in enumerate(getattr(model, side)):
            watched |= {f"{side}.layers.{i}": layer, f"{side}.layers.{i}.attn_1": layer.attention}
            if layer.cross is not None:
                watched[f"{side}.layers.{i}.attn_2"] = layer.cross
    hooks = [module.register_forward_hook(_keep(raw, f"act.{name}", lambda x: x[:, :2])) for name, module in watched.items()]
    folded = fold_frames(video, p)
    found = model.predictions(folded)
    for hook in hooks:
        hook.remove()
    every, wanted = torch.cat(found, dim=2), fold_frames(target, p).repeat(1, 1, len(found), 1, 1)
    loss = 10 * F.mse_loss(every, wanted) + F.l1_loss(every, wanted)
    loss.backward()
    results = {"patched_input": folded[:, :1], "out_all": every, "pred_video": unfold_frames(found[-1], p), "loss": loss, **raw}
    results |= {f"grad.{key}": value for key, value in mimo_layout.to_official(with_gradients(model)).items()}
    return {name: value for name, value in results.items() if not case.output_names or name in case.output_names}
