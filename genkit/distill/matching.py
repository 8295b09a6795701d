"""How a student learns from the difference of two denoisers: SIM, SiD, Diff-Instruct, DMD.

At x_t = x_0 + sigma n, x_0 the student's picture, a teacher predicts D_q and a critic, trained on the student's pictures, D_psi.

SIM       -w <d'(y), D_psi - x_0>, y = D_psi - D_q, d a distance (pseudo-Huber, squared, absolute); gradients flow through both networks
SiD       (D_q - D_psi) ((D_q - x_0) - alpha (D_q - D_psi)) / mean |x_0 - D_q|, likewise; alpha = 1 is SIM with the squared distance
Diff-Instruct  (D_psi - D_q) x_0, the networks constant
DMD       x_0 moves along g = (D_psi - D_q) / mean |x_0 - D_q|, the networks constant

Sources: Luo et al. 2024 (SIM, arXiv 2410.16794), Zhou et al. 2024 (SiD, arXiv 2404.04057), Luo et al. 2023 (arXiv 2305.18455), Yin et al.
2024 (DMD2, arXiv 2405.14867).
Letters: b batch; the other axes are those of a picture or latent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from genkit.checks import choose
from genkit.distill.denoising import Denoiser, per_sample

SPACES = {"x0": 0, "eps": 1, "score": 2}  # y and the second factor are divided by this power of sigma
HUBER = 0.00054  # times the square root of the number of elements: the width consistency models use, taken for SIM's unpublished one


class MatchingRule:
    """A student's loss on one draw.

    Attributes:
        needs_jacobian: whether gradients flow through the networks; else they are constants and are evaluated without a graph.
    """

    needs_jacobian: ClassVar[bool] = True

    def __call__(self, x_0: Tensor, critic: Tensor, teacher: Tensor, sigma: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return the loss of every sample [b], summed over its elements, fp32.

        Args:
            x_0: [b, ...] the student's pictures.
            critic: [b, ...] D_psi.
            teacher: [b, ...] D_q.
            sigma: [b] noise levels.
            scale: [b] further weights of the samples, constant.
        """
        loss = self.loss(x_0.float(), critic.float(), teacher.float(), sigma.float())
        return loss if scale is None else loss * scale

    def loss(self, x_0: Tensor, critic: Tensor, teacher: Tensor, sigma: Tensor) -> Tensor:
        """Return the loss of every sample [b]."""
        raise NotImplementedError


def normaliser(x_0: Tensor, teacher: Tensor) -> Tensor:
    """Return mean |x_0 - D_q| of every sample [b], constant and not below 1e-5."""
    return (x_0 - teacher).detach().abs().flatten(1).mean(1).clamp_min(1e-5)


@dataclass(frozen=True)
class SIM(MatchingRule):
    """Score implicit matching.

    Args:
        distance: "pseudo_huber" (sqrt(|y|^2 + c^2) - c, the norm over the whole sample), "l2" or "l1".
        c: of the pseudo-Huber distance; None takes 0.00054 times the square root of the number of elements of a sample.
        space: what y is a difference of: "x0" (pictures), "eps" (noise) or "score".
        sigma_power: weight sigma^p.
        normalise: weight 0.5 / mean |x_0 - D_q|, with which "l2" is SiD at alpha = 1.
    """

    distance: Literal["pseudo_huber", "l2", "l1"] = "pseudo_huber"
    c: float | None = None
    space: Literal["x0", "eps", "score"] = "x0"
    sigma_power: float = 0.0
    normalise: bool = False

    def __post_init__(self) -> None:
        choose(self.distance, ("pseudo_huber", "l2", "l1"), "distance")
        choose(self.space, SPACES, "space")
        if self.c is not None and self.c <= 0:
            raise ValueError(f"SIM: c must be above 0, got {self.c}.")

    def loss(self, x_0: Tensor, critic: Tensor, teacher: Tensor, sigma: Tensor) -> Tensor:
        """Return -w <d'(y), r>."""
        power = per_sample(sigma, x_0) ** SPACES[self.space]
        y, r = (critic - teacher) / power, (critic - x_0) / power
        if self.distance == "l2":
            slope = 2 * y
        elif self.distance == "l1":
            slope = y.sign()
        else:
            c = HUBER * y[0].numel() ** 0.5 if self.c is None else self.c
            slope = y / per_sample((y.flatten(1).square().sum(1) + c**2).sqrt(), y)
        weight = sigma**self.sigma_power
        if self.normalise:
            weight = weight * 0.5 / normaliser(x_0, teacher)
        return -weight * (slope * r).flatten(1).sum(1)


@dataclass(frozen=True)
class SiD(MatchingRule):
    """Score identity distillation; alpha 1.2 as published, 1.0 on AFHQ."""

    alpha: float = 1.2

    def loss(self, x_0: Tensor, critic: Tensor, teacher: Tensor, sigma: Tensor) -> Tensor:
        """Return the loss; it is no distance and may be negative."""
        delta = teacher - critic
        return (delta * ((teacher - x_0) - self.alpha * delta)).flatten(1).sum(1) / normaliser(x_0, teacher)


@dataclass(frozen=True)
class DiffInstruct(MatchingRule):
    """Integral KL: x_0 moves along D_psi - D_q."""

    needs_jacobian: ClassVar[bool] = False

    def loss(self, x_0: Tensor, critic: Tensor, teacher: Tensor, sigma: Tensor) -> Tensor:
        """Return <D_psi - D_q, x_0>."""
        return ((critic - teacher).detach() * x_0).flatten(1).sum(1)


@dataclass(frozen=True)
class DMD(MatchingRule):
    """Distribution matching: the same direction, normalised per sample, as a squared error towards a constant target."""

    needs_jacobian: ClassVar[bool] = False

    def __call__(self, x_0: Tensor, critic: Tensor, teacher: Tensor, sigma: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return the loss; a scale multiplies the direction, as f-distill's weights do."""
        x_0, critic, teacher = x_0.float(), critic.float(), teacher.float()
        norm = (x_0 - teacher).detach().abs().flatten(1).mean(1) + 1e-6
        direction = (critic - teacher).detach() / per_sample(norm if scale is None else norm / scale, x_0)
        return 0.5 * (x_0 - (x_0 - direction).detach()).square().flatten(1).sum(1)


RULES: dict[str, type[MatchingRule]] = {"sim": SIM, "sid": SiD, "diff_instruct": DiffInstruct, "dmd": DMD}


def make_rule(name: str, **options: Any) -> MatchingRule:
    """Build a rule by name.

    Args:
        name: key of `RULES`.
        **options: of its constructor.

    Raises:
        ValueError: for an unknown name or impossible values. TypeError: for unknown options.
    """
    choose(name, RULES, "matching rule")
    return RULES[name](**options)


@contextlib.contextmanager
def constant(*modules: nn.Module) -> Iterator[None]:
    """Freeze parameters for a while, so that graphs through the modules keep nothing for them."""
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def watch(x_0: Tensor, critic: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """Return statistics to watch: `distance`, mean |x_0 - D_q|, and `difference`, the norm of D_psi - D_q, each a mean over samples."""
    x_0, critic, teacher = (x.detach().float() for x in (x_0, critic, teacher))
    return {"distance": normaliser(x_0, teacher).mean(), "difference": (critic - teacher).flatten(1).norm(dim=1).mean()}


def matching_loss(
    rule: MatchingRule, x_0: Tensor, noise: Tensor, sigma: Tensor, critic: Denoiser, teacher: Denoiser, scale: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a rule's loss [b] with the graph through both networks where the rule needs it (the naive way, three graphs at once), and the
    statistics of `watch`.
    """
    x_t = x_0 + per_sample(sigma, x_0) * noise
    with torch.set_grad_enabled(rule.needs_jacobian):
        at_critic, at_teacher = critic(x_t, sigma), teacher(x_t, sigma)
    return rule(x_0, at_critic, at_teacher, sigma, scale), watch(x_0, at_critic, at_teacher)


def matching_gradient(
    rule: MatchingRule, x_0: Tensor, noise: Tensor, sigma: Tensor, critic: Denoiser, teacher: Denoiser, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return a rule's loss and its gradient with respect to the student's pictures, with one network's graph in memory at a time.

    Exact: both predictions are computed first, the loss gives their cotangents and the direct part of the gradient, then each network's
    vector-Jacobian product is added. One evaluation of the critic more than the naive way.

    Args:
        rule: the rule.
        x_0: [b, ...] pictures; their own graph is not used.
        noise: [b, ...] standard normal.
        sigma: [b] levels.
        critic, teacher: denoisers, their parameters frozen.
        scale: [b] further weights.

    Returns:
        Losses [b], gradient of their sum [b, ...] fp32, and the statistics of `watch`.
    """
    x_0 = x_0.detach()
    x_t = x_0 + per_sample(sigma, x_0) * noise
    with torch.no_grad():
        at_critic = critic(x_t, sigma)
    with torch.set_grad_enabled(rule.needs_jacobian):
        x_q = x_t.clone().requires_grad_(rule.needs_jacobian)
        at_teacher = teacher(x_q, sigma)
    with torch.enable_grad():
        leaves = [x.detach().float().requires_grad_() for x in (x_0, at_critic, at_teacher)]
        losses = rule(leaves[0], leaves[1], leaves[2], sigma, scale)
        gradient, to_critic, to_teacher = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
        if rule.needs_jacobian:
            gradient = gradient + torch.autograd.grad(at_teacher, x_q, to_teacher.to(at_teacher.dtype))[0].float()
            x_psi = x_t.clone().requires_grad_()
            again = critic(x_psi, sigma)
            gradient = gradient + torch.autograd.grad(again, x_psi, to_critic.to(again.dtype))[0].float()
    return losses.detach(), gradient, watch(x_0, at_critic, at_teacher)


def hand_over(x_0: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
    """Return a scalar of a given value whose gradient with respect to x_0 is the given one."""
    surrogate = (x_0.float() * gradient).sum()
    return surrogate - surrogate.detach() + value
