"""Sampling of shapes against the plain loop: both branches of guidance at full length, modulations in every step, the empty last call."""

from typing import Literal

import torch
from _timing import machine, report, timed
from torch import Tensor

from genkit.generators.shape_dit import ShapeDiT
from genkit.pipelines.shape_flow import flow_steps
from genkit.schedulers.flow_matching import FlowMatchingScheduler


@torch.no_grad()
def plain_loop(model: ShapeDiT, noise: Tensor, context: Tensor, steps: int, guidance_scale: float) -> Tensor:
    """Sample as the released loop does: [condition; zeros] as one batch, one call per entry of the table."""
    scheduler = FlowMatchingScheduler()
    scheduler.set_timesteps(steps)
    both = torch.cat([context, torch.zeros_like(context)])
    sample = noise
    for i, timestep in enumerate(scheduler.timesteps):
        times = (timestep / 1000).to(noise.device).expand(2 * len(noise))
        found, without = model(torch.cat([sample, sample]), times, both).sample.chunk(2)
        sample = scheduler.step(without + guidance_scale * (found - without), i, sample).prev_sample
    return sample.float()


@torch.no_grad()
def exact_loop(model: ShapeDiT, noise: Tensor, context: Tensor, steps: int, guidance_scale: float) -> Tensor:
    """Sample without what changes nothing."""
    scheduler = FlowMatchingScheduler()
    scheduler.set_timesteps(steps)
    *_, last = flow_steps(model, scheduler, noise, context, guidance_scale)
    return last.prev_sample.float()


def shape(
    width: int = 1024,
    heads: int = 16,
    depth: int = 1,
    depth_single: int = 2,
    latents: int = 512,
    context: int = 1370,
    steps: int = 5,
    guidance_scale: float = 5.0,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    threads: int = 0,
    repeats: int = 3,
) -> None:
    """Time the sampling of one shape's latents with guidance.

    Args:
        width: of the transformer; the released ones have 1024.
        heads: of its attentions.
        depth: two-stream blocks; the released ones have 8 or 16.
        depth_single: one-stream blocks; the released ones have 16 or 32.
        latents: tokens of a shape, 512 or 3072.
        context: tokens of the condition, 1370 of one picture.
        steps: of the scheduler.
        guidance_scale: of both ways.
        device: cpu, cuda or mps.
        dtype: of the weights.
        threads: CPU threads; 0 leaves PyTorch's choice.
        repeats: timed runs of each way.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = ShapeDiT(hidden_size=width, num_heads=heads, depth=depth, depth_single=depth_single).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    model = model.to(device, getattr(torch, dtype))
    noise = torch.randn(1, latents, 64).to(device, model.dtype)
    tokens = torch.randn(1, context, 1536).to(device, model.dtype)
    ways = {
        "plain": lambda: plain_loop(model, noise, tokens, steps, guidance_scale),
        "genkit": lambda: exact_loop(model, noise, tokens, steps, guidance_scale),
    }
    blocks = f"{depth} + {depth_single} blocks x {width}, {latents} latent and {context} condition tokens"
    print(f"{blocks}, {steps} steps, {dtype}; {machine(device)}")
    report(timed(ways, repeats, device), 1, "shapes")
