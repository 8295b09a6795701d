"""PredFormer: the official state dicts of its nine layouts, whose unit names tell the layout.

No checkpoint is in the authors' repository yet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from genkit.convert.base import ConversionReport, KeyTable, OfficialModel, Row, build_empty, fill, joined, split_qkv
from genkit.generators.predformer import PredFormer

COMPONENT, PIPELINE = "predictor", None
FILES = ("checkpoint.pth",)
OFFICIAL: tuple[OfficialModel, ...] = ()
_FOUR = {"T1": "ts_temporal_transformer", "S1": "ts_space_transformer", "S2": "st_space_transformer", "T2": "st_temporal_transformer"}
# Official names of the units of a layer, in order.
UNITS: dict[str, tuple[str, ...]] = {
    "TS": (_FOUR["T1"], _FOUR["S1"]),
    "ST": (_FOUR["S2"], _FOUR["T2"]),
    "TST": ("temporal_transformer_first", "space_transformer", "temporal_transformer_second"),
    "STS": ("space_transformer_first", "temporal_transformer", "space_transformer_second"),
    "TSST": (_FOUR["T1"], _FOUR["S1"], _FOUR["S2"], _FOUR["T2"]),
    "STTS": (_FOUR["S2"], _FOUR["T2"], _FOUR["T1"], _FOUR["S1"]),
    "fac_st": ("space_transformer", "temporal_transformer"),
    "fac_ts": ("temporal_transformer", "space_transformer"),
    "full": ("space_temporal_transformer",),
}


def _table(layout: str) -> KeyTable:
    """Return the rows of a layout."""
    rows = [Row("to_patch_embedding.1.{p}", "embed.{p}"), Row("mlp_head.0.{p}", "norm.{p}"), Row("mlp_head.1.{p}", "head.{p}")]
    is_whole = layout in ("fac_st", "fac_ts", "full")
    for place, name in enumerate(UNITS[layout]):
        official = name if is_whole else f"blocks.{{i}}.{name}"
        ours = f"layers.0.{place}" if is_whole else f"layers.{{i}}.{place}"
        pair, own = f"{official}.layers.{{j}}", f"{ours}.pairs.{{j}}"
        rows += [
            Row((f"{pair}.0.fn.to_qkv.weight",), (f"{own}.0.f.q.weight", f"{own}.0.f.kv.weight"), split_qkv, joined),
            Row(f"{pair}.0.fn.to_out.0.{{p}}", f"{own}.0.f.proj.{{p}}"),
            Row(f"{pair}.0.norm.{{p}}", f"{own}.0.norm.{{p}}"),
            Row(f"{pair}.1.norm.{{p}}", f"{own}.1.norm.{{p}}"),
            Row(f"{pair}.1.fn.fc1_g.{{p}}", f"{own}.1.f.gate.{{p}}"),
            Row(f"{pair}.1.fn.fc1_x.{{p}}", f"{own}.1.f.fc1.{{p}}"),
            Row(f"{pair}.1.fn.fc2.{{p}}", f"{own}.1.f.fc2.{{p}}"),
            Row(f"{official}.norm.{{p}}", f"{ours}.norm.{{p}}"),
        ]
    return KeyTable("predformer", rows)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether keys are those of PredFormer."""
    return {"to_patch_embedding.1.weight", "mlp_head.1.weight"} <= shapes.keys() and any(".fn.fc1_g.weight" in key for key in shapes)


def layouts_of(state: Mapping[str, Tensor]) -> list[str]:
    """Return the layouts whose units a state dict has; two that differ in order only are both returned."""
    names = {match[1] for key in state if (match := re.match(r"(?:blocks\.\d+\.)?(\w+_transformer\w*)\.", key))}
    return [layout for layout, units in UNITS.items() if set(units) == names]


def from_official(
    state: Mapping[str, Tensor],
    *,
    layout: str | None = None,
    heads: int = 8,
    sample_size: int | Sequence[int] = 64,
    in_channels: int = 1,
    num_frames: int = 10,
    official_fac_st: bool = True,
) -> tuple[PredFormer, ConversionReport]:
    """Build the predictor of an official state dict.

    Args:
        state: official tensors by key.
        layout: needed where names do not tell the order: "TSST" or "STTS", "fac_st" or "fac_ts".
        heads, sample_size, in_channels, num_frames: what shapes do not tell; those of Moving MNIST unless given.
        official_fac_st: see `PredFormer`.

    Returns:
        The model in fp32 eval mode and the report.

    Raises:
        ValueError: if keys or shapes do not fit, or the layout is open.
    """
    possible = layouts_of(state)
    if layout is None and len(possible) != 1:
        raise ValueError(f"predformer: the names fit the layouts {possible or 'none'}; give layout.")
    chosen = layout or possible[0]
    if chosen not in possible:
        raise ValueError(f"predformer: the names fit the layouts {possible or 'none'}, got layout={chosen!r}.")
    dim, pixels = state["to_patch_embedding.1.weight"].shape
    is_whole = chosen in ("fac_st", "fac_ts", "full")
    first = UNITS[chosen][0] if is_whole else f"blocks.0.{UNITS[chosen][0]}"
    pairs = 1 + max(int(match[1]) for key in state if (match := re.match(re.escape(first) + r"\.layers\.(\d+)\.", key)))
    blocks = [int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))]
    model = build_empty(
        PredFormer,
        sample_size=sample_size,
        in_channels=in_channels,
        num_frames=num_frames,
        patch_size=round((pixels / in_channels) ** 0.5),
        dim=dim,
        heads=heads,
        dim_head=len(state[f"{first}.layers.0.0.fn.to_qkv.weight"]) // (3 * heads),
        scale_dim=state[f"{first}.layers.0.1.fn.fc2.weight"].shape[1] / dim,
        layout=chosen,
        num_layers=pairs if is_whole else 1 + max(blocks),
        depth=1 if is_whole else pairs,
        official_fac_st=official_fac_st,
    )
    ours, report = _table(chosen).to_ours(state, model.state_dict())
    return fill(model, ours), report


def to_official(model: PredFormer) -> dict[str, Tensor]:
    """Return the official state dict.

    Raises:
        ValueError: for layouts that were not published.
    """
    layout = model.config["layout"]
    if layout not in UNITS:
        raise ValueError(f"predformer: layout {layout!r} has no official names; published are {', '.join(UNITS)}.")
    return _table(layout).to_official(model.state_dict())
