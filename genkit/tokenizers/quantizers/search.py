"""Exact nearest-code search that never holds the [tokens, codes] matrix.

argmin_j |z - q_j|^2 = argmax_j (z.q_j - |q_j|^2 / 2): one fused multiply-add per block of tokens and codes, a running best, and
replacement only by a strictly larger score, so that the lowest index wins a tie as it does in the full matrix.

Legend: n tokens, k codes, d width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genkit.checks import check_shape

TOKEN_BLOCK, CODE_BLOCK = 1024, 4096  # one fp32 block of scores is 16 MB: measured best of 1 to 64 MB on one CPU thread


def half_norms(codes: Tensor) -> Tensor:
    """Return |q_j|^2 / 2 of codes [k, d] as [k]."""
    return codes.square().sum(-1).mul_(0.5)


@torch.no_grad()
def nearest_codes(
    latents: Tensor,
    codes: Tensor,
    *,
    halves: Tensor | None = None,
    project: Callable[[Tensor], Tensor] | None = None,
    token_block: int = TOKEN_BLOCK,
    code_block: int = CODE_BLOCK,
) -> Tensor:
    """Find the nearest code of each latent in Euclidean distance.

    Args:
        latents: [n, d]; computed in fp32 whatever the dtype or the autocast state.
        codes: [k, d], or [k, d'] when `project` maps blocks of them to [., d].
        halves: [k] |q|^2 / 2 of the projected codes where the caller keeps them.
        project: maps a block of rows of `codes` to the effective codes (SimVQ's linear layer).
        token_block: tokens per block, >= 1.
        code_block: codes per block, >= 1.

    Returns:
        [n] int64 indices; among equally near codes the lowest.

    Raises:
        ValueError: if the widths differ or a block size is below 1.
    """
    if token_block < 1 or code_block < 1:
        raise ValueError(f"nearest_codes: block sizes must be at least 1, got token_block={token_block}, code_block={code_block}.")
    check_shape(latents, "nearest_codes: latents", "n d", **({} if project else {"d": codes.shape[-1]}))
    with torch.autocast(latents.device.type, enabled=False):
        z = latents.float()
        best = torch.full((z.shape[0],), -torch.inf, device=z.device)
        index = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)
        for start in range(0, codes.shape[0], code_block):
            block = codes[start : start + code_block].float()
            block = project(block) if project else block
            negative = -(half_norms(block) if halves is None else halves[start : start + code_block])
            _update_best(z, block, negative, start, token_block, best, index)
    return index


def _update_best(z: Tensor, block: Tensor, negative_halves: Tensor, offset: int, token_block: int, best: Tensor, index: Tensor) -> None:
    """Let a block of codes [c, d] compete for every token of z [n, d]; updates best [n] and index [n] in place."""
    for start in range(0, z.shape[0], token_block):
        rows = slice(start, start + token_block)
        score, local = torch.addmm(negative_halves, z[rows], block.T).max(dim=1)
        better = score > best[rows]
        best[rows] = torch.where(better, score, best[rows])
        index[rows] = torch.where(better, local + offset, index[rows])
