"""MaskGIT's VQGAN, in the layout of its first PyTorch port (MAGE's `vqgan_jax_strongaug.ckpt`) and in that of open-muse."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from genkit.convert._conv_vq import block_rows, level_rows, read_sizes
from genkit.convert.base import ConversionReport, KeyTable, OfficialModel, Row, build_empty, fill
from genkit.tokenizers.conv_vqgan import ConvVQModel

COMPONENT, PIPELINE = "vqvae", None
FILES = ("vqgan_jax_strongaug.ckpt", "maskgit-vqgan-imagenet-f16-256.safetensors", "model.safetensors")
OFFICIAL = (
    OfficialModel(
        name="maskgit-vqgan-imagenet", source="the repository of MAGE", files=("vqgan_jax_strongaug.ckpt",), licence="none stated",
        parameters=54_515_587, memory_gb=0.5, note="tokens of ENAT and AutoNAT, 1,024 codes, 16 pixels a side",
    ),
)  # fmt: skip
CODES = Row("quantize.embedding.weight", "quantizer.embedding.weight")
LAYOUTS = {
    "port": [
        *(row for side in ("encoder", "decoder") for n in (1, 2) for row in block_rows(f"{side}.mid.block_{n}", f"{side}.mid.{n - 1}")),
        Row("decoder.up.{i}.upsample.conv.{p}", "decoder.levels.{i}.resample.{p}"),
    ],
    "muse": [
        *(row for side in ("encoder", "decoder") for row in block_rows(f"{side}.mid.{{i}}", f"{side}.mid.{{i}}")),
        Row("decoder.up.{i}.upsample_conv.{p}", "decoder.levels.{i}.resample.{p}"),
    ],
}
TABLES = {name: KeyTable(f"maskgit_vqgan ({name})", [CODES, *level_rows(), *rows]) for name, rows in LAYOUTS.items()}
MIDDLE = {"port": r"encoder\.mid\.block_(\d+)\.", "muse": r"encoder\.mid\.(\d+)\."}


def layout_of(shapes: Mapping[str, object]) -> str | None:
    """Return which layout keys are in, None for neither."""
    if "quantize.embedding.weight" not in shapes or any(".attn_" in key or key.startswith("quant_conv") for key in shapes):
        return None
    firsts = {"port": "encoder.mid.block_1.norm1.weight", "muse": "encoder.mid.0.norm1.weight"}
    return next((name for name, key in firsts.items() if key in shapes), None)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether keys and shapes are those of this tokenizer, in either layout."""
    return layout_of(shapes) is not None


def from_official(state: Mapping[str, Tensor], *, beta: float = 0.25, image_size: int = 256) -> tuple[ConvVQModel, ConversionReport]:
    """Build the tokenizer of an official state dict.

    Args:
        state: official tensors by key, in either layout.
        beta: weight of the codebook term in the quantizer's loss.
        image_size: side of the training pictures; any other works.

    Returns:
        The model in fp32 eval mode and the report.

    Raises:
        ValueError: if keys or shapes do not fit.
    """
    layout = layout_of(state)
    if layout is None:
        raise ValueError(f"maskgit_vqgan: neither layout of this tokenizer; the checkpoint holds {sorted(state)[:10]}.")
    size, dim = state["quantize.embedding.weight"].shape
    quantizer = {"name": "vq", "codebook_size": size, "dim": dim, "beta": beta, "beta_on": "codebook"}
    sizes = read_sizes(state, MIDDLE[layout])
    model = build_empty(
        ConvVQModel,
        quantizer_config=quantizer,
        resampling="average",
        shortcut="branch",
        official_range=True,
        sample_size=image_size,
        **sizes,
    )
    ours, report = TABLES[layout].to_ours(state, model.state_dict())
    return fill(model, ours), report


def to_official(model: ConvVQModel) -> dict[str, Tensor]:
    """Return the official state dict of a model, in the layout of the first port.

    Raises:
        ValueError: if the model has what the layout has no name for.
    """
    return TABLES["port"].to_official(model.state_dict())
