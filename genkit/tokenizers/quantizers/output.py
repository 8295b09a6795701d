"""What every quantizer returns."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class QuantizerOutput(BaseOutput):
    """Result of quantizing latents [..., d].

    Attributes:
        quantized: [..., d], the codes with the gradient of the chosen estimator.
        indices: [...] int64, the code of each latent.
        loss: scalar, the weighted sum of the terms, ready to be added to the objective.
        terms: the unweighted scalar terms by name ("commitment", "codebook").
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    terms: dict[str, Tensor]
