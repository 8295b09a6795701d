"""SimVQ: the official quantizer (frozen table, linear layer with bias).

The convolutional tokenizer around it is not part of genkit yet; a whole official checkpoint is refused with the keys that have no place.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from genkit.convert.base import ConversionReport, KeyTable, OfficialModel, Row, build_empty, fill
from genkit.tokenizers.quantizers import SimVQ

COMPONENT, PIPELINE = "quantizer", None
FILES: tuple[str, ...] = ()
OFFICIAL: tuple[OfficialModel, ...] = ()
PREFIX = "quantize."
TABLE = KeyTable("simvq", [Row("embedding.weight", "embedding.weight"), Row("embedding_proj.{p}", "embedding_proj.{p}")])


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether keys and shapes are those of a bare SimVQ quantizer."""
    return {key.removeprefix(PREFIX) for key in shapes} == {"embedding.weight", "embedding_proj.weight", "embedding_proj.bias"}


def from_official(
    state: Mapping[str, Tensor], *, beta: float = 0.25, legacy: bool = False, gradient: str = "straight_through"
) -> tuple[SimVQ, ConversionReport]:
    """Build the quantizer of an official state dict.

    Args:
        state: official tensors by key, with or without the prefix `quantize.`.
        beta: weight of one loss term.
        legacy: the official flag: beta weighs the codebook term. All official configs set it to False.
        gradient: estimator; the official code has straight-through only.

    Returns:
        The quantizer in fp32 eval mode and the report.

    Raises:
        ValueError: if keys or shapes do not fit.
    """
    bare = {key.removeprefix(PREFIX): value for key, value in state.items()}
    if "embedding.weight" not in bare:
        raise ValueError(f"simvq: the checkpoint has no embedding.weight; it holds {sorted(state)[:10]}.")
    size, dim = bare["embedding.weight"].shape
    beta_on = "codebook" if legacy else "commitment"
    quantizer = build_empty(SimVQ, codebook_size=size, dim=dim, beta=beta, beta_on=beta_on, gradient=gradient)
    ours, report = TABLE.to_ours(bare, quantizer.state_dict())
    return fill(quantizer, ours), report


def to_official(quantizer: SimVQ) -> dict[str, Tensor]:
    """Return the official state dict of a quantizer, without prefix."""
    return TABLE.to_official(quantizer.state_dict())
