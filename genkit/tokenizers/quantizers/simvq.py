"""SimVQ: a frozen random codebook seen through one learned linear layer.

Zhu et al. 2024, "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer" (arXiv 2411.02038). The gradient
of any chosen row moves the layer and so moves every code: usage stays near 100 % at any codebook size.

- Only the chosen rows are projected with gradient: same loss, same gradients, n d^2 instead of k d^2 work in the backward pass.
- The search projects the codebook block by block in training and keeps it projected in evaluation until a parameter changes.
- `lookup` returns projected rows; the official helper that returns the raw ones is a defect and is not reproduced.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.tokenizers.quantizers.base import VectorQuantizerBase
from genkit.tokenizers.quantizers.search import half_norms, nearest_codes


class SimVQ(VectorQuantizerBase):
    """Nearest row of Q = C W^T + b, C [k, d] random and frozen, W and b learned.

    Args:
        codebook_size: number of codes k.
        dim: width d.
        **options: beta, beta_on, gradient; see `VectorQuantizerBase`.
    """

    def __init__(self, codebook_size: int, dim: int, **options: object) -> None:
        super().__init__(codebook_size, dim, **options)  # type: ignore[arg-type]
        self.embedding = nn.Embedding(codebook_size, dim)
        self.embedding.weight.requires_grad_(False)
        self.embedding_proj = nn.Linear(dim, dim)
        self._projected: tuple[object, Tensor, Tensor] | None = None
        self.init_weights()

    def init_weights(self) -> None:
        """Draw C from N(0, 1/d); the linear layer keeps PyTorch's default."""
        nn.init.normal_(self.embedding.weight, std=self.dim**-0.5)
        self.embedding_proj.reset_parameters()

    @torch.no_grad()
    def set_codes(self, codes: Tensor) -> None:
        """Write codes [k, d] into the frozen table and let the linear layer start as the identity."""
        self.embedding.weight.copy_(codes)
        nn.init.eye_(self.embedding_proj.weight)
        nn.init.zeros_(self.embedding_proj.bias)

    def _project(self, rows: Tensor) -> Tensor:
        """Return rows [..., d] of C as codes, in fp32."""
        return F.linear(rows.float(), self.embedding_proj.weight.float(), self.embedding_proj.bias.float())

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codes [..., d] of indices [...]; only these rows are projected."""
        return self._project(F.embedding(indices, self.embedding.weight))

    @torch.no_grad()
    def search(self, latents: Tensor) -> Tensor:
        """Return the indices [n] of the codes nearest to latents [n, d]."""
        if self.training or torch.compiler.is_compiling():
            return nearest_codes(latents, self.embedding.weight, project=self._project)
        codes, halves = self._projected_codebook()
        return nearest_codes(latents, codes, halves=halves)

    def _projected_codebook(self) -> tuple[Tensor, Tensor]:
        """Return Q [k, d] and |Q|^2/2 [k], projected again only after a parameter changed its value, place or type."""
        tensors = (self.embedding.weight, self.embedding_proj.weight, self.embedding_proj.bias)
        if any(t.is_inference() for t in tensors):  # such tensors keep no version: nothing to tell a change by
            codes = self._project(self.embedding.weight)
            return codes, half_norms(codes)
        key = tuple((t._version, t.data_ptr(), t.device, t.dtype) for t in tensors)
        if self._projected is None or self._projected[0] != key:
            codes = self._project(self.embedding.weight)
            self._projected = (key, codes, half_norms(codes))
        return self._projected[1], self._projected[2]

    def train(self, mode: bool = True) -> SimVQ:
        """Switch mode; training drops the kept projection (and its memory)."""
        if mode:
            self._projected = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_projected": None}  # copies (EMA, deepcopy) and pickles must not share or carry the cache
