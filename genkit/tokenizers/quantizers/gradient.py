"""How a gradient passes a quantizer: straight through, or along the rotation that maps the latent to its code."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def straight_through(latents: Tensor, codes: Tensor) -> Tensor:
    """Return the codes' value with the latents' gradient: z + sg(q - z).

    Args:
        latents: [..., d].
        codes: [..., d].

    Source: van den Oord et al. 2017, section 3.2 (arXiv 1711.00937).
    """
    return latents + (codes - latents).detach()


def rotation_trick(latents: Tensor, codes: Tensor, eps: float = 1e-6) -> Tensor:
    """Return the codes' value with a gradient that is rotated and scaled as the latent is.

    (|q|/|e|) (e - 2 w (w.e) + 2 v (u.e)), u = e/|e|, v = q/|q|, w = (u + v)/|u + v|; u, v, w and the ratio carry no gradient.

    Args:
        latents: [..., d].
        codes: [..., d].
        eps: lower bound of the norms, so that zero latents and opposite directions stay finite.

    Source: Fifty et al. 2024, section 4 (arXiv 2410.06424).
    """
    with torch.no_grad():
        norm_e = latents.norm(dim=-1, keepdim=True).clamp_min(eps)
        norm_q = codes.norm(dim=-1, keepdim=True).clamp_min(eps)
        u, v = latents / norm_e, codes / norm_q
        w = u + v
        w = w / w.norm(dim=-1, keepdim=True).clamp_min(eps)
        ratio = norm_q / norm_e
    reflected = latents - 2 * w * (w * latents).sum(-1, keepdim=True) + 2 * v * (u * latents).sum(-1, keepdim=True)
    return ratio * reflected


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"straight_through": straight_through, "rotation": rotation_trick}
