"""The sampling loop of shape generators, without calls that change nothing.

- time, guidance and modulations of all steps are computed at once, in fp32 up to the layers
- the unconditional branch sees one zero token that counts as many times as there are condition tokens: the published zero tokens, exactly
- an empty last interval of the scheduler's grid costs no call

Letters: b shapes, n latent tokens, c channels, m condition tokens, w their width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from genkit.generators.shape_dit import ShapeDiT
from genkit.schedulers.flow_matching import FlowMatchingScheduler, FlowStepOutput


@dataclass(frozen=True)
class ShapeFlow:
    """The velocity of shapes at the times of a run, with guidance.

    Args:
        transformer: the network.
        times: of the steps, 0 .. 1.
        context: [b, m, w] condition tokens.
        guidance_scale: 1 = off.
        vectors: modulations of all steps.
    """

    transformer: ShapeDiT
    times: Tensor
    context: Tensor
    guidance_scale: float
    vectors: list[Tensor]

    @classmethod
    def of(cls, transformer: ShapeDiT, scheduler: FlowMatchingScheduler, context: Tensor, guidance_scale: float = 1.0) -> ShapeFlow:
        """Prepare a run after `set_timesteps`; arguments as in `flow_steps`."""
        times = scheduler.timesteps.to(context.device) / scheduler.config["num_train_timesteps"]
        scales = torch.full_like(times, guidance_scale) if transformer.config["guidance_embed"] else None
        return cls(transformer, times, context, guidance_scale, transformer.modulations(times, scales))

    def velocity(self, sample: Tensor, index: int) -> Tensor:
        """Return the velocity [b, n, c] of samples at a step."""
        own, t, context = [rows[index : index + 1] for rows in self.vectors], self.times[index], self.context
        found = self.transformer(sample, t, context, modulations=own).sample
        if self.guidance_scale == 1 or self.transformer.config["guidance_embed"]:
            return found
        null = context.new_zeros(len(context), 1, context.shape[-1])
        without = self.transformer(sample, t, null, context_count=context.shape[1], modulations=own).sample
        return without + self.guidance_scale * (found - without)


def flow_steps(
    transformer: ShapeDiT, scheduler: FlowMatchingScheduler, noise: Tensor, context: Tensor, guidance_scale: float = 1.0
) -> Iterator[FlowStepOutput]:
    """Yield every step of a run from noise to latents.

    Args:
        transformer: the velocity field.
        scheduler: after `set_timesteps`.
        noise: [b, n, c].
        context: [b, m, w] condition tokens.
        guidance_scale: 1 = off; an input of the network where it was guidance-distilled.
    """
    flow, sample = ShapeFlow.of(transformer, scheduler, context, guidance_scale), noise
    for i in range(len(flow.times)):
        step = FlowStepOutput(prev_sample=sample, pred_original_sample=sample)
        if scheduler.interval(i):
            step = scheduler.step(flow.velocity(sample, i), i, sample)
        sample = step.prev_sample
        yield step
