"""Softmax attention on projected heads: the one place that calls PyTorch's fused kernel, or writes the softmax out where that is faster.

Letters: b batch, nq queries, nk keys, hd head width, vd value width.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from genkit.blocks.forward_mode import has_tangent


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Compute softmax(q k^T * scale + bias) v over the allowed keys.

    The softmax runs in float32 inside the kernels whatever the input's dtype. A query without any allowed key gives 0. Forward mode works;
    for second derivatives choose the kernel that has them: `with sdpa_kernel(SDPBackend.MATH)` of `torch.nn.attention`.

    Args:
        q: [b, heads, nq, hd].
        k: [b, kv_heads, nk, hd]; kv_heads divides heads, each serves heads / kv_heads neighbouring query heads.
        v: [b, kv_heads, nk, vd]; vd may differ from hd.
        bias: [b|1, heads|1, nq, nk], added to the scaled logits.
        mask: bool, True = attend. [b, nk] combines with `causal`; [b, heads|1, nq, nk] is complete and replaces it.
        causal: query i sees the keys up to nk - nq + i, so that the last query is aligned with the last key.
        scale: factor of the logits; hd ** -0.5 if None.

    Returns:
        [b, heads, nq, vd].

    Raises:
        ValueError: if the mask has the wrong shape. TypeError: if it is not bool.
    """
    nq, nk = q.shape[-2], k.shape[-2]
    if mask is not None:
        _check_mask(mask, q, nk)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grouped = k.shape[1] != q.shape[1]
    if nk == 0:
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        return (q @ k.transpose(-2, -1)) @ v  # an empty sum that still belongs to the graph
    value_width = v.shape[-1]
    q, k, v = _equal_widths(q, k, v)
    plain_causal = causal and mask is None and bias is None and nq == nk
    allowed = None if plain_causal else _allowed(mask, causal, nq, nk, q.device)
    empty = None
    if allowed is not None:
        empty = ~allowed.any(dim=-1, keepdim=True)
        allowed = allowed | empty
    logits_bias = allowed
    if bias is not None:
        logits_bias = bias.to(q.dtype)
        if allowed is not None:
            logits_bias = logits_bias.masked_fill(~allowed, float("-inf"))
    if not grouped and logits_bias is None and nq == 1 and _is_fast_product(q):
        out = _one_query(q, k, v, scale)
    elif not grouped and _explicit_is_faster(q, nk):
        if plain_causal:
            logits_bias = _allowed(None, True, nq, nk, q.device)
        out = _explicit(q, k, v, logits_bias, scale)
    else:
        with _kernels(q, k, v):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=logits_bias, is_causal=plain_causal, scale=scale, enable_gqa=grouped)
    if out.shape[-1] != value_width:
        out = out[..., :value_width]
    return out if empty is None else out.masked_fill(empty, 0.0)


def _kernels(*tensors: Tensor) -> AbstractContextManager[None]:
    """Leave the choice of the kernel to PyTorch, but in forward mode (`torch.func.jvp`) take the one that has it: fused ones do not."""
    return cast(AbstractContextManager[None], sdpa_kernel(SDPBackend.MATH)) if has_tangent(*tensors) else contextlib.nullcontext()


def _explicit_is_faster(q: Tensor, nk: int) -> bool:
    """Tell whether the written-out softmax is faster than the fused kernel.

    In bf16 on one core with AVX512-BF16, heads of 64, forward and backward (forward): 0.016 s against 0.042 (0.007 against 0.015) at 16 x 2
    heads x 256 x 256; 0.12 against 0.25 (0.04 against 0.07) at 64 x 3 x 205 x 272; 0.41 against 0.48 (0.16 against 0.19) at 4 x 8 x 1024 x
    1024. In fp32 the fused kernel wins.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return False
    return q.shape[-2] * nk <= 512 * 512 and not torch.compiler.is_compiling() and torch.cpu._is_avx512_bf16_supported()


def _is_fast_product(q: Tensor) -> bool:
    """Tell whether matrix-vector products beat the fused kernel for one query.

    19.9 ms against 26.4 at 12 x 16 heads x 4,500 keys, one thread: `eval/benchmark.py attend --batch 12 --heads 16 --queries 1 --keys 4500
    --backward false --dtype float32 --threads 1`.
    """
    return q.device.type == "cpu" and q.dtype == torch.float32 and not torch.compiler.is_compiling()


def _one_query(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Compute the softmax of one query per head, keys and values read once and in their order."""
    b, heads = q.shape[:2]
    logits = torch.bmm(k.flatten(0, 1), (q * scale).flatten(0, 1).transpose(1, 2))
    return torch.bmm(logits.transpose(1, 2).softmax(-1), v.flatten(0, 1)).unflatten(0, (b, heads))


def _explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Compute the softmax of [b, heads, nq, nk] logits written out; `bias` is bool (True = attend) or added."""
    logits = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else logits + bias
    return logits.softmax(-1) @ v


def _equal_widths(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad the narrower of (q, k) and v with zeros: exact, and keeps the fused kernels, which want equal widths."""
    missing = v.shape[-1] - q.shape[-1]
    if missing > 0:
        return F.pad(q, (0, missing)), F.pad(k, (0, missing)), v
    return q, k, F.pad(v, (0, -missing)) if missing < 0 else v


def _allowed(mask: Tensor | None, causal: bool, nq: int, nk: int, device: torch.device) -> Tensor | None:
    """Return the allowed pairs as bool, broadcastable to [b, heads, nq, nk], or None if all are allowed."""
    if mask is not None and mask.ndim == 4:
        return mask
    allowed = None if mask is None else mask[:, None, None, :]
    if causal and (nq > 1 or nk < 1):
        triangle = torch.ones(nq, nk, dtype=torch.bool, device=device).tril(nk - nq)[None, None]
        allowed = triangle if allowed is None else allowed & triangle
    return allowed


def _check_mask(mask: Tensor, q: Tensor, nk: int) -> None:
    """Check a mask's kind and shape against the queries [b, heads, nq, hd] and the number of keys."""
    if mask.dtype != torch.bool:
        raise TypeError(f"attention mask must be bool (True = attend), got {mask.dtype}; convert it with `mask.bool()`.")
    if torch.compiler.is_compiling():
        return
    b, heads, nq, _ = q.shape
    wanted = {2: ((1, b), (nk,)), 4: ((1, b), (1, heads), (1, nq), (nk,))}.get(mask.ndim, ())
    if not wanted or any(size not in sizes for size, sizes in zip(mask.shape, wanted, strict=True)):
        raise ValueError(
            f"attention mask must be [{b}, {nk}] or [{b}, 1 or {heads}, {nq}, {nk}] "
            f"(keys = context, then cached, then own tokens), got {list(mask.shape)}."
        )
