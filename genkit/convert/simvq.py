"""SimVQ: the official image tokenizer (Lightning checkpoints with their running averages), and its quantizer alone.

Running averages lie under the names of the parameters with all dots left out; the published numbers are theirs, so they are taken where
they are. The frozen table has none. The upsampler's channels come block by block (DCR); ours, as `pixel_shuffle` has them, pixel by pixel.
"""

from __future__ import annotations

from collections.abc import Mapping

from einops import rearrange
from torch import Tensor

from genkit.convert._conv_vq import block_rows, level_rows, read_sizes
from genkit.convert.base import ConversionReport, Drop, KeyTable, OfficialModel, Row, build_empty, fill
from genkit.tokenizers.conv_vqgan import ConvVQModel
from genkit.tokenizers.quantizers import SimVQ

COMPONENT, PIPELINE = "vqvae", None
FILES = ("epoch=49-step=250250.ckpt",)
OFFICIAL = tuple(
    OfficialModel(
        name=f"simvq-{name}", source="Hugging Face hub", files=(f"vq_log/simvq_{name}/epoch=49-step=250250.ckpt",), licence="MIT",
        parameters=64_134_403 + 16_512 + codes * 128, memory_gb=0.6 + codes * 128 * 4 / 1e9, hub_id="zyx123/SimVQ",
        note=f"image tokenizer, 128x128, {codes:,} codes",
    )
    for name, codes in (("1k", 1024), ("8k", 8192), ("65k", 65536), ("262k", 262144))
)  # fmt: skip
PREFIX = "quantize."
AVERAGES = "model_ema."
TABLE = KeyTable("simvq", [Row("embedding.weight", "embedding.weight"), Row("embedding_proj.{p}", "embedding_proj.{p}")])


def by_pixel(blocks: Tensor) -> Tensor:
    """Return an upsampler's weight or bias [4 d, ...], channels block by block, as `pixel_shuffle` wants it."""
    return rearrange(blocks, "(s d) ... -> (d s) ...", s=4)


def by_block(pixels: Tensor) -> Tensor:
    """Undo `by_pixel`."""
    return rearrange(pixels, "(d s) ... -> (s d) ...", s=4)


TOKENIZER = KeyTable(
    "simvq",
    [
        Row("quantize.embedding.weight", "quantizer.embedding.weight"),
        Row("quantize.embedding_proj.{p}", "quantizer.embedding_proj.{p}"),
        *level_rows(),
        *(row for side in ("encoder", "decoder") for row in block_rows(f"{side}.mid_block.{{i}}", f"{side}.mid.{{i}}")),
        Row("encoder.down.{i}.downsample.{p}", "encoder.levels.{i}.resample.{p}"),
        Row("decoder.up.{i}.upsample.conv1.{p}", "decoder.levels.{i}.resample.{p}", load=by_pixel, save=by_block),
        Drop("loss.{rest}", "discriminator and perceptual network of the training"),
        Drop("model_ema.decay", "of the running average"),
        Drop("model_ema.num_updates", "of the running average"),
        Drop("model_ema.{rest}", "running average, taken in place of the raw weights, or of the discriminator"),
    ],
)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether keys and shapes are those of SimVQ's image tokenizer, or of a bare SimVQ quantizer."""
    quantizer = {"embedding.weight", "embedding_proj.weight", "embedding_proj.bias"}
    is_tokenizer = {PREFIX + key for key in quantizer} | {"encoder.mid_block.0.norm1.weight"} <= shapes.keys()
    return is_tokenizer or {key.removeprefix(PREFIX) for key in shapes} == quantizer


def from_official(
    state: Mapping[str, Tensor],
    *,
    beta: float = 0.25,
    legacy: bool = False,
    gradient: str = "straight_through",
    use_ema: bool = True,
    image_size: int = 128,
) -> tuple[ConvVQModel | SimVQ, ConversionReport]:
    """Build the tokenizer of an official checkpoint, or the quantizer where there is nothing else.

    Args:
        state: official tensors by key; those of a quantizer alone with or without the prefix `quantize.`.
        beta: weight of one loss term.
        legacy: the official flag: beta weighs the codebook term. All official configs set it to False.
        gradient: estimator; the official code has straight-through only.
        use_ema: take the running averages where the file has them.
        image_size: side of the training pictures; any other works.

    Returns:
        The model in fp32 eval mode and the report.

    Raises:
        ValueError: if keys or shapes do not fit.
    """
    bare = {key.removeprefix(PREFIX): value for key, value in state.items()}
    if "embedding.weight" not in bare:
        raise ValueError(f"simvq: the checkpoint has no embedding.weight; it holds {sorted(state)[:10]}.")
    size, dim = bare["embedding.weight"].shape
    options = {"codebook_size": size, "dim": dim, "beta": beta, "beta_on": "codebook" if legacy else "commitment", "gradient": gradient}
    if "encoder.conv_in.weight" not in state:
        quantizer = build_empty(SimVQ, **options)
        ours, report = TABLE.to_ours(bare, quantizer.state_dict())
        return fill(quantizer, ours), report
    sizes = read_sizes(state, r"encoder\.mid_block\.(\d+)\.")
    model = build_empty(ConvVQModel, quantizer_config={"name": "simvq", **options}, sample_size=image_size, **sizes)
    ours, report = TOKENIZER.to_ours(averaged(state) if use_ema else state, model.state_dict())
    if not use_ema:
        report.dropped |= {key: "running average; the raw weights were asked for" for key in report.dropped if key.startswith(AVERAGES)}
    return fill(model, ours), report


def averaged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint with its running averages in place of the raw weights, where it has any.

    Raises:
        ValueError: if it has averages of some weights of encoder, decoder and projection, and not of others.
    """
    names = {AVERAGES + key.replace(".", ""): key for key in state if key.startswith(("encoder.", "decoder.", "quantize.embedding_proj."))}
    found = {key: state[name] for name, key in names.items() if name in state}
    if found and len(found) < len(names):
        lacking = [key for name, key in names.items() if name not in state]
        raise ValueError(f"simvq: running averages of {len(lacking)} weights are missing: {', '.join(lacking[:10])}; set use_ema=False.")
    return {**state, **found}


def to_official(model: ConvVQModel | SimVQ) -> dict[str, Tensor]:
    """Return the official state dict of a tokenizer, without averages, or of a quantizer, without prefix.

    Raises:
        ValueError: if the model has what the layout has no name for.
    """
    return (TABLE if isinstance(model, SimVQ) else TOKENIZER).to_official(model.state_dict())
