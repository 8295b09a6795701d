"""VDT's training loss: masked error of the predicted noise, and the variational bound for the variances.

loss = mean over all elements of (mask (eps - eps_hat))^2 + bound in bits with eps_hat constant; the bound is not masked.

Source: Lu et al. 2023 (arXiv 2305.13311); Nichol and Dhariwal 2021 (arXiv 2102.09672).
Letters: b clips, f frames, c channels, h w of a latent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genkit.schedulers.gaussian import GaussianDiffusion


def compose(clean: Tensor, noisy: Tensor, mask: Tensor) -> Tensor:
    """Return clips [b, f, c, h, w] that are noisy where mask [b|1, f, h, w] is True and clean elsewhere."""
    return torch.where(mask[:, :, None], noisy, clean)


def masked_loss(
    diffusion: GaussianDiffusion,
    model: Callable[[Tensor, Tensor], Tensor],
    clean: Tensor,
    noise: Tensor,
    t: Tensor,
    mask: Tensor,
    *,
    per_masked: bool = False,
) -> dict[str, Tensor]:
    """Return "mse", "vb" (where sigma is learned) and "loss" of every clip [b].

    Args:
        diffusion: the chain.
        model: (clips [b, f, c, h, w], timesteps [b] of the whole chain) -> [b, f, c', h, w].
        clean: [b, f, c, h, w].
        noise: of the same shape.
        t: [b] indices of the kept chain.
        mask: [b|1, f, h, w] bool, True = to be made.
        per_masked: divide the error by the masked share, so that all masks weigh the same; published: not.
    """
    x_t = diffusion.add_noise(clean, noise, t)
    output = model(compose(clean, x_t, mask), diffusion.timesteps.to(t.device)[t]).float()
    channels = clean.shape[2]
    eps, logits = output[:, :, :channels], output[:, :, channels:]
    target = clean if diffusion.predict_clean else noise
    hidden = mask[:, :, None].to(eps)
    mse = (hidden * (target - eps)).square().flatten(1).mean(1)
    if per_masked:
        mse = mse / mask.float().flatten(1).mean(1).clamp_min(1 / mask[0].numel())
    found = {"mse": mse, "loss": mse}
    if logits.shape[2]:
        bound = diffusion.bound_terms(clean, x_t, t, eps.detach(), logits)
        found |= {"vb": bound, "loss": mse + bound}
    return found
