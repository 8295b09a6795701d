"""Width pruning: hidden units of MLPs are ranked by what a loss would lose without them, and the least of them are cut out of the weights.

The saliency of a unit is (sum of w dL/dw over its weights)^2, averaged over batches: the squared first-order change of the loss when the
unit is taken away. Units of all blocks are ranked together, in groups, so that blocks end up with different widths; a short training mends
what was lost.

Source: Yang et al., Global Vision Transformer Pruning with Hessian-Aware Saliency, CVPR 2023, arXiv 2110.04869 (the formula; no code).
Letters: d width, h hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from genkit.blocks.mlp import MLP, MLPConfig
from genkit.blocks.stack import Stack

M = TypeVar("M", bound=nn.Module)


class Saliency:
    """Accumulates the saliency of the hidden units of all `mlp` mixers of a model's `blocks`.

    Args:
        model: the model; call `update` behind each `backward`.

    Raises:
        ValueError: if it has no plain `mlp`.

    Attributes:
        scores: name of the MLP -> [h] float64, the sum over batches.
        batches: how many were seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self.mlps = {name: part for name, part in model.named_modules() if isinstance(part, MLP) and name.startswith("blocks.")}
        if not self.mlps:
            raise ValueError(f"Saliency: {type(model).__name__} has no mlp mixers to prune.")
        self.scores = {name: torch.zeros(mlp.hidden, dtype=torch.float64) for name, mlp in self.mlps.items()}
        self.batches = 0

    @torch.no_grad()
    def update(self) -> None:
        """Add the saliency by the gradients at hand.

        Raises:
            ValueError: if a weight has no gradient.
        """
        for name, mlp in self.mlps.items():
            total = torch.zeros(mlp.hidden, dtype=torch.float64)
            for layer, axis in ((mlp.fc1, 1), (mlp.gate, 1), (mlp.fc2, 0)):
                if layer is None:
                    continue
                if layer.weight.grad is None:
                    raise ValueError(f"Saliency: {name} has no gradient; call update() behind backward().")
                total += (layer.weight * layer.weight.grad).double().sum(axis).cpu()
                if axis == 1 and layer.bias is not None and layer.bias.grad is not None:
                    total += (layer.bias * layer.bias.grad).double().cpu()
            self.scores[name] += total.square()
        self.batches += 1

    def keep(self, share: float, group: int = 8) -> dict[str, Tensor]:
        """Return which units [k] of each MLP to keep, in their order.

        Args:
            share: of all units of the model, in (0, 1].
            group: units that are kept or cut together, next to each other in rank; every MLP keeps one group.

        Raises:
            ValueError: for shares out of range, or before any update.
        """
        if not 0 < share <= 1 or group < 1 or not self.batches:
            raise ValueError(
                f"Saliency.keep: share must lie in (0, 1], group be positive and updates done, got {share}, {group}, {self.batches}."
            )
        ranked = {name: score.argsort(descending=True) for name, score in self.scores.items()}
        groups = []
        for name, order in ranked.items():
            for place, units in enumerate(order.split(group)):
                first = float("inf") if place == 0 else float(self.scores[name][units].mean())
                groups.append((first, name, len(units)))
        groups.sort(key=lambda entry: -entry[0])
        left, counts = round(share * sum(map(len, self.scores.values()))), dict.fromkeys(self.scores, 0)
        for first, name, size in groups:
            if first == float("inf") or size <= left:
                counts[name] += size
                left -= size
        return {name: order[: counts[name]].sort().values for name, order in ranked.items()}


@torch.no_grad()
def cut_units(mlp: MLP, kept: Tensor) -> MLP:
    """Return an MLP of some hidden units [k] of another.

    Raises:
        ValueError: for no units, or numbers that it does not have.
    """
    if not len(kept) or int(kept.min()) < 0 or int(kept.max()) >= mlp.hidden:
        raise ValueError(f"cut_units: units must be among 0 .. {mlp.hidden - 1}, got {kept.tolist()[:8]}.")
    config = mlp.config
    found = MLPConfig(hidden=len(kept), act=config.act, gated=config.gated, bias=config.bias, dropout=config.dropout).build(
        mlp.fc1.in_features
    )
    for mine, theirs in ((found.fc1, mlp.fc1), (found.gate, mlp.gate)):
        if mine is not None and theirs is not None:
            mine.weight.copy_(theirs.weight[kept])
            if mine.bias is not None and theirs.bias is not None:
                mine.bias.copy_(theirs.bias[kept])
    found.fc2.weight.copy_(mlp.fc2.weight[:, kept])
    if found.fc2.bias is not None and mlp.fc2.bias is not None:
        found.fc2.bias.copy_(mlp.fc2.bias)
    return found.to(mlp.fc1.weight).train(mlp.training)


def pruned(model: M, kept: Mapping[str, Tensor]) -> M:
    """Return a smaller model that has only some hidden units of each MLP; it is saved and opened like any other.

    Args:
        model: with `blocks` and a `stack` in its configuration: NAT, ENAT, VDT, the decoder of a shape VAE.
        kept: name of the MLP -> units [k], from `Saliency.keep`; MLPs that are not named stay whole.

    Raises:
        TypeError: for a model without a stack string. ValueError: for names that are no MLPs of its blocks, or units that they lack.
    """
    config = {key: value for key, value in dict(getattr(model, "config", {})).items() if not key.startswith("_")}
    if "stack" not in config or not hasattr(model, "blocks"):
        raise TypeError(f"pruned: {type(model).__name__} has no stack string that could say how wide its MLPs are.")
    blocks: Any = model.blocks
    places = {f"blocks.{i}.branches.{j}.f": branch.f for i, block in enumerate(blocks) for j, branch in enumerate(block.branches)}
    wrong = [name for name in kept if not isinstance(places.get(name), MLP)]
    if wrong:
        raise ValueError(f"pruned: {wrong} are no MLPs of the blocks of {type(model).__name__}.")
    state, smaller = model.state_dict(), dict[str, MLP]()
    for name, units in kept.items():
        smaller[name] = cut_units(cast(MLP, places[name]), units)
        state |= {f"{name}.{key}": value for key, value in smaller[name].state_dict().items()}
    mixers = [
        tuple(smaller.get(f"blocks.{i}.branches.{j}.f", branch.f).config for j, branch in enumerate(block.branches))
        for i, block in enumerate(blocks)
    ]
    found = type(model)(**{**config, "stack": str(Stack(mixers))})
    found.load_state_dict(state)
    return nn.Module.to(found, next(model.parameters()).device, next(model.parameters()).dtype).train(model.training)
