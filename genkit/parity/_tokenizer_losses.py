"""What the runners of tokenizer losses share: networks by formula, losses and gradients of both sides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.convert import _discriminators
from genkit.eval.lpips import LPIPS, TRUNKS
from genkit.parity.base import Case
from genkit.tokenizers.discriminators import adaptive_weight

PERCEPTUAL, DISCRIMINATOR = "perceptual_loss.", "discriminator."
SLICES = (4, 9, 16, 23, 30)  # where LPIPS's slices of VGG16 end


def lpips_shapes() -> dict[str, tuple[int, ...]]:
    """Return the official names and shapes of LPIPS on VGG16."""
    build, channels = TRUNKS["vgg"]
    trunk, _ = build()
    found: dict[str, tuple[int, ...]] = {}
    for key, value in trunk.state_dict().items():
        place = int(key.split(".")[0])
        piece = next(i for i, end in enumerate(SLICES, 1) if place < end)
        found[f"{PERCEPTUAL}net.slice{piece}.{key}"] = tuple(value.shape)
    return found | {f"{PERCEPTUAL}lin{i}.model.1.weight": (1, c, 1, 1) for i, c in enumerate(channels)}


def networks(case: Case, empty: nn.Module, rule: Callable[[str, Tensor], Tensor]) -> tuple[LPIPS, nn.Module]:
    """Return LPIPS and the discriminator of a case, by formula; an empty discriminator tells the shapes."""
    shapes = lpips_shapes() | {
        DISCRIMINATOR + key: tuple(value.shape) for key, value in _discriminators.to_official(empty).items() if value.is_floating_point()
    }
    state = case.weights(shapes, rule)
    lpips = LPIPS.from_checkpoint({key.removeprefix(PERCEPTUAL): v for key, v in state.items() if key.startswith(PERCEPTUAL)})
    own = {key.removeprefix(DISCRIMINATOR): v for key, v in state.items() if key.startswith(DISCRIMINATOR)}
    counters = {key: v for key, v in _discriminators.to_official(empty).items() if not v.is_floating_point()}
    return case.place_model(lpips), case.place_model(_discriminators.discriminator(own | counters))


def painted(case: Case, offset: float) -> tuple[Tensor, Tensor]:
    """Return the reconstruction of a case with a graph, its gradient kept, and the decoder's last layer."""
    last = case.inputs["last_layer"].clone().requires_grad_(True)
    recon = F.conv_transpose2d(case.inputs["feat"], last, stride=4) + offset
    recon.retain_grad()
    return recon, last


def generator_results(
    terms: Mapping[str, Tensor], recon: Tensor, last: Tensor, weight: float | None, factor: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the weighted terms of a generator pass with its gradients, and the weight of the adversarial term.

    Args:
        terms: "rec", "adversarial", and "codes".
        recon, last: from `painted`.
        weight: of the adversarial term; None for the adaptive one.
        factor: that the adaptive one is multiplied with.
    """
    rec, adversarial = terms["rec"], terms["adversarial"]
    d_weight = recon.new_tensor(weight) if weight is not None else factor * adaptive_weight(rec, adversarial, last)
    total = rec + d_weight * adversarial + terms["codes"]
    probed = total if weight is not None else total + rec + adversarial  # released: probing leaves its gradients too
    (grad_recon,) = torch.autograd.grad(probed, recon, retain_graph=True)
    (grad_last,) = torch.autograd.grad(total, last, retain_graph=True)
    return {"total_loss": total, "grad_recon": grad_recon, "grad_last_layer": grad_last}, d_weight


def gradients_like(case: Case, tag: str, model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a loss under official names, those that the case stores in part cut as there."""
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
    shadow = _discriminators.to_official(_with(model, dict(zip(parameters, found, strict=True))))
    results: dict[str, Tensor] = {}
    for key, value in shadow.items():
        shape: Any = case.output_shapes.get(tag + key, tuple(value.shape))
        results[tag + key] = value if tuple(shape) == tuple(value.shape) else value.flatten()[: shape[0]]
    return results


def _with(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a model whose parameters are other tensors."""
    import copy

    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(values[name])
    return twin
