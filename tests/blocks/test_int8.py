"""Weights as 8-bit integers in every kind of generator."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from genkit import GenPipeline
from genkit.blocks.integer import has_integers, to_int8
from genkit.pipelines.vim import CodeWriter
from tests.generators import test_compiled as whole
from tests.generators.test_enat import LABELS
from tests.generators.test_enat import build as build_enat
from tests.generators.test_enat import grids as enat_grids
from tests.pipelines import test_vim as vim


def written(model: Any) -> Tensor:
    """Logits of the third code, by the loop that writes one at a time."""
    writer = CodeWriter(model, torch.tensor([[0], [2]]))
    for codes in (vim.CODES[:, :0], vim.CODES[:, :1]):
        writer.logits(codes)
    return writer.logits(vim.CODES[:, :2])


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
    **{name: whole.CASES[name] for name in ("nat", "vim", "vdt", "shape_dit", "predformer")},
    "vim, one at a time": (vim.build, written),
    "enat": (build_enat, lambda model: model(enat_grids(9)[0], model.prepare_condition(LABELS)).logits),
}


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_generators_compute_nearly_the_same_on_integers(name: str, inputs: bool) -> None:
    build, call = CASES[name]
    model = build()
    expected = call(model)
    turned = to_int8(copy.deepcopy(model), inputs)
    found = call(turned)
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < 0.1
    maps = [(part, turned.get_submodule(name)) for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    integers: list[Tensor] = [cast(Any, new.weight).qdata for _, new in maps]
    assert all(new.dtype == torch.int8 and new.shape == old.weight.shape for new, (old, _) in zip(integers, maps, strict=True))
    assert not has_integers(model)


def test_a_pipeline_on_integers_draws_and_is_not_saved(tmp_path: Path) -> None:
    pipe: Any = GenPipeline.from_pretrained("genkit/enat-lowpoly")
    pipe.set_progress_bar_config(disable=True)
    before = pipe("a treasure chest", generator=[1], num_inference_steps=4, output_type="pt").images
    pipe.to_int8()
    after = pipe("a treasure chest", generator=[1], num_inference_steps=4, output_type="pt").images
    assert (after - before).abs().mean() < 0.05
    with pytest.raises(ValueError, match="weights after to_int8 are not saved"):
        pipe.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="integers already"):
        pipe.to_int8()


def test_networks_without_linear_maps_are_refused() -> None:
    with pytest.raises(ValueError, match="Conv2d has no linear maps"):
        to_int8(nn.Conv2d(3, 3, 1))
