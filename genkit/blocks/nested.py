"""Nested widths of a whole network: which there are, which of them a call means, and a smaller network of one of them.

Source: Devvrit et al., MatFormer: Nested Transformer for Elastic Inference, 2023, arXiv 2310.07707.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TypeAlias, cast

import torch
from torch import nn

from genkit.blocks.branch import Block, Branch
from genkit.blocks.mlp import MLP, MLPConfig
from genkit.blocks.stack import Stack

Width: TypeAlias = float | Sequence[float] | None
"""One width for all blocks, or one for each; None: the full one."""


def nested_widths(blocks: Iterable[nn.Module]) -> tuple[float, ...]:
    """Return the widths that every MLP of some blocks has, ascending up to 1."""
    found = [set(branch.f.config.nested) for branch in _branches(blocks) if isinstance(branch.f, MLP)]
    return tuple(sorted(set[float].intersection(*found))) if found else (1,)


def check_width(width: Width, blocks: Sequence[nn.Module], name: str) -> list[float | None]:
    """Return the width of each block.

    Args:
        width: as given to a model.
        blocks: of the model.
        name: of the model, for errors.

    Raises:
        ValueError: for a width that the blocks do not have, or a list of another length than theirs.
    """
    if width is None:
        return [None] * len(blocks)
    widths = [width] * len(blocks) if isinstance(width, (int, float)) else list(width)
    if len(widths) != len(blocks):
        raise ValueError(f"{name}: width must be one number, or one for each of {len(blocks)} blocks, got {len(widths)}.")
    for number, (value, block) in enumerate(zip(widths, blocks, strict=True), 1):
        known = nested_widths([block])
        if value not in known:
            raise ValueError(
                f"{name}: block {number} has the widths {', '.join(map(str, known))}, got {value}; a stack names them: nested=(...)."
            )
    return list(widths)


def cut_stack(stack: Stack, blocks: Sequence[nn.Module], widths: Sequence[float | None]) -> Stack:
    """Return the stack of a network whose MLPs have some widths of another's and nothing nested any more.

    Args:
        stack: of the other network.
        blocks: its blocks, for the hidden units that its options say as ratios.
        widths: of each block.
    """
    cut = []
    for configs, block, width in zip(stack, blocks, widths, strict=True):
        mixers = [branch.f for branch in _branches([block])]
        cut.append(
            tuple(
                dataclasses.replace(config, hidden=round(mixer.hidden * (width or 1)), ratio=4.0, nested=(1,))
                if isinstance(config, MLPConfig) and isinstance(mixer, MLP)
                else config
                for config, mixer in zip(configs, mixers, strict=True)
            )
        )
    return Stack(cut)


@torch.no_grad()
def copy_cut(source: nn.Module, target: nn.Module) -> None:
    """Copy weights to a network whose MLPs are cut: of each matrix its first rows and columns.

    Args:
        source: the network.
        target: the same but for the hidden units of its MLPs.
    """
    weights = source.state_dict()
    for key, mine in target.state_dict().items():
        theirs = weights[key]
        mine.copy_(theirs[tuple(slice(size) for size in mine.shape)])


def _branches(blocks: Iterable[nn.Module]) -> list[Branch]:
    """Return the branches of some blocks, in order."""
    return [cast(Branch, branch) for block in blocks for branch in cast(Block, block).branches]
