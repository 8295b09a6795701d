"""Schedulers of diffusers by name, set up for networks that predict noise on a chain of discrete steps.

Settings with which they give the numbers of the published samplers (Lu et al. 2023, arXiv 2305.13311): tables from float64 products, DDIM
with "leading" steps, no clipping, which is right for latents.
"""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import SchedulerMixin

from genkit.checks import choose, unknown
from genkit.schedulers.gaussian import SCHEDULES, float64_alphas, make_betas

SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {"variance_type": "learned_range", "timestep_spacing": "linspace"}),
    "ddim": ("DDIMScheduler", {"set_alpha_to_one": True, "steps_offset": 0, "timestep_spacing": "leading"}),
    "dpm-solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2, "timestep_spacing": "linspace"}),
    "unipc": ("UniPCMultistepScheduler", {"timestep_spacing": "linspace"}),
    "deis": ("DEISMultistepScheduler", {"timestep_spacing": "linspace"}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
    "pndm": ("PNDMScheduler", {"timestep_spacing": "leading"}),
}


def noise_scheduler(name: str, *, schedule: str = "linear", learn_sigma: bool = True, clip: bool = False, **options: Any) -> SchedulerMixin:
    """Return one of diffusers' schedulers for predicted noise.

    Args:
        name: a key of `SOLVERS`, or the name of a class of diffusers.
        schedule: "linear" (betas 1e-4 .. 0.02) or "squaredcos_cap_v2".
        learn_sigma: whether the network also predicts variances; without, "ddpm" takes the fixed large ones.
        clip: keep estimates of the sample in [-1, 1], for pixels; schedulers without that option refuse.
        **options: of the class, before ours.

    Raises:
        ValueError: for an unknown name, with the nearest.
        TypeError: for options that the class does not have.
    """
    import diffusers

    kind, own = SOLVERS.get(name, (name, {}))
    cls = getattr(diffusers, kind, None)
    if not (inspect.isclass(cls) and issubclass(cls, SchedulerMixin)):
        raise ValueError(unknown(name, SOLVERS, "scheduler") + " The name of a scheduler class of diffusers works too.")
    accepted = inspect.signature(cls.__init__).parameters
    settings: dict[str, Any] = {"num_train_timesteps": 1000, "prediction_type": "epsilon", **own}
    settings |= {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": choose(schedule, SCHEDULES, "noise schedule")}
    if name == "ddpm" and not learn_sigma:
        settings["variance_type"] = "fixed_large"
    if "clip_sample" in accepted:
        settings["clip_sample"] = clip
    elif clip:
        raise ValueError(f"scheduler {name!r} cannot clip its estimates; leave clip out, or use 'ddpm' or 'ddim'.")
    settings |= options
    refused = sorted(settings.keys() - accepted.keys())
    if refused:
        raise TypeError(f"scheduler {name!r} ({kind}) takes no {', '.join(refused)}; it takes {', '.join(sorted(accepted))}.")
    return exact_tables(cls(**settings))


def on_the_chain_of(pipe: Any, name: str) -> SchedulerMixin:
    """Return a scheduler for a pipeline's transformer: the noise schedule and prediction type of the pipeline's own.

    Args:
        pipe: with `scheduler`, and a `transformer` whose configuration has `learn_sigma`.
        name: as `noise_scheduler` takes it.
    """
    config = pipe.scheduler.config
    options = {"learn_sigma": pipe.transformer.config["learn_sigma"], "prediction_type": config.get("prediction_type", "epsilon")}
    return noise_scheduler(name, schedule=config.get("beta_schedule", "linear"), **options)


def exact_tables(scheduler: Any) -> Any:
    """Give a scheduler of diffusers its products in float64, where its betas are those of a schedule known here; return it."""
    config = scheduler.config
    if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr") or not hasattr(scheduler, "alphas_cumprod"):
        return scheduler
    if config.get("beta_schedule") == "linear":
        return float64_alphas(scheduler)
    if config.get("beta_schedule") == "squaredcos_cap_v2":
        return float64_alphas(scheduler, make_betas("squaredcos_cap_v2", config["num_train_timesteps"]))
    return scheduler
