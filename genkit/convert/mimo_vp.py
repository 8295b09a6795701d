"""MIMO-VP: the released Moving-MNIST checkpoint ({"net_param": ...} with `module.` keys)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from genkit.convert.base import ConversionReport, KeyTable, OfficialModel, Row, build_empty, fill
from genkit.generators.mimo_vp import MIMOVP

COMPONENT, PIPELINE = "predictor", None
WRAPPERS = ("net_param", "state_dict")
FILES = ("checkpoint.chk", "mimo_vp.pth")
OFFICIAL: tuple[OfficialModel, ...] = (
    OfficialModel(
        name="mimo-vp-moving-mnist", source="the authors' cloud folder", files=FILES, licence="none stated", parameters=22_610_000,
        memory_gb=0.4, note="10 to 10 frames of 64x64",
    ),
)  # fmt: skip


def _attention(official: str, ours: str) -> list[Row]:
    """Return the rows of one attention: projections and output, each a convolution and a norm."""
    names = {"q_Conv": "q", "k_Conv": "k", "v_Conv": "v", "v_post_f": "out"}
    rows = []
    for theirs, mine in names.items():
        rows += [
            Row(f"{official}.{theirs}.0.weight", f"{ours}.{mine}.conv.weight"),
            Row(f"{official}.{theirs}.1.{{p}}", f"{ours}.{mine}.norm.{{p}}"),
        ]
    return rows


def _layers(side: str, norms: int) -> list[Row]:
    """Return the rows of the encoder's or the decoder's layers."""
    official, ours = f"{side}.layers.{{i}}", f"{side}.{{i}}"
    rows = _attention(f"{official}.attn_1", f"{ours}.attention")
    if side == "decoder":
        rows += _attention(f"{official}.attn_2", f"{ours}.cross")
    rows += [Row(f"{official}.norm_{k + 1}.{{p}}", f"{ours}.norms.{k}.{{p}}") for k in range(norms)]
    for theirs, mine in (("ff1", "first"), ("ff2", "second")):
        rows += [
            Row(f"{official}.ff.{theirs}.0.weight", f"{ours}.mix.{mine}.conv.weight"),
            Row(f"{official}.ff.{theirs}.1.{{p}}", f"{ours}.mix.{mine}.norm.{{p}}"),
        ]
    return rows


TABLE = KeyTable(
    "mimo_vp",
    [
        Row("encoder.conv.0.weight", "encoder_stem.conv.weight"),
        Row("encoder.conv.1.{p}", "encoder_stem.norm.{p}"),
        Row("conv.0.weight", "decoder_stem.conv.weight"),
        Row("conv.1.{p}", "decoder_stem.norm.{p}"),
        Row("decoder.conv.0.weight", "up.conv.weight"),
        Row("decoder.conv.1.{p}", "up.norm.{p}"),
        Row("decoder.conv.3.weight", "to_frames.weight"),
        *_layers("encoder", 2),
        *_layers("decoder", 3),
    ],
)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether keys are those of MIMO-VP."""
    return {"conv.0.weight", "decoder.conv.3.weight", "encoder.layers.0.attn_1.q_Conv.0.weight"} <= shapes.keys()


def from_official(state: Mapping[str, Tensor], *, heads: int = 8, patch_size: int = 2) -> tuple[MIMOVP, ConversionReport]:
    """Build the predictor of an official state dict.

    Args:
        state: official tensors by key.
        heads, patch_size: what shapes do not tell, as released unless given.

    Returns:
        The model in fp32 eval mode and the report.

    Raises:
        ValueError: if keys or shapes do not fit.
    """
    width, channels = state["conv.0.weight"].shape[:2]

    def depth(side: str) -> int:
        return 1 + max(int(match[1]) for key in state if (match := re.match(side + r"\.layers\.(\d+)\.", key)))

    model = build_empty(
        MIMOVP,
        in_channels=channels // patch_size**2,
        patch_size=patch_size,
        dim=width,
        heads=heads,
        num_encoder_layers=depth("encoder"),
        num_decoder_layers=depth("decoder"),
    )
    ours, report = TABLE.to_ours(state, model.state_dict())
    return fill(model, ours), report


def to_official(model: MIMOVP) -> dict[str, Tensor]:
    """Return the official state dict."""
    return TABLE.to_official(model.state_dict())
