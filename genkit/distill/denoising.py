"""Denoising score matching: how teachers and critics learn.

loss = weight(sigma) (D(x_0 + sigma noise; sigma) - x_0)^2, per element. Source: Karras et al. 2022 (arXiv 2206.00364), equation 2; a critic
takes the student's pictures for x_0.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(noisy pictures [b, ...], levels [b]) -> denoised pictures [b, ...], with its condition bound."""


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Return values [b] with axes of size 1 behind, to multiply samples [b, ...]."""
    return values.view(-1, *[1] * (like.ndim - 1))


def denoising_loss(denoiser: Denoiser, clean: Tensor, noise: Tensor, sigma: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted squared error of every element.

    Args:
        denoiser: the network.
        clean: [b, ...] pictures; no gradient reaches what made them.
        noise: [b, ...] standard normal.
        sigma: [b] levels.
        weight: [b].

    Returns:
        [b, ...] fp32; sum over a sample and mean over the batch as published.
    """
    clean = clean.detach()
    denoised = denoiser(clean + per_sample(sigma, clean) * noise, sigma)
    return per_sample(weight, clean) * (denoised.float() - clean.float()) ** 2
