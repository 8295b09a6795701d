"""Named protocols: every choice that moves a published number, as the tool behind the name makes it.

A Frechet distance is (network, weights, resize, value range, rounding, layer, ddof, reference); two numbers that differ in one of them
cannot be compared. `explain` tells in words where two results differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from genkit.checks import choose

INCEPTION = "fid-inception"
RANGES = {"signed": "(x - 128) / 128", "symmetric": "2 x / 255 - 1", "unit": "x / 127.5 - 1"}


@dataclass(frozen=True)
class Protocol:
    """How a tool gets from pictures to numbers.

    Attributes:
        name: of the protocol.
        network: "fid-inception", or a feature network of ours; then the distance is not FID.
        size: side the pictures are resized to, in pixels.
        resize: key of `genkit.eval.resize.RESIZES`.
        value_range: key of `RANGES`, what pixels x in 0..255 become.
        quantize: how a generator's floats become 8 bits: "round" or "truncate" (which darkens by half a step).
        tap: layer of the features.
        ddof: covariances are divided by n - ddof.
        score: tool of the Inception Score; splits: its splits.
        kid: whose subset draws KID uses; kid_subsets, kid_size, kid_seed: their number, size and seed.
        neighbours: k of precision and recall; border: whether the border belongs to a ball.
        reference: what the tool's reference files are.
    """

    name: str
    network: str = INCEPTION
    size: int = 299
    resize: str = "tf1"
    value_range: str = "signed"
    quantize: str = "round"
    tap: str = "2048"
    ddof: int = 1
    score: str = "torch-fidelity"
    splits: int = 10
    kid: str = "torch-fidelity"
    kid_subsets: int = 100
    kid_size: int = 1000
    kid_seed: int = 2020
    neighbours: int = 3
    border: bool = True
    reference: str = "pictures, or an npz with mu and sigma"

    @property
    def is_fid(self) -> bool:
        """Whether the features are those that FID is defined with."""
        return self.network == INCEPTION

    def normalise(self, pixels: Tensor) -> Tensor:
        """Map pixels in 0..255 to the network's input."""
        if self.value_range == "signed":
            return (pixels - 128) / 128
        return 2 * (pixels / 255) - 1 if self.value_range == "symmetric" else pixels / 127.5 - 1

    def change(self, **changes: Any) -> Protocol:
        """Return the protocol with other choices, its name marked; None leaves a choice as it is."""
        given = {key: value for key, value in changes.items() if value is not None and value != getattr(self, key)}
        if not given:
            return self
        marks = ", ".join(f"{key}={value}" for key, value in sorted(given.items()))
        return dataclasses.replace(self, **given, name=f"{self.name} ({marks})")


_LIST = (
    Protocol("pytorch-fid", resize="bilinear", value_range="symmetric"),
    Protocol("torch-fidelity"),
    Protocol(
        "clean-fid", resize="clean", kid="clean-fid", kid_seed=0, reference="npz with mu and sigma, named {data}_{mode}_{split}_{size}"
    ),
    Protocol("clean-fid-legacy-pytorch", resize="bilinear", value_range="symmetric", kid="clean-fid", kid_seed=0),
    Protocol("clean-fid-legacy-tensorflow", resize="nvidia", kid="clean-fid", kid_seed=0),
    Protocol("adm", score="adm", reference="VIRTUAL npz with arr_0, mu, sigma, mu_s and sigma_s"),
    Protocol("edm", resize="nvidia", reference="npz with mu and sigma"),
    Protocol("stylegan", resize="nvidia", ddof=0, score="stylegan", kid="clean-fid", kid_seed=0, reference="pickled sums of features"),
    Protocol("torchmetrics", resize="antialias", quantize="truncate", score="torchmetrics", kid="torchmetrics", kid_seed=0),
    Protocol("dgm-eval", score="dgm-eval", kid="dgm-eval", kid_seed=0, neighbours=5, border=False),
    Protocol("titok", quantize="truncate", score="titok"),
    Protocol("lite0", network="efficientnet-lite0", size=224, resize="antialias", value_range="unit", tap="1280", border=False),
)
PROTOCOLS = {protocol.name: protocol for protocol in _LIST}

# What a difference in a choice means, for people.
MEANING = {
    "network": "another feature network: the numbers measure different things",
    "weights": "other weights of the network",
    "size": "another input size of the network",
    "resize": "another way to resize: 10 to 30 % of the features of a single picture can change",
    "value_range": "another scaling of pixels before the network",
    "quantize": "another rounding of generated pictures to 8 bits; truncation darkens every pixel by half a step",
    "tap": "another layer",
    "ddof": "another divisor of the covariance: moves the distance by about 1/n of the traces",
    "score": "another way to split and shuffle for the Inception Score",
    "splits": "another number of splits of the Inception Score; fewer splits raise it",
    "kid": "other random subsets for KID: the mean moves within its deviation",
    "kid_subsets": "another number of KID subsets",
    "kid_size": "another size of KID subsets",
    "kid_seed": "another seed of the KID subsets",
    "neighbours": "another k for precision and recall: both grow with k",
    "border": "the border of a ball counted in or not: matters for repeated pictures",
    "num_real": "another number of real samples",
    "num_fake": "another number of generated samples: the Frechet distance falls as it grows",
    "real": "other reference data",
    "fake": "other generated data",
}


def get_protocol(name: str, **changes: Any) -> Protocol:
    """Return a protocol by name, with some choices changed.

    Raises:
        ValueError: for an unknown name; names the nearest.
    """
    return PROTOCOLS[choose(name, PROTOCOLS, "evaluation protocol")].change(**changes)


def explain(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Say which choices of two results differ, most important first, and what that does.

    Args:
        first, second: results as `Result.to_dict` gives them.

    Returns:
        One line per difference.
    """

    def choices(result: Mapping[str, Any]) -> dict[str, Any]:
        own = {key: value for key, value in result.get("protocol", {}).items() if key not in ("name", "reference")}
        return own | {key: result.get(key) for key in ("num_real", "num_fake", "real", "fake", "weights")}

    a, b = choices(first), choices(second)
    lines = []
    if first.get("metric") != second.get("metric"):
        lines.append(f"metric: {first.get('metric')} against {second.get('metric')}; two metrics cannot be compared")
    for key, meaning in MEANING.items():
        if a.get(key) != b.get(key):
            lines.append(f"{key}: {a.get(key)} against {b.get(key)}; {meaning}")
    return lines
