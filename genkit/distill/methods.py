"""Distillation methods as compositions: which networks take part, and what is descended in which order in one step.

| name | student learns from | critic | pictures |
|---|---|---|---|
| sim, sid, diff_instruct, dmd | the rules of `matching` | denoising score matching on the student's pictures | none |
| dmd2, f_distill | DMD (f_distill weighs it by an f-divergence) and an adversarial term on the critic's activations | the same | real |
| consistency_distillation, consistency_training | `consistency` | none | real |
| mean_flow | `mean_flow` | none | real |

A method's `step` is a generator of phases, as a task's is, and reads like the algorithm box of its paper.

Sources: those of `matching`, `consistency`, `adversarial` and `mean_flow`.
Letters: b batch, l width of the condition; the other axes are those of a picture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from genkit.checks import choose
from genkit.distill import adversarial, consistency
from genkit.distill.denoising import Denoiser, denoising_loss, per_sample
from genkit.distill.levels import KarrasLevels, Levels, LogNormalLevels, edm_weight, make_levels
from genkit.distill.matching import DMD, MatchingRule, constant, hand_over, make_rule, matching_gradient, matching_loss
from genkit.distill.mean_flow import MeanVelocity, mean_flow_loss, velocity_and_derivative
from genkit.training.task import Phase


@dataclass
class Work:
    """What a method has to work with in one step, all conditions bound.

    Attributes:
        student: G as a denoiser, to be trained; a method that needs only its pictures calls `generate`.
        teacher: frozen, guided as configured.
        critic: trained on the student's pictures, or None.
        critic_as_input: the critic where only gradients of its input are wanted.
        mean_velocity: the student as an average velocity, for MeanFlow.
        generate: (noise [b, ...], whether to keep the graph) -> the student's pictures.
        bottleneck: (x, sigma, whether the critic is trained) -> the critic's lowest activations.
        head: discriminator on them, or None; head_as_input: the same where only gradients of its input are wanted.
        networks: those that are trained beside the student, by role, to freeze for a while.
        images: [b, ...] real pictures, or None.
        normal: name -> standard normal draws [b, ...] of a picture's shape, which belong to samples.
        scalar: (name, "normal" or "uniform") -> draws [b], which belong to samples.
        step: finished steps; seen: samples trained on.
        sigma_data: standard deviation of the data.
    """

    student: Denoiser
    teacher: Denoiser
    generate: Callable[[Tensor, bool], Tensor]
    normal: Callable[[str], Tensor]
    scalar: Callable[[str, str], Tensor]
    networks: Mapping[str, nn.Module]
    step: int = 0
    seen: int = 0
    critic: Denoiser | None = None
    critic_as_input: Denoiser | None = None
    mean_velocity: MeanVelocity | None = None
    bottleneck: Callable[[Tensor, Tensor, bool], Tensor] | None = None
    head: nn.Module | None = None
    head_as_input: nn.Module | None = None
    images: Tensor | None = None
    sigma_data: float = 0.5

    def levels(self, name: str, law: Levels) -> Tensor:
        """Draw noise levels [b]."""
        return law.sigma(self.scalar(name, law.draws))


@dataclass
class UpdatePlan:
    """The order of updates.

    Args:
        critic_updates: of the critic in one step, before the student's.
        student_start: steps in which only the critic learns.
        reuse: the student step takes the pictures that the last critic step had, instead of new ones.
        sequential: one network's graph in memory at a time (exact); else all at once.
    """

    critic_updates: int = 1
    student_start: int = 0
    reuse: bool = True
    sequential: bool = True

    def __post_init__(self) -> None:
        if self.critic_updates < 1 or self.student_start < 0:
            given = f"critic_updates={self.critic_updates}, student_start={self.student_start}"
            raise ValueError(f"update plan: at least one critic update per step, and a start of at least 0, got {given}.")


class Method(ABC):
    """One objective.

    Attributes:
        uses: roles beside the student: "teacher", "critic", "head" (discriminator), "images" (real pictures), and "two_times" where the
            student is a network of two times.
        sigma_init: noise level of one-step generation, unless the recipe says otherwise.
    """

    uses: ClassVar[frozenset[str]] = frozenset({"teacher"})
    sigma_init: ClassVar[float] = 2.5

    @abstractmethod
    def step(self, work: Work) -> Iterator[Phase]:
        """Yield the phases of one step, each for the optimizer of the role it trains."""

    def level_range(self) -> tuple[float, float]:
        """Return the noise levels at which the teacher will be asked."""
        return 0.0, float("inf")


@dataclass
class Adversarial:
    """An adversarial term on the critic's lowest activations.

    Args:
        weight: of the student's loss.
        critic_weight: of the discriminator's loss in the critic's step.
        divergence: weigh DMD by this f-divergence of the discriminator, or None.
    """

    weight: float = 1e-3
    critic_weight: float = 1e-2
    divergence: str | None = None

    def __post_init__(self) -> None:
        if self.divergence is not None:
            choose(self.divergence, adversarial.F_DIVERGENCES, "f-divergence")


@dataclass
class ScoreMatching(Method):
    """SIM, SiD, Diff-Instruct and DMD; with an adversarial term DMD2 and f-distill.

    Args:
        rule: how the student learns.
        levels: law of the noise levels at which it does.
        critic_levels: law of those at which the critic learns.
        plan: order of the updates.
        gan: adversarial term, or None.
    """

    rule: MatchingRule
    levels: Levels = field(default_factory=KarrasLevels)
    critic_levels: Levels = field(default_factory=LogNormalLevels)
    plan: UpdatePlan = field(default_factory=UpdatePlan)
    gan: Adversarial | None = None

    def __post_init__(self) -> None:
        self.uses = frozenset({"teacher", "critic", *(("head", "images") if self.gan else ())})  # type: ignore[misc]
        if self.gan and self.rule.needs_jacobian:
            raise ValueError("an adversarial term goes with DMD's rule, whose networks are constants; choose rule dmd.")

    def level_range(self) -> tuple[float, float]:
        """Return the ends of a bounded law."""
        if self.levels.draws == "normal":
            return 0.0, float("inf")
        ends = self.levels.sigma(torch.tensor([0.0, 1.0])).tolist()
        return min(ends), max(ends)

    def step(self, work: Work) -> Iterator[Phase]:
        """Update the critic on the student's pictures, then the student on what both denoisers say of them."""
        plan, picture = self.plan, torch.empty(0)
        for i in range(plan.critic_updates):
            picture = work.generate(work.normal(f"z_critic{i}"), False)
            yield self.critic_phase(work, picture, i)
        if work.step >= plan.student_start:
            yield self.student_phase(work, picture if plan.reuse else None)

    def critic_phase(self, work: Work, picture: Tensor, i: int) -> Phase:
        """Return the critic's loss: denoise the student's pictures, and tell them from real ones."""
        assert work.critic is not None
        sigma, noise = work.levels(f"critic_level{i}", self.critic_levels), work.normal(f"critic_noise{i}")
        loss = denoising_loss(work.critic, picture, noise, sigma, edm_weight(sigma, work.sigma_data)).mean()
        logs: dict[str, Tensor | float] = {"denoising": loss.detach()}
        if self.gan:
            found = self.discriminator(work, picture, sigma, noise)
            loss, logs["discriminator"] = loss + self.gan.critic_weight * found, found.detach()
        return Phase("critic", loss, logs)

    def discriminator(self, work: Work, picture: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """Return the discriminator's loss on noisy real and generated pictures."""
        assert work.bottleneck is not None
        assert work.head is not None
        assert work.images is not None
        both = torch.cat([work.images, picture]) + per_sample(torch.cat([sigma, sigma]), picture) * torch.cat([noise, noise])
        real, fake = work.head(work.bottleneck(both, torch.cat([sigma, sigma]), True)).chunk(2)
        return adversarial.discriminator_loss(real, fake)

    def student_phase(self, work: Work, picture: Tensor | None) -> Phase:
        """Return the student's loss, as a scalar whose gradient reaches the student alone."""
        assert work.critic_as_input is not None
        name = f"z_critic{self.plan.critic_updates - 1}" if picture is not None else "z_student"
        z, sigma, noise = work.normal(name), work.levels("level", self.levels), work.normal("noise")
        size, others = noise.numel(), list(work.networks.values())
        with constant(*others):
            if self.plan.sequential or self.needs_weights:
                picture = work.generate(z, False) if picture is None else picture
            scale = self.weights(work, picture, sigma, noise)
            made = work.generate(z, True)
            if self.plan.sequential:
                assert picture is not None
                losses, gradient, watched = matching_gradient(self.rule, picture, noise, sigma, work.critic_as_input, work.teacher, scale)
                loss = hand_over(made, gradient / size, losses.sum() / size)
            else:
                losses, watched = matching_loss(self.rule, made, noise, sigma, work.critic_as_input, work.teacher, scale)
                loss = losses.sum() / size
            logs: dict[str, Tensor | float] = {**watched, "std": made.detach().float().std(0).mean()}
            return self.with_adversary(work, Phase("student", loss, logs), made, sigma, noise)

    @property
    def needs_weights(self) -> bool:
        """Whether DMD's direction is weighed by an f-divergence."""
        return self.gan is not None and self.gan.divergence is not None

    def weights(self, work: Work, picture: Tensor | None, sigma: Tensor, noise: Tensor) -> Tensor | None:
        """Return f-distill's weights [b] of DMD's direction, or None."""
        if self.gan is None or self.gan.divergence is None or picture is None:
            return None
        assert work.bottleneck is not None
        assert work.head_as_input is not None
        if len(picture) < 2:
            raise ValueError("f-distill divides its weights by their mean over the batch, got a batch of one; use at least 2 per process.")
        with torch.no_grad():
            logits = work.head_as_input(work.bottleneck(picture + per_sample(sigma, picture) * noise, sigma, False))
        return adversarial.f_divergence_weight(logits, self.gan.divergence)

    def with_adversary(self, work: Work, phase: Phase, made: Tensor, sigma: Tensor, noise: Tensor) -> Phase:
        """Add the student's adversarial loss."""
        if not self.gan:
            return phase
        assert work.bottleneck is not None
        assert work.head_as_input is not None
        found = adversarial.generator_loss(work.head_as_input(work.bottleneck(made + per_sample(sigma, made) * noise, sigma, False)))
        return Phase(phase.optimizer, phase.loss + self.gan.weight * found, {**phase.logs, "adversarial": found.detach()})


@dataclass
class Consistency(Method):
    """Consistency distillation (with a teacher) or training (without): `generate` at sigma_max makes a picture in one step.

    Args:
        distil: follow the teacher's flow to the earlier point; else take the same noise.
        levels: law of the later level.
        stage_length: samples of a stage of the curriculum, after which r is nearer to t.
        weighting, huber_c, squared: see `consistency_loss`.
    """

    sigma_init: ClassVar[float] = 80.0
    distil: bool = True
    levels: Levels = field(default_factory=lambda: LogNormalLevels(-1.1, 2.0))
    stage_length: int = 12_500_000
    weighting: str = "default"
    huber_c: float | None = None
    squared: bool = False

    def __post_init__(self) -> None:
        choose(self.weighting, consistency.WEIGHTINGS, "weighting")
        self.uses = frozenset({"images", *(("teacher",) if self.distil else ())})  # type: ignore[misc]

    def step(self, work: Work) -> Iterator[Phase]:
        """Bring the student's pictures at two neighbouring points of a trajectory together."""
        assert work.images is not None
        ratio = consistency.stage_ratio(work.seen, self.stage_length)
        t, noise = work.levels("level", self.levels).clamp(0.004, self.sigma_init).double(), work.normal("noise")
        r = consistency.earlier_level(t, ratio)
        x_t = work.images + per_sample(t, noise).float() * noise
        x_r = consistency.euler_step(x_t, t, r, work.teacher) if self.distil else work.images + per_sample(r, noise).float() * noise
        found, loss = consistency.consistency_loss(
            work.student, x_t, x_r, t, r, weighting=self.weighting, huber_c=self.huber_c, squared=self.squared
        )
        yield Phase("student", loss.mean().float(), {"distance": found.mean(), "ratio": ratio})


@dataclass
class MeanFlow(Method):
    """MeanFlow from real pictures; the student is an average velocity u(x_t, r, t).

    Args:
        different: share of samples with r below t; the others are plain flow matching.
        mean, std: of the logit-normal law of both times.
        power, c, on_tangent: see `mean_flow_loss`.
        warmup_steps: over which the derivative comes in.
    """

    uses: ClassVar[frozenset[str]] = frozenset({"images", "two_times"})
    different: float = 0.5
    mean: float = -0.4
    std: float = 1.0
    power: float = 1.0
    c: float = 1e-3
    on_tangent: bool = False
    warmup_steps: int = 0

    def step(self, work: Work) -> Iterator[Phase]:
        """Regress the average velocity on its own identity."""
        assert work.images is not None
        assert work.mean_velocity is not None
        first, second = ((work.scalar(name, "normal") * self.std + self.mean).sigmoid() for name in ("t", "r"))
        t, r = torch.maximum(first, second), torch.minimum(first, second)
        r = torch.where(work.scalar("different", "uniform") < self.different, r, t)
        noise = work.normal("noise")
        velocity = noise - work.images
        x_t = work.images + per_sample(t, noise) * velocity
        u, derivative = velocity_and_derivative(work.mean_velocity, x_t, r, t, velocity)
        warmup = min(1.0, (work.step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        options: dict[str, Any] = {"power": self.power, "c": self.c, "warmup": warmup, "on_tangent": self.on_tangent}
        loss, _ = mean_flow_loss(u, derivative.detach(), velocity, r, t, **options)
        yield Phase("student", loss.mean().float(), {"error": (u - velocity).detach().float().square().mean()})


def _matching(name: str, defaults: Mapping[str, Any] | None = None) -> Callable[..., ScoreMatching]:
    """Return the builder of a method around a matching rule, with the rule's options and those of the composition together."""

    def build(
        plan: Mapping[str, Any] | None = None,
        levels: Mapping[str, Any] | None = None,
        critic_levels: Mapping[str, Any] | None = None,
        gan: Mapping[str, Any] | None = None,
        **rule: Any,
    ) -> ScoreMatching:
        base = dict(defaults or {})
        parts: dict[str, Any] = {"plan": UpdatePlan(**{**base.get("plan", {}), **(plan or {})})}
        if law := levels or base.get("levels"):
            parts["levels"] = make_levels(**law)
        if critic_levels:
            parts["critic_levels"] = make_levels(**critic_levels)
        if "gan" in base or gan:
            parts["gan"] = Adversarial(**{**base.get("gan", {}), **(gan or {})})
        return ScoreMatching(make_rule(name, **rule), **parts)

    return build


def _consistency(distil: bool) -> Callable[..., Consistency]:
    def build(levels: Mapping[str, Any] | None = None, **options: Any) -> Consistency:
        parts: dict[str, Any] = {"levels": make_levels(**levels)} if levels else {}
        return Consistency(distil, **parts, **options)

    return build


_DMD_LEVELS = {"name": "karras", "first": 0.02, "last": 0.98}
METHODS: dict[str, Callable[..., Method]] = {
    "sim": _matching("sim"),
    "sid": _matching("sid"),
    "diff_instruct": _matching("diff_instruct", {"levels": {"name": "lognormal"}}),
    "dmd": _matching("dmd", {"levels": _DMD_LEVELS}),
    "dmd2": _matching("dmd", {"levels": _DMD_LEVELS, "plan": {"critic_updates": 5}, "gan": {}}),
    "f_distill": _matching("dmd", {"levels": _DMD_LEVELS, "plan": {"critic_updates": 5}, "gan": {"divergence": "js"}}),
    "consistency_distillation": _consistency(True),
    "consistency_training": _consistency(False),
    "mean_flow": MeanFlow,
}


def make_method(name: str, **options: Any) -> Method:
    """Build a method by name.

    Args:
        name: key of `METHODS`.
        **options: of its parts: those of its rule, `levels`, `critic_levels`, `plan`, `gan`.

    Raises:
        ValueError: for an unknown name or impossible values. TypeError: for unknown options.
    """
    choose(name, METHODS, "distillation method")
    return METHODS[name](**options)


__all__ = ["DMD", "METHODS", "Adversarial", "Consistency", "MeanFlow", "Method", "ScoreMatching", "UpdatePlan", "Work", "make_method"]
