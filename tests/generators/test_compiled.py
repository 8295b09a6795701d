"""Whole networks compile without graph breaks and give the same numbers; others of the library do so beside their own laws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from genkit.generators.mimo_vp import MIMOVP
from tests.generators import test_nat as nat
from tests.generators import test_predictors as predictors
from tests.generators import test_shape_dit as shape_dit
from tests.generators import test_vdt as vdt
from tests.pipelines import test_vim as vim
from tests.tokenizers import test_shape_vae as shape_vae

TIMES = torch.tensor([0.2, 0.9])
CLIP, STEPS = vdt.clips()
LATENTS, CONTEXT = shape_dit.draws((2, 7, 4), (2, 5, 6))
POINTS = torch.rand(2, 9, 3, generator=torch.Generator().manual_seed(2)) * 2 - 1


def mimo() -> MIMOVP:
    torch.manual_seed(0)
    return MIMOVP(**predictors.MIMO).eval()


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
    "nat": (nat.build, lambda model: model(nat.grid(), {"class_labels": torch.tensor([0, 2, 4])}).logits),
    "vim": (vim.build, lambda model: model(vim.CODES, torch.tensor([[0], [2]])).logits),
    "vdt": (vdt.build, lambda model: model(CLIP, STEPS).sample),
    "shape_dit": (shape_dit.network, lambda model: model(LATENTS, TIMES, CONTEXT).sample),
    "shape_vae": (shape_vae.build, lambda model: model(shape_vae.surface(), POINTS)[0]),
    "predformer": (predictors.build, lambda model: model(predictors.clips()).frames),
    "mimo_vp": (mimo, lambda model: model(torch.rand(2, 3, 1, 16, 24, generator=torch.Generator().manual_seed(3))).frames),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_compiled_without_graph_breaks_gives_the_same_numbers(name: str) -> None:
    build, call = CASES[name]
    model = build()
    expected = call(model)
    torch._dynamo.reset()
    assert_close(call(torch.compile(model, fullgraph=True, backend="eager")), expected, rtol=1e-4, atol=1e-5)
