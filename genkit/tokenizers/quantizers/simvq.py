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
    """Nearest row of Q = C W^T + b, C [k, f] random and frozen, W and b learned.

    Args:
        codebook_size: number of codes k.
        dim: width d.
        frozen_dim: f; d if None, as published.
        bias: whether there is b, as published; a second public implementation has none.
        hidden: width of a ReLU layer between C and Q; None for the one linear layer.
        **options: beta, beta_on, gradient; see `VectorQuantizerBase`.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        frozen_dim: int | None = None,
        bias: bool = True,
        hidden: int | None = None,
        **options: object,
    ) -> None:
        super().__init__(codebook_size, dim, **options)  # type: ignore[arg-type]
        width = dim if frozen_dim is None else frozen_dim
        self.embedding = nn.Embedding(codebook_size, width)
        self.embedding.weight.requires_grad_(False)
        self.embedding_proj: nn.Linear | nn.Sequential = nn.Linear(width, dim, bias=bias)
        if hidden is not None:
            self.embedding_proj = nn.Sequential(nn.Linear(width, hidden, bias=bias), nn.ReLU(), nn.Linear(hidden, dim, bias=bias))
        self._projected: tuple[object, Tensor, Tensor] | None = None
        self.init_weights()

    def init_weights(self) -> None:
        """Draw C from N(0, 1/f); linear layers keep PyTorch's default."""
        nn.init.normal_(self.embedding.weight, std=self.embedding.weight.shape[1] ** -0.5)
        for layer in self.embedding_proj.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    @torch.no_grad()
    def set_codes(self, codes: Tensor) -> None:
        """Write codes [k, d] into the frozen table and let the linear layer start as the identity.

        Raises:
            ValueError: if the map from table to codes cannot be the identity.
        """
        layer = self.embedding_proj
        if not isinstance(layer, nn.Linear) or layer.in_features != layer.out_features:
            raise ValueError(
                "simvq: codes can be written where one linear layer maps the table to codes of its own width (no hidden, no frozen_dim)."
            )
        self.embedding.weight.copy_(codes)
        nn.init.eye_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)

    def _project(self, rows: Tensor) -> Tensor:
        """Return rows [..., f] of C as codes, in fp32."""
        found = rows.float()
        for layer in [self.embedding_proj] if isinstance(self.embedding_proj, nn.Linear) else self.embedding_proj:
            if isinstance(layer, nn.Linear):
                found = F.linear(found, layer.weight.float(), None if layer.bias is None else layer.bias.float())
            else:
                found = layer(found)
        return found

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
        tensors = (self.embedding.weight, *self.embedding_proj.parameters())
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
