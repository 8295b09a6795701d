"""Adapters: nothing at the start, all that is trained, and where they stand."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch.testing import assert_close

from genkit.blocks import stack
from genkit.blocks.adapter import Adapter, add_adapters
from genkit.blocks.branch import Block


def block(**options: Any) -> Block:
    torch.manual_seed(0)
    return cast(Block, stack.build("attention + mlp", 8, heads=2, **options)[0]).eval()


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
@pytest.mark.parametrize("residual", ["pre", "post", "sandwich"])
def test_a_new_adapter_changes_nothing_and_is_all_that_learns(mode: str, residual: str) -> None:
    plain, adapted, x = block(residual=residual), block(residual=residual), torch.randn(2, 5, 8)
    trained = add_adapters(adapted, 3, mode=mode)
    assert torch.equal(adapted(x), plain(x))
    adapted(x).square().sum().backward()
    with_gradient = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in adapted.named_parameters() if ".adapter." in name} and len(trained) == len(with_gradient)
    assert plain.state_dict().keys() == {key for key in adapted.state_dict() if ".adapter." not in key}


def test_adapters_stand_beside_the_branch_or_behind_the_mixer() -> None:
    x = torch.randn(2, 5, 8)
    for mode in ("parallel", "sequential"):
        adapted = block()
        add_adapters(adapted, 3, mode=mode, scale=None)
        second: Any = adapted.branches[1]
        torch.nn.init.normal_(second.adapter.up.weight)
        stream = adapted.branches[0](x)
        inner = second.f(second.norm(stream))
        wanted = inner + second.adapter(stream if mode == "parallel" else inner)
        assert_close(adapted(x), stream + wanted)


def test_norms_in_front_and_behind() -> None:
    x, found = torch.randn(2, 5, 8) * 7, {}
    for norm in ("none", "in", "out"):
        torch.manual_seed(0)
        adapter = Adapter(8, 3, norm=norm).eval()
        torch.nn.init.normal_(adapter.up.weight)
        found[norm] = (adapter(x), adapter(x * 2))
    assert_close(found["none"][1], found["none"][0] * 2)
    assert_close(found["in"][1], found["in"][0], rtol=1e-3, atol=1e-3)
    assert_close(found["out"][0], torch.nn.functional.layer_norm(found["none"][0], (8,)), rtol=1e-5, atol=1e-5)


def test_what_has_no_place_for_adapters_is_refused() -> None:
    adapted = block()
    add_adapters(adapted)
    with pytest.raises(ValueError, match="some with adapters"):
        add_adapters(adapted)
    with pytest.raises(ValueError, match="has none"):
        add_adapters(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="bottleneck must be positive"):
        Adapter(8, 0)
    with pytest.raises(ValueError, match="Did you mean 'parallel'"):
        Adapter(8, mode="paralel")
