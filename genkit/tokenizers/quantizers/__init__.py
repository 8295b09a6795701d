"""Vector quantizers behind one interface, chosen by name in a model's config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from genkit.checks import choose
from genkit.tokenizers.quantizers.base import VectorQuantizerBase
from genkit.tokenizers.quantizers.simvq import SimVQ
from genkit.tokenizers.quantizers.vq import VectorQuantizer

QUANTIZERS: dict[str, Callable[..., VectorQuantizerBase]] = {
    "vq": VectorQuantizer,
    "l2_vq": partial(VectorQuantizer, normalize=True),
    "simvq": SimVQ,
}


def build_quantizer(config: Mapping[str, Any]) -> VectorQuantizerBase:
    """Build a quantizer from its config.

    Args:
        config: `name` ("vq": plain, "l2_vq": l2-normalised as in ViT-VQGAN, "simvq") and that class's arguments:
            codebook_size, dim, beta, beta_on, gradient.

    Raises:
        ValueError: for an unknown name or argument; lists what is accepted.
    """
    options = dict(config)
    name = choose(options.pop("name", "vq"), QUANTIZERS, "quantizer")
    accepted = {"codebook_size", "dim", "beta", "beta_on", "gradient"}
    for key in options:
        choose(key, accepted, f"option of quantizer {name!r}")
    missing = {"codebook_size", "dim"} - options.keys()
    if missing:
        raise ValueError(f"quantizer {name!r}: config needs {sorted(missing)}, got {sorted(options)}.")
    return QUANTIZERS[name](**options)
