"""Linear attention on binary codes: tokens with like codes attend to each other, as much as their codes agree.

The kernel of two codes c, c' of +-1 in B bits is c . c' + B + 1 > 0, so keys and values are summed once. The hash function is a kernel
machine on anchors and is fitted to similarities, not descended; no processor has instructions for its codes, so it saves one projection.

Source: Liu et al., EcoFormer: Energy-Saving Attention with Linear Complexity, NeurIPS 2022, arXiv 2209.09004.
Letters: b batch, n tokens, d width, hd head width, m anchors, B bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.blocks.caps import Cache, Context, TokenMixer, refuse_arguments
from genkit.blocks.heads import join_heads, split_heads
from genkit.blocks.layout import Layout
from genkit.checks import check_shape

if TYPE_CHECKING:
    from genkit.blocks.linear import LinearConfig

FIT_STEPS, FIT_RATE, FIT_MOMENTUM = 100, 5e-4, 0.9


class StraightSign(torch.autograd.Function):
    """+1 where x >= 0, else -1; the gradient passes where |x| < 1."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        """Return the signs."""
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        """Return the gradient of x."""
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0] * (x.abs() < 1)


class KernelHash(nn.Module):
    """Codes [b, heads, n, B] of +-1 of queries: signs of A g, g the similarities to anchors less their mean.

    Args:
        heads: number of heads.
        width: hd.
        bits: B.
        anchors: m.
    """

    def __init__(self, heads: int, width: int, bits: int, anchors: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(heads, bits, anchors))
        self.register_buffer("anchors", F.normalize(torch.randn(1, heads, anchors, width), dim=-1))
        self.register_buffer("mean", torch.zeros(1, heads, 1, anchors))

    weight: Tensor
    anchors: Tensor
    mean: Tensor

    def similarities(self, q: Tensor) -> Tensor:
        """Return exp(-|q - a|^2 / (2 s)) [b, heads, n, m], s the mean squared distance of a sample's head."""
        anchors = self.anchors.to(q.dtype)
        distances = q.square().sum(-1, keepdim=True) + anchors.square().sum(-1)[:, :, None] - 2 * q @ anchors.transpose(-2, -1)
        return torch.exp(-distances / (2 * distances.mean((-2, -1), keepdim=True)))

    def forward(self, q: Tensor) -> Tensor:
        """Return codes of queries [b, heads, n, hd]."""
        kernel = (self.similarities(q) - self.mean.to(q.dtype)) @ self.weight.to(q.dtype).transpose(-2, -1)
        found: Tensor = StraightSign.apply(kernel)
        return found

    @torch.no_grad()
    def fit(self, q: Tensor, anchors: Tensor, extremes: int = 10) -> Tensor:
        """Fit the hash function to which queries are alike, and return what it was fitted to: [b, heads, n, n] of -1, 0 and 1.

        Args:
            q: queries [b, heads, n, hd], unit vectors.
            anchors: which tokens [m] of the first sample become anchors.
            extremes: how many of each query's nearest and farthest count.

        Raises:
            ValueError: for another number of anchors, or more extremes than tokens.
        """
        if len(anchors) != self.anchors.shape[2] or extremes > q.shape[2]:
            wanted = f"{self.anchors.shape[2]} anchors and at most {q.shape[2]} extremes"
            raise ValueError(f"KernelHash.fit: needs {wanted}, got {len(anchors)} and {extremes}.")
        self.anchors.copy_(q[:1, :, anchors])
        kernel = self.similarities(q)
        self.mean.copy_(kernel.mean((0, 2))[None, :, None])
        kernel, products = kernel - self.mean, q @ q.transpose(-2, -1)
        alike = torch.zeros_like(products)
        alike.scatter_(-1, products.topk(extremes, dim=-1).indices, 1.0)
        alike.scatter_(-1, products.topk(extremes, dim=-1, largest=False).indices, -1.0)
        bits = self.weight.shape[1]
        rest = bits * alike

        def loss(codes: Tensor) -> Tensor:
            return -(codes[..., None, :] @ rest @ codes[..., None]).mean() / (q.shape[2] * bits)

        for bit in range(bits):
            old = self.weight[:, bit]
            new = self._fitted(old, kernel, loss)
            codes = [StraightSign.apply((kernel @ row[..., None]).squeeze(-1)) for row in (old, new)]
            if loss(codes[1]) < loss(codes[0]):
                self.weight[:, bit] = new
                codes[0] = codes[1]
            rest = rest - codes[0][..., None] * codes[0][..., None, :]
        return alike

    @staticmethod
    @torch.enable_grad()
    def _fitted(start: Tensor, kernel: Tensor, loss: object) -> Tensor:
        """Return a row [heads, m] of A after the descent of a smooth form of the loss."""
        row = nn.Parameter(start.clone())
        optimizer = torch.optim.SGD([row], lr=FIT_RATE, momentum=FIT_MOMENTUM, nesterov=True)
        for _ in range(FIT_STEPS):
            optimizer.zero_grad()
            loss(2 * torch.sigmoid((kernel @ row[..., None]).squeeze(-1)) - 1).backward()  # type: ignore[operator]
            optimizer.step()
        return row.detach()


class HashAttention(TokenMixer):
    """(c (c^T v) + (B + 1) sum v) / (c . sum c + n (B + 1)) with codes c of shared queries and keys; projections `qk`, `v` and `proj`.

    Args:
        dim: d, a multiple of heads.
        config: the options.
        heads: number of heads.
    """

    def __init__(self, dim: int, config: LinearConfig, heads: int) -> None:
        super().__init__()
        self.config: LinearConfig = config
        self.heads = heads
        self.qk, self.v = (nn.Linear(dim, dim, bias=config.qkv_bias) for _ in range(2))
        self.proj = nn.Linear(dim, dim, bias=config.out_bias)
        self.hash = KernelHash(heads, dim // heads, config.bits, config.anchors)

    def queries(self, x: Tensor) -> Tensor:
        """Return queries, which are the keys too, [b, heads, n, hd] float32 unit vectors of tokens [b, n, d]."""
        return F.normalize(split_heads(self.qk(x), self.heads).float(), dim=-1)

    def forward(
        self,
        x: Tensor,
        *,
        layout: Layout | None = None,
        context: Context | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Attend; codes depend on the mean distance to the anchors, so no mask or cache leaves tokens out.

        Args:
            x: [b, n, d].
            layout: unused; part of the protocol.
            context, mask, cache: not taken.

        Returns:
            [b, n, d].
        """
        refuse_arguments(self.config, context=context, mask=mask, cache=cache)
        sizes = check_shape(x, "HashAttention: x", "b n d", d=self.qk.in_features)
        codes, v = self.hash(self.queries(x)), split_heads(self.v(x), self.heads).float()
        offset = self.config.bits + 1
        other = v if self.config.compat else v.sum(-2, keepdim=True)
        above = codes @ (codes.transpose(-2, -1) @ v) + offset * other
        below = codes @ codes.sum(-2)[..., None] + sizes["n"] * offset
        return self.proj(join_heads(above / below).to(x.dtype))

    @torch.no_grad()
    def fit_hash(self, x: Tensor, anchors: Tensor, extremes: int = 10) -> Tensor:
        """Fit the hash function to tokens [b, n, d]; see `KernelHash.fit`."""
        return self.hash.fit(self.queries(x), anchors, extremes)

    def new_cache(self, batch: int, max_len: int, *, device: torch.device | str, dtype: torch.dtype) -> None:
        """Refuse: codes depend on all tokens."""
        refuse_arguments(self.config, cache=max_len)
