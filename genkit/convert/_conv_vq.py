"""What the layouts of convolutional tokenizers share: rows of their blocks, and sizes read from shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genkit.convert.base import Row


def block_rows(official: str, ours: str) -> list[Row]:
    """Return the rows of a residual block by the names of its place."""
    names = ("norm1.{p}", "norm2.{p}", "conv1.weight", "conv2.weight")
    return [
        *(Row(f"{official}.{name}", f"{ours}.{name}") for name in names),
        Row(f"{official}.nin_shortcut.weight", f"{ours}.shortcut.weight"),
    ]


def level_rows() -> list[Row]:
    """Return the rows of both towers' levels, ends and norms."""
    found = []
    for side, levels in (("encoder", "down"), ("decoder", "up")):
        found += block_rows(f"{side}.{levels}.{{i}}.block.{{j}}", f"{side}.levels.{{i}}.blocks.{{j}}")
        found += [Row(f"{side}.{end}.{{p}}", f"{side}.{end}.{{p}}") for end in ("conv_in", "conv_out")]
        found.append(Row(f"{side}.norm_out.{{p}}", f"{side}.norm.{{p}}"))
    return found


def read_sizes(state: Mapping[str, Tensor], mid: str) -> dict[str, Any]:
    """Return the options of `ConvVQModel` that shapes tell.

    Args:
        state: official tensors by key.
        mid: pattern of the encoder's blocks behind the last level, its group their number.

    Raises:
        ValueError: if the checkpoint lacks a level.
    """
    channels, in_channels = state["encoder.conv_in.weight"].shape[:2]
    firsts = {int(m[1]): state[key].shape[0] for key in state if (m := re.fullmatch(r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight", key))}
    if sorted(firsts) != list(range(len(firsts))) or not firsts:
        raise ValueError(f"the checkpoint has levels {sorted(firsts)} of an encoder, expected 0, 1, ...")
    blocks = [int(m[1]) for key in state if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", key))]
    middle = {m[1] for key in state if (m := re.match(mid, key))}
    return {
        "channels": channels,
        "in_channels": in_channels,
        "multipliers": [firsts[i] // channels for i in range(len(firsts))],
        "num_res_blocks": max(blocks) + 1,
        "num_mid_blocks": len(middle),
    }
