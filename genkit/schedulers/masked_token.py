"""Masked-token decoding schedule: how many tokens a step reveals, which ones, and at which temperatures.

Serves ENAT (Ni et al. 2024, arXiv 2411.06959: cosine rule, linear guidance and temperatures) and AutoNAT or MaskGIT
(Ni et al. 2024, arXiv 2406.05478: explicit lists per step, `from_strategy` reads the released YAML files).

- only masked tokens are looked at: logits come as [b, k, K] for the k tokens that are still masked
- token counts are Python integers known in advance, so that a step never waits for the device
- every draw is an argument: one uniform per token (inverse CDF) or full Gumbel noise, and Gumbel noise for confidences
- partly filled grids (inpainting) follow the same rule, counted from the tokens that were masked at the start

Legend: b batch, n tokens of the grid, k masked tokens, K codes, s step index counted from 0, T number of steps,
rho = (s + 1) / T the part of the schedule that is done after step s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from genkit.checks import check_shape, choose

RULES = ("cosine", "lists")
GUIDANCE_RULES = ("linear", "constant", "lists")


@dataclass
class MaskedTokenOutput(BaseOutput):
    """What one step returns.

    Args:
        ids: [b, n] int64, the grid after the step; tokens that stay masked hold the mask id.
        masked_index: [b, k2] int64, positions that stay masked, in raster order.
        revealed_index: [b, k - k2] int64, positions that this step filled, in raster order.
        confidence: [b, k] noisy log-probability of the drawn token at each position of the step's `masked_index`.
    """

    ids: Tensor
    masked_index: Tensor
    revealed_index: Tensor
    confidence: Tensor


def cosine_counts(num_masked: int, num_steps: int) -> list[int]:
    """Return floor(num_masked cos(pi rho / 2)) after each step, in double precision.

    Where T is divisible by 3 the cosine meets an integer (rho = 2/3 gives exactly half), so the precision is part of the rule.
    """
    counts = [math.floor(num_masked * math.cos(math.pi / 2 * (s + 1) / num_steps)) for s in range(num_steps)]
    return [*counts[:-1], 0]


def list_counts(num_masked: int, ratios: Sequence[float]) -> list[int]:
    """Return max(1, min(masked - 1, floor(num_masked ratio_s))) after each step and 0 after the last (AutoNAT)."""
    counts, masked = [], num_masked
    for ratio in ratios:
        masked = min(masked, max(1, min(masked - 1, math.floor(num_masked * ratio))))
        counts.append(masked)
    return [*counts, 0]


def guide(cond: Tensor, uncond: Tensor, guidance: float) -> Tensor:
    """Return cond + (guidance - 1) (cond - uncond) in fp32, so that guidance 1 is exactly `cond`."""
    cond = cond.float()
    return cond if guidance == 1 else cond + (guidance - 1) * (cond - uncond.float())


def draw_tokens(log_probs: Tensor, temperature: float, *, uniforms: Tensor | None = None, gumbel: Tensor | None = None) -> Tensor:
    """Draw one code per token from softmax(log_probs / temperature).

    Args:
        log_probs: [b, k, K] fp32.
        temperature: > 0.
        uniforms: [b, k] in [0, 1): inverse of the cumulative distribution, 9 times cheaper than Gumbel noise at K = 1024.
        gumbel: [b, k, K] standard Gumbel noise: argmax of log_probs / temperature + gumbel.

    Returns:
        Codes [b, k] int64.

    Raises:
        ValueError: unless exactly one of `uniforms` and `gumbel` is given.
    """
    if (uniforms is None) == (gumbel is None):
        raise ValueError("MaskedTokenScheduler.step: give either token_uniforms [b, k] or token_gumbel [b, k, K], not both or none.")
    scaled = log_probs / temperature
    if gumbel is not None:
        check_shape(gumbel, "MaskedTokenScheduler.step: token_gumbel", "b k K", **dict(zip("bkK", log_probs.shape, strict=True)))
        return (scaled + gumbel).argmax(-1)
    assert uniforms is not None
    check_shape(uniforms, "MaskedTokenScheduler.step: token_uniforms", "b k", b=log_probs.shape[0], k=log_probs.shape[1])
    cumulative = scaled.softmax(-1).cumsum(-1)
    total = cumulative[..., -1:]
    # The largest uniform times the total may round up to the total: stay below it, so that no code of probability 0 is drawn.
    wanted = torch.minimum(uniforms.to(total)[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(-1)


class MaskedTokenScheduler(SchedulerMixin, ConfigMixin):
    """Decide after each step which masked tokens keep their drawn code and which stay masked.

    Args:
        mask_token_id: id that marks a masked token (the number of codes, by convention).
        rule: how many tokens stay masked: 'cosine', or 'lists' (then `mask_ratios` is needed and fixes the number of steps).
        guidance: 'linear' (published ENAT: grows from off in step 0), 'constant', or 'lists' (`guidance_scales`).
        token_temperature: temperature of the code draw before step 0, falls linearly to 0.
        mask_temperature: factor of the Gumbel noise on confidences before step 0, falls linearly to 0.
        token_temperature_floor: lowest temperature of the code draw.
        mask_ratios: T - 1 fractions of the initially masked tokens that stay masked after steps 0 .. T - 2.
        guidance_scales: T guidance factors, 1 = off.
        token_temperatures: T temperatures, instead of the linear fall.
        mask_temperatures: T - 1 noise factors, instead of the linear fall; the last step has no noise.

    Raises:
        ValueError: for an unknown rule, a missing or empty list, lists that disagree about the number of steps, or values out of range.

    Example:
        >>> scheduler = MaskedTokenScheduler(mask_token_id=1024)
        >>> scheduler.set_timesteps(8)
        >>> scheduler.masked_counts(256)
        [251, 236, 212, 181, 142, 97, 49, 0]
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        *,  # diffusers forgets values passed by position when a scheduler is rebuilt from its config
        mask_token_id: int,
        rule: str = "cosine",
        guidance: str = "linear",
        token_temperature: float = 6.0,
        mask_temperature: float = 1.5,
        token_temperature_floor: float = 1e-3,
        mask_ratios: Sequence[float] | None = None,
        guidance_scales: Sequence[float] | None = None,
        token_temperatures: Sequence[float] | None = None,
        mask_temperatures: Sequence[float] | None = None,
    ) -> None:
        choose(rule, RULES, "masking rule")
        choose(guidance, GUIDANCE_RULES, "guidance rule")
        self._check_ranges(token_temperature, mask_temperature, token_temperature_floor, mask_ratios)
        if (rule == "lists") != (mask_ratios is not None):
            raise ValueError(f"MaskedTokenScheduler: mask_ratios belong to rule='lists', got rule={rule!r} and mask_ratios={mask_ratios}.")
        if (guidance == "lists") != (guidance_scales is not None):
            raise ValueError(
                f"MaskedTokenScheduler: guidance_scales belong to guidance='lists', got guidance={guidance!r} and {guidance_scales}."
            )
        lists = {"mask_ratios": (mask_ratios, 1), "guidance_scales": (guidance_scales, 0)}
        lists |= {"token_temperatures": (token_temperatures, 0), "mask_temperatures": (mask_temperatures, 1)}
        steps = {name: len(values) + extra for name, (values, extra) in lists.items() if values is not None}
        if len(set(steps.values())) > 1:
            raise ValueError(f"MaskedTokenScheduler: the lists must describe one number of steps, got {steps}.")
        self.listed_steps: int | None = next(iter(steps.values()), None)
        self.num_inference_steps: int | None = None
        self.timesteps: Tensor = torch.empty(0, dtype=torch.int64)
        self._start_temperatures = (token_temperature, mask_temperature)
        if self.listed_steps is not None:
            self.set_timesteps(self.listed_steps)

    @staticmethod
    def _check_ranges(token: float, mask: float, floor: float, ratios: Sequence[float] | None) -> None:
        for name, value, ok in (
            ("token_temperature", token, token >= 0),
            ("mask_temperature", mask, mask >= 0),
            ("token_temperature_floor", floor, floor > 0),
        ):
            if not ok:
                raise ValueError(f"MaskedTokenScheduler: {name} must be {'> 0' if 'floor' in name else '>= 0'}, got {value}.")
        if ratios is not None and not all(0 <= ratio <= 1 for ratio in ratios):
            raise ValueError(f"MaskedTokenScheduler: mask_ratios must lie in [0, 1], got {list(ratios)}.")

    @classmethod
    def from_strategy(cls, strategy: str | Path | Mapping[str, Any], mask_token_id: int) -> MaskedTokenScheduler:
        """Build the scheduler of a released AutoNAT strategy.

        Args:
            strategy: YAML file or its content, with the keys `manual_ratios` (T - 1), `manual_temp` (T - 1),
                `manual_samp_temp` (T) and `manual_cfg` (T, 0 = off as published).
            mask_token_id: id that marks a masked token.

        Raises:
            ValueError: if a key is missing or `gen_steps` contradicts the lists.
        """
        if isinstance(strategy, (str, Path)):
            import yaml

            content: Any = yaml.safe_load(Path(strategy).read_text(encoding="utf-8"))
        else:
            content = strategy
        needed = ("manual_ratios", "manual_temp", "manual_samp_temp", "manual_cfg")
        missing = [key for key in needed if not isinstance(content, Mapping) or key not in content]
        if missing:
            raise ValueError(f"MaskedTokenScheduler.from_strategy: expected the keys {list(needed)}, missing {missing}.")
        ratios, temp, samp_temp, cfg = ([float(value) for value in content[key]] for key in needed)
        scheduler = cls(
            mask_token_id=mask_token_id,
            rule="lists",
            guidance="lists",
            token_temperature_floor=1e-4,
            mask_ratios=ratios,
            guidance_scales=[1 + value for value in cfg],
            token_temperatures=samp_temp,
            mask_temperatures=temp,
        )
        steps = content.get("gen_steps", scheduler.listed_steps)
        if steps != scheduler.listed_steps:
            raise ValueError(
                f"MaskedTokenScheduler.from_strategy: gen_steps is {steps}, the lists describe {scheduler.listed_steps} steps."
            )
        return scheduler

    def set_timesteps(
        self, num_inference_steps: int, *, token_temperature: float | None = None, mask_temperature: float | None = None
    ) -> None:
        """Choose the number of steps, and for this run other start temperatures than the config's.

        Raises:
            ValueError: if there is no step, or the config's lists describe another number of steps or the temperature in question.
        """
        if num_inference_steps < 1:
            raise ValueError(f"MaskedTokenScheduler.set_timesteps: num_inference_steps must be at least 1, got {num_inference_steps}.")
        if self.listed_steps not in (None, num_inference_steps):
            raise ValueError(
                f"MaskedTokenScheduler.set_timesteps: the config's lists describe {self.listed_steps} steps, got {num_inference_steps}; "
                f"use {self.listed_steps} or a scheduler without lists."
            )
        for name, value in (("token_temperature", token_temperature), ("mask_temperature", mask_temperature)):
            if value is not None and getattr(self.config, f"{name}s") is not None:
                raise ValueError(f"MaskedTokenScheduler.set_timesteps: {name} is fixed by the list {name}s of the config; leave it out.")
            if value is not None and value < 0:
                raise ValueError(f"MaskedTokenScheduler.set_timesteps: {name} must be >= 0, got {value}.")
        self._start_temperatures = (
            self.config.token_temperature if token_temperature is None else token_temperature,
            self.config.mask_temperature if mask_temperature is None else mask_temperature,
        )
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps)

    def _num_steps(self, step: int) -> int:
        if self.num_inference_steps is None:
            raise RuntimeError("MaskedTokenScheduler: call set_timesteps(num_inference_steps) first.")
        if not 0 <= step < self.num_inference_steps:
            raise ValueError(f"MaskedTokenScheduler: step must lie in 0 .. {self.num_inference_steps - 1}, got {step}.")
        return self.num_inference_steps

    def masked_counts(self, num_masked: int) -> list[int]:
        """Return how many tokens are masked after each step, of `num_masked` at the start; the last entry is 0."""
        num_steps = self._num_steps(0)
        if self.config.rule == "lists":
            return list_counts(num_masked, self.config.mask_ratios)
        return cosine_counts(num_masked, num_steps)

    def guidance_at(self, s: int, guidance_scale: float | None = None) -> float:
        """Return the guidance factor of step s, 1 = off.

        The linear rule gives 1 + (guidance_scale - 1) s / T: off in step 0, and the full scale is never reached.

        Raises:
            ValueError: if the scale is missing, below 1, or given although the config lists one per step.
        """
        num_steps = self._num_steps(s)
        if (guidance_scale is None) != (self.config.guidance == "lists"):
            raise ValueError(
                f"MaskedTokenScheduler.guidance_at: guidance={self.config.guidance!r} "
                f"{'fixes the factor of each step; leave guidance_scale out' if guidance_scale is not None else 'needs guidance_scale'}."
            )
        if guidance_scale is None:
            return float(self.config.guidance_scales[s])
        if not guidance_scale >= 1:
            raise ValueError(f"MaskedTokenScheduler.guidance_at: guidance_scale must be at least 1 (1 = off), got {guidance_scale}.")
        return guidance_scale if self.config.guidance == "constant" else 1 + (guidance_scale - 1) * s / num_steps

    def token_temperature_at(self, s: int) -> float:
        """Return the temperature of the code draw in step s, never below the floor."""
        num_steps, listed = self._num_steps(s), self.config.token_temperatures
        temperature = listed[s] if listed is not None else self._start_temperatures[0] * (1 - (s + 1) / num_steps)
        return max(temperature, self.config.token_temperature_floor)

    def mask_temperature_at(self, s: int) -> float:
        """Return the factor of the confidence noise in step s; 0 in the last step."""
        num_steps, listed = self._num_steps(s), self.config.mask_temperatures
        if s == num_steps - 1:
            return 0.0
        return listed[s] if listed is not None else self._start_temperatures[1] * (1 - (s + 1) / num_steps)

    def step(
        self,
        logits: Tensor,
        s: int,
        ids: Tensor,
        masked_index: Tensor,
        *,
        token_uniforms: Tensor | None = None,
        token_gumbel: Tensor | None = None,
        confidence_gumbel: Tensor | None = None,
        num_masked: int | None = None,
    ) -> MaskedTokenOutput:
        """Draw a code for every masked token and keep the most confident ones.

        confidence = log p(code) + mask_temperature gumbel, with p before the temperature; the tokens of lowest confidence stay masked.

        Args:
            logits: [b, k, K] guided logits or log-probabilities at `masked_index`.
            s: step index.
            ids: [b, n] int64 grid that was fed in this step.
            masked_index: [b, k] int64, the masked positions of `ids`, in raster order.
            token_uniforms: [b, k] in [0, 1), one draw per token; or
            token_gumbel: [b, k, K] standard Gumbel noise.
            confidence_gumbel: [b, k] standard Gumbel noise; needed while the mask temperature is above 0.
            num_masked: tokens that were masked before step 0; all n if left out.

        Returns:
            The new grid, the positions that stay masked and those that were filled, both in raster order, and the confidences.

        Raises:
            ValueError: for wrong shapes, missing noise, or fewer masked tokens than the schedule needs at this step.

        Source: ENAT 2024, section 3; MaskGIT 2022, section 3.2.
        """
        sizes = check_shape(logits, "MaskedTokenScheduler.step: logits", "b k K")
        check_shape(masked_index, "MaskedTokenScheduler.step: masked_index", "b k", b=sizes["b"], k=sizes["k"])
        check_shape(ids, "MaskedTokenScheduler.step: ids", "b n", b=sizes["b"])
        num_left = self.masked_counts(ids.shape[1] if num_masked is None else num_masked)[s]
        if num_left > sizes["k"]:
            raise ValueError(
                f"MaskedTokenScheduler.step: {num_left} tokens must stay masked after step {s}, but only {sizes['k']} are masked; "
                "pass num_masked, the number of tokens that were masked before step 0."
            )
        log_probs = logits.float().log_softmax(-1)
        tokens = draw_tokens(log_probs, self.token_temperature_at(s), uniforms=token_uniforms, gumbel=token_gumbel)
        confidence = log_probs.gather(-1, tokens[..., None]).squeeze(-1)
        if temperature := self.mask_temperature_at(s):
            if confidence_gumbel is None:
                raise ValueError(f"MaskedTokenScheduler.step: step {s} has mask temperature {temperature:g}: confidence_gumbel is needed.")
            check_shape(confidence_gumbel, "MaskedTokenScheduler.step: confidence_gumbel", "b k", b=sizes["b"], k=sizes["k"])
            confidence = confidence + temperature * confidence_gumbel.to(confidence)
        order = confidence.argsort(dim=1, stable=True)
        left = masked_index.gather(1, order[:, :num_left].sort(dim=1).values)
        revealed = masked_index.gather(1, order[:, num_left:].sort(dim=1).values)
        filled = ids.scatter(1, masked_index, tokens).scatter(1, left, self.config.mask_token_id)
        return MaskedTokenOutput(ids=filled, masked_index=left, revealed_index=revealed, confidence=confidence)
