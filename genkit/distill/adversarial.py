"""Adversarial terms of distillation: non-saturating and hinge losses on logits, and f-distill's weights.

Sources: Goodfellow et al. 2014 (arXiv 1406.2661), Yin et al. 2024 (DMD2, arXiv 2405.14867), Xu et al. 2025 (f-distill, arXiv 2502.15681).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.checks import choose

# h(r) of the density ratio r = p / q between real and generated pictures
F_DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "rkl": torch.ones_like,
    "kl": lambda r: r,
    "js": lambda r: 1 - 1 / (1 + r),
    "sf": lambda r: 1 / (1 + r),
    "sh": torch.sqrt,
    "jf": lambda r: 1 + r,
    "neyman": lambda r: 1 / r,
}
"""Reverse KL (DMD itself), KL, Jensen-Shannon, softened reverse KL, squared Hellinger, Jeffreys, Neyman chi^2."""


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Return mean softplus(-logit): the student wants its pictures to pass for real."""
    return F.softplus(-fake_logits.float()).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return mean softplus(-real) + mean softplus(fake)."""
    return F.softplus(-real_logits.float()).mean() + F.softplus(fake_logits.float()).mean()


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """Return mean -logit."""
    return -fake_logits.float().mean()


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return mean relu(1 - real) + mean relu(1 + fake)."""
    return F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean()


def least_square_generator_loss(fake_logits: Tensor) -> Tensor:
    """Return mean logit^2."""
    return fake_logits.float().square().mean()


def least_square_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return mean (1 - real)^2 + mean (1 + fake)^2."""
    return (1 - real_logits.float()).square().mean() + (1 + fake_logits.float()).square().mean()


def non_saturating_generator_loss(fake_logits: Tensor) -> Tensor:
    """Return mean softplus(-m), m the mean logit of each picture."""
    return generator_loss(_by_picture(fake_logits))


def non_saturating_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return mean softplus(-m_real) + mean softplus(m_fake), m the mean logit of each picture."""
    return discriminator_loss(_by_picture(real_logits), _by_picture(fake_logits))


def _by_picture(logits: Tensor) -> Tensor:
    """Return the mean logit [b] of logits [b, ...]."""
    return logits.float().reshape(len(logits), -1).mean(1)


GAN_FORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "vanilla": (generator_loss, discriminator_loss),
    "hinge": (hinge_generator_loss, hinge_discriminator_loss),
    "least_square": (least_square_generator_loss, least_square_discriminator_loss),
    "non_saturating": (non_saturating_generator_loss, non_saturating_discriminator_loss),
}
"""The generator's and the discriminator's loss by name; image tokenizers take half of the second, but of "non_saturating"."""


def density_ratio(fake_logits: Tensor) -> Tensor:
    """Return exp of the mean logit of every generated sample [b], the logit kept in [-10, 10]."""
    return fake_logits.detach().float().flatten(1).mean(1).clamp(-10, 10).exp()


def f_divergence_weight(fake_logits: Tensor, divergence: str, normalise: bool = True) -> Tensor:
    """Return weights [b] of DMD's direction for an f-divergence.

    Args:
        fake_logits: [b, ...] of a discriminator on generated samples.
        divergence: key of `F_DIVERGENCES`.
        normalise: divide by the mean over the batch.

    Raises:
        ValueError: for an unknown divergence.
    """
    h = F_DIVERGENCES[choose(divergence, F_DIVERGENCES, "f-divergence")](density_ratio(fake_logits))
    return h / h.mean() if normalise else h
