"""Vector quantizers behind one interface, chosen by name in a model's config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from genkit.checks import choose
from genkit.tokenizers.quantizers.base import VectorQuantizerBase
from genkit.tokenizers.quantizers.ema import EMAVectorQuantizer
from genkit.tokenizers.quantizers.gumbel import GumbelQuantizer
from genkit.tokenizers.quantizers.residual import ResidualQuantizer
from genkit.tokenizers.quantizers.scalar import FSQ, LFQ
from genkit.tokenizers.quantizers.simvq import SimVQ
from genkit.tokenizers.quantizers.vq import VectorQuantizer

TABLE = ("codebook_size", "dim")
LOSS = ("beta", "beta_on", "gradient")


@dataclass(frozen=True)
class Entry:
    """A quantizer by name.

    Args:
        make: its class.
        needs: options that have to be given.
        takes: options that may be.
    """

    make: Callable[..., VectorQuantizerBase]
    needs: tuple[str, ...] = TABLE
    takes: tuple[str, ...] = LOSS


QUANTIZERS: dict[str, Entry] = {
    "vq": Entry(VectorQuantizer),
    "l2_vq": Entry(partial(VectorQuantizer, normalize=True)),
    "simvq": Entry(SimVQ, takes=(*LOSS, "frozen_dim", "bias", "hidden")),
    "ema_vq": Entry(EMAVectorQuantizer, takes=("beta", "gradient", "decay", "eps", "revive_below")),
    "gumbel": Entry(GumbelQuantizer, takes=("temperature", "kl_weight")),
    "fsq": Entry(FSQ, needs=("levels",), takes=()),
    "lfq": Entry(LFQ, needs=("dim",), takes=("entropy_weight", "diversity", "inverse_temperature", "group_bits", "beta")),
}
RESIDUAL = ("num_levels", "is_shared", "path")


def build_quantizer(config: Mapping[str, Any]) -> VectorQuantizerBase:
    """Build a quantizer from its config.

    Args:
        config: `name` and that class's arguments. "vq": plain; "l2_vq": l2-normalised as in ViT-VQGAN; "simvq"; "ema_vq"; "gumbel"; "fsq"
            (levels); "lfq" (dim). With `num_levels` any of them becomes residual: that many codes per latent.

    Raises:
        ValueError: for an unknown name or argument; lists what is accepted.

    Example:
        >>> build_quantizer({"name": "vq", "codebook_size": 8, "dim": 2, "num_levels": 3}).num_levels
        3
    """
    options = dict(config)
    name = choose(options.pop("name", "vq"), QUANTIZERS, "quantizer")
    entry = QUANTIZERS[name]
    residual = {key: options.pop(key) for key in RESIDUAL if key in options}
    for key in options:
        choose(key, (*entry.needs, *entry.takes, *RESIDUAL), f"option of quantizer {name!r}")
    missing = set(entry.needs) - options.keys()
    if missing:
        raise ValueError(f"quantizer {name!r}: config needs {sorted(missing)}, got {sorted(options)}.")
    if not residual:
        return entry.make(**options)
    return ResidualQuantizer(lambda: entry.make(**options), **residual)
