"""The sampling loop of shape generators, without calls that change nothing.

- time, guidance and modulations of all steps are computed at once, in fp32 up to the layers
- the unconditional branch sees one zero token that counts as many times as there are condition tokens: the published zero tokens, exactly
- an empty last interval of the scheduler's grid costs no call

Letters: b shapes, n latent tokens, c channels, m condition tokens, w their width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from genkit.generators.shape_dit import ShapeDiT
from genkit.schedulers.flow_matching import FlowMatchingScheduler, FlowStepOutput


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
    embedded = transformer.config["guidance_embed"]
    times = scheduler.timesteps.to(noise.device) / scheduler.config["num_train_timesteps"]
    scales = torch.full_like(times, guidance_scale) if embedded else None
    vectors = transformer.modulations(times, scales)
    null = context.new_zeros(len(context), 1, context.shape[-1])
    sample = noise
    for i in range(len(times)):
        if scheduler.interval(i) == 0:
            yield FlowStepOutput(prev_sample=sample, pred_original_sample=sample)
            continue
        own = [rows[i : i + 1] for rows in vectors]
        velocity = transformer(sample, times[i], context, modulations=own).sample
        if guidance_scale != 1 and not embedded:
            without = transformer(sample, times[i], null, context_count=context.shape[1], modulations=own).sample
            velocity = without + guidance_scale * (velocity - without)
        step = scheduler.step(velocity, i, sample)
        sample = step.prev_sample
        yield step
