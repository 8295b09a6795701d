"""Discriminators inside official tokenizer checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from genkit.convert.base import Drop, KeyTable, Row, fill
from genkit.tokenizers.discriminators import PatchDiscriminator, StyleDiscriminator

STYLE = "discriminator of StyleGAN2"
PATCH = KeyTable("discriminator of PatchGAN", [Row("main.{rest}", "main.{rest}")])


def style_table(blocks: int) -> KeyTable:
    """Return the table of a StyleGAN2 discriminator with so many blocks."""
    rows: list[Row | Drop] = [
        Row("blocks.0.0.weight", "stem.weight"),
        Row("blocks.0.1.bias", "stem.bias"),
        Row("final_conv.0.weight", "last.weight"),
        Row("final_conv.1.bias", "last.bias"),
        Row("final_linear.0.{p}", "hidden.{p}"),
        Row("final_linear.1.{p}", "logit.{p}"),
        Drop("{rest}.kernel", "the blur, a constant"),
    ]
    for k in range(1, blocks + 1):
        there, here = f"blocks.{k}", f"blocks.{k - 1}"
        rows += [
            Row(f"{there}.conv1.0.weight", f"{here}.conv1.weight"),
            Row(f"{there}.conv1.1.bias", f"{here}.conv1.bias"),
            Row(f"{there}.conv2.1.weight", f"{here}.conv2.weight"),
            Row(f"{there}.conv2.2.bias", f"{here}.conv2.bias"),
            Row(f"{there}.skip.1.weight", f"{here}.skip.weight"),
        ]
    return KeyTable(STYLE, rows)


def discriminator(state: Mapping[str, Tensor]) -> nn.Module:
    """Build the discriminator of an official state dict, keys without prefix, with gradients.

    Raises:
        ValueError: if keys or shapes do not fit.
    """
    if "main.0.weight" in state:
        width, channels = state["main.0.weight"].shape[:2]
        count = sum(key.endswith("running_mean") for key in state)
        model: nn.Module = PatchDiscriminator(channels, width, count)
        ours, _ = PATCH.to_ours(state, model.state_dict())
        model.load_state_dict(ours)
        return model
    blocks = len({m[1] for key in state if (m := re.match(r"blocks\.(\d+)\.conv1\.", key))})
    width, channels = len(state["final_linear.0.bias"]), state["blocks.0.0.weight"].shape[1]
    model = StyleDiscriminator(2 ** (blocks + 2), channels, width)
    ours, _ = style_table(blocks).to_ours(state, model.state_dict())
    return fill(model, ours).requires_grad_(True)


def to_official(model: nn.Module) -> dict[str, Tensor]:
    """Return the official state dict of a discriminator, without the blur's constants."""
    if isinstance(model, PatchDiscriminator):
        return PATCH.to_official(model.state_dict())
    assert isinstance(model, StyleDiscriminator)
    return style_table(len(model.blocks)).to_official(model.state_dict())
