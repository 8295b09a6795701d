"""Saliency of hidden units, and models without the least of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from genkit.blocks.mlp import MLP, MLPConfig
from genkit.blocks.pruning import Saliency, cut_units, pruned
from genkit.generators.enat import ENATTransformer2DModel
from genkit.generators.nat import NATTransformer2DModel

SIZES: dict[str, Any] = {"sample_size": 4, "hidden_size": 16, "num_heads": 2, "codebook_size": 8, "num_classes": 2, "mlp_ratio": 2}


def model(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    if kind == "nat":
        found: Any = NATTransformer2DModel(**SIZES, depth=2, **options)
    else:
        found = ENATTransformer2DModel(**SIZES, num_encoder_layers=1, num_decoder_layers=1, **options)
    for parameter in found.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return found.eval()


def logits(net: Any) -> torch.Tensor:
    ids = torch.arange(16).remainder(9)[None].repeat(2, 1)
    found: torch.Tensor = net(ids, net.prepare_condition(torch.tensor([0, 1]))).logits
    return found


@pytest.mark.parametrize("gated", [False, True, "product"])
def test_cut_units_are_what_the_others_would_be_without_the_rest(gated: Any) -> None:
    torch.manual_seed(0)
    mlp, x = MLPConfig(hidden=6, gated=gated, act="silu").build(4), torch.randn(2, 3, 4)
    kept = torch.tensor([0, 2, 5])
    small = cut_units(mlp, kept)
    mlp.fc2.weight.data[:, [1, 3, 4]] = 0
    assert_close(small(x), mlp(x))
    with pytest.raises(ValueError, match="units must be among 0 .. 5"):
        cut_units(mlp, torch.tensor([6]))


@pytest.mark.parametrize("kind", ["nat", "enat"])
def test_units_that_do_nothing_go_first_and_nothing_changes(kind: str, tmp_path: Path) -> None:
    net = model(kind)
    names = [name for name, part in net.named_modules() if isinstance(part, MLP) and name.startswith("blocks.")]
    idle = {name: torch.randperm(32, generator=torch.Generator().manual_seed(i))[:16] for i, name in enumerate(names)}
    for name, units in idle.items():
        mlp = net.get_submodule(name)
        mlp.fc2.weight.data[:, units] = 0
        mlp.fc1.weight.data[units] = 0
        mlp.fc1.bias.data[units] = 0
    before = logits(net)
    before.square().sum().backward()
    saliency = Saliency(net)
    saliency.update()
    kept = saliency.keep(0.5, group=4)
    assert list(kept) == names
    for name, units in kept.items():
        assert not set(units.tolist()) & set(idle[name].tolist())
    small = pruned(net, kept)
    assert_close(logits(small), before, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    small.save_pretrained(tmp_path)
    again: Any = type(net).from_pretrained(tmp_path)
    assert_close(logits(again), logits(small))


def test_widths_follow_the_saliency_and_bad_requests_are_refused() -> None:
    net = model("nat")
    with pytest.raises(ValueError, match="behind backward"):
        Saliency(net).update()
    saliency = Saliency(net)
    with pytest.raises(ValueError, match="updates done"):
        saliency.keep(0.5)
    saliency.batches = 1
    first, *others = saliency.scores
    for name in others:
        saliency.scores[name][:] = 1
    counts = {name: len(units) for name, units in saliency.keep(0.5, group=4).items()}
    assert counts[first] == 4 and sum(counts.values()) <= 0.5 * sum(map(len, saliency.scores.values()))
    with pytest.raises(ValueError, match="no MLPs of the blocks"):
        pruned(net, {"head": torch.tensor([0])})
    with pytest.raises(TypeError, match="no stack string"):
        pruned(torch.nn.Linear(2, 2), {})
    with pytest.raises(ValueError, match="no mlp mixers"):
        Saliency(torch.nn.Linear(2, 2))


def test_an_enat_takes_a_stack_of_attention_to_both_and_a_channel_mixer() -> None:
    text = "attention(keys='both') + mlp(nested=(0.5, 1)), attention(keys='both') + memory(bits=4)"
    net = model("enat", stack=text)
    assert logits(net).isfinite().all() and net.config["stack"] == text
    for wrong, message in (
        ("(attention + mlp) * 2", r"got attention \+ mlp"),
        ("(attention(keys='both') + attention) * 2", "and a channel mixer"),
        ("attention(keys='both') + mlp", "got 1 blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            model("enat", stack=wrong)
