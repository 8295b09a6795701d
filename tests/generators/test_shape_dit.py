"""ShapeDiT: sets in, sets out; exact shortcuts; the way to official files and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.convert import shape_dit
from genkit.generators.shape_dit import ShapeDiT
from genkit.pipelines.shape_flow import flow_steps
from genkit.schedulers.flow_matching import FlowMatchingScheduler
from genkit.weights import read_safetensors

GOLDEN = Path(__file__).parent.parent / "parity/goldens/flashvdm/dit_guidance_turbo/weights.safetensors"
SIZES = {"in_channels": 4, "context_in_dim": 6, "hidden_size": 32, "num_heads": 4, "depth": 2, "depth_single": 2}


def network(**options: Any) -> ShapeDiT:
    """A small network whose zeroed layers are not zero."""
    torch.manual_seed(0)
    model = ShapeDiT(**{**SIZES, **options}).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def draws(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def test_tokens_are_sets() -> None:
    model, (x, context) = network(), draws((2, 7, 4), (2, 5, 6))
    t = torch.tensor([0.2, 0.9])
    out = model(x, t, context).sample
    order, other = torch.randperm(7), torch.randperm(5)
    torch.testing.assert_close(model(x[:, order], t, context).sample, out[:, order], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(model(x, t, context[:, other]).sample, out, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 300])
def test_one_token_stands_for_equal_ones(count: int) -> None:
    model, (x, context) = network(), draws((2, 7, 4), (2, 1, 6))
    many = model(x, 0.4, context.expand(-1, count, -1)).sample
    torch.testing.assert_close(model(x, 0.4, context, context_count=count).sample, many, atol=2e-5, rtol=1e-4)
    if count == 300:  # the count matters
        assert (model(x, 0.4, context).sample - many).abs().max() > 1e-3


def test_masked_tokens_are_not_there() -> None:
    model, (x, context) = network(), draws((2, 7, 4), (2, 5, 6))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    out = model(x, 0.4, context, encoder_attention_mask=mask).sample
    torch.testing.assert_close(out[:1], model(x[:1], 0.4, context[:1]).sample, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(out[1:], model(x[1:], 0.4, context[1:, :2]).sample, atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="encoder_attention_mask"):
        model(x, 0.4, context, encoder_attention_mask=mask[:, :3])


def test_modulations_of_all_steps_at_once() -> None:
    model, (x, context) = network(guidance_embed=True), draws((2, 7, 4), (2, 5, 6))
    times, scales = torch.tensor([0.0, 0.3, 0.7]), torch.tensor([5.0, 5.0, 5.0])
    rows = model.modulations(times, scales)
    for i, t in enumerate(times):
        expected = model(x, t, context, scales[:1].expand(2)).sample
        own = [row[i : i + 1] for row in rows]
        torch.testing.assert_close(model(x, t, context, modulations=own).sample, expected, atol=1e-5, rtol=1e-4)


def test_gradients_reach_everything_and_checkpointing_keeps_them() -> None:
    model, (x, context) = network().train().requires_grad_(True), draws((2, 7, 4), (2, 5, 6))
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(x, torch.tensor([0.1, 0.8]), context).sample.square().mean().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.enable_gradient_checkpointing()
    # the last two-stream block's condition still feeds the one-stream blocks, so every weight has a gradient
    assert grads[0].keys() == dict(model.named_parameters()).keys()
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value)


def test_an_untrained_network_is_still() -> None:
    (x, context) = draws((1, 3, 4), (1, 2, 6))
    assert not ShapeDiT(**SIZES)(x, 0.5, context).sample.any()


def test_half_precision_keeps_time_in_float32() -> None:
    model, (x, context) = network(), draws((1, 7, 4), (1, 5, 6))
    exact, t = network().double(), 0.7371
    with torch.no_grad():
        reference = exact(x.double(), t, context.double()).sample
        half = network().to(torch.bfloat16)(x.bfloat16(), t, context.bfloat16()).sample.double()
    assert model(x, t, context).sample.dtype == torch.float32
    assert ((half - reference).norm() / reference.norm()) < 0.05


def test_errors_name_what_was_given() -> None:
    model, (x, context) = network(), draws((2, 7, 4), (2, 5, 6))
    with pytest.raises(ValueError, match="takes no guidance scale"):
        model(x, 0.5, context, torch.ones(2))
    with pytest.raises(ValueError, match="takes a guidance scale"):
        network(guidance_embed=True)(x, 0.5, context)
    with pytest.raises(ValueError, match="one condition token that stands for several, got 5"):
        model(x, 0.5, context, context_count=5)
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        model(x, 0.5, context[..., :3])
    with pytest.raises(ValueError, match="multiple of num_heads, got 10 and 4"):
        ShapeDiT(**{**SIZES, "hidden_size": 10})


@pytest.mark.parametrize("prefix", ["", "model.", "_forward_module.model."])
def test_official_keys_come_back_as_they_were(prefix: str) -> None:
    state = read_safetensors(GOLDEN)
    given = {prefix + key: value for key, value in state.items()} | ({"vae.post_kl.weight": torch.zeros(1)} if prefix == "model." else {})
    assert shape_dit.recognise({key: tuple(value.shape) for key, value in given.items()})
    model, report = shape_dit.from_official(given)
    back = shape_dit.to_official(model)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    assert model.config["guidance_embed"] and len(report.mapped) == len(state)


class Counted(torch.nn.Module):
    """Counts the calls of a network."""

    def __init__(self, model: ShapeDiT) -> None:
        super().__init__()
        self.calls: list[int] = []
        model.register_forward_hook(lambda module, args, output: self.calls.append(args[2].shape[1]))


def test_the_loop_makes_no_call_for_nothing() -> None:
    model, (noise, context) = network(), draws((2, 7, 4), (2, 5, 6))
    counted, scheduler = Counted(model), FlowMatchingScheduler()
    scheduler.set_timesteps(4)
    steps = list(flow_steps(model, scheduler, noise, context, 3.0))
    assert counted.calls == [5, 1] * 3 and len(steps) == 4
    x = noise  # as published: both branches at full length, four calls
    for i, t in enumerate(scheduler.timesteps / 1000):
        with_, without = (model(x, t, tokens).sample for tokens in (context, torch.zeros_like(context)))
        x = scheduler.step(without + 3 * (with_ - without), i, x).prev_sample
    torch.testing.assert_close(steps[-1].prev_sample, x, atol=2e-5, rtol=1e-4)


def test_guidance_off_asks_once() -> None:
    model, (noise, context) = network(), draws((1, 7, 4), (1, 5, 6))
    counted, scheduler = Counted(model), FlowMatchingScheduler(steps="consistency", phases=100)
    scheduler.set_timesteps(5)
    assert len(list(flow_steps(model, scheduler, noise, context))) == 5 and counted.calls == [5] * 5
