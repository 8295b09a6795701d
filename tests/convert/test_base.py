"""Tables of weight names, and the converters' common contract."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from genkit import convert
from genkit.convert.base import Drop, KeyTable, OfficialModel, Row, build_empty, fill


def zeros(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"dead.weight": torch.zeros_like(ours["layers.0.fc.weight"])}


TABLE = KeyTable(
    "toy",
    [
        Row("net.{i}.qkv.{p}", ("layers.{i}.q.{p}", "layers.{i}.k.{p}"), load=lambda t: t[0].chunk(2), save=lambda t: [torch.cat(t)]),
        Row("net.{i}.fc.weight", "layers.{i}.fc.weight", load=lambda t: t.T, save=lambda t: t.T),
        Row(("scale.g", "scale.v"), "scale", load=lambda t: [t[0] * t[1]], save=lambda t: [torch.ones_like(t[0]), t[0]]),
        Row("head.{rest}", "out.{rest}"),
        Drop("dead.{p}", "never used", make=zeros),
        Drop("step", "training counter"),
    ],
)


def official() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"net.0.qkv.weight": (4, 3), "net.0.qkv.bias": (4,), "net.0.fc.weight": (2, 3), "scale.v": (2,), "head.a.b": (1,)}
    state = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return {**state, "scale.g": torch.ones(2), "dead.weight": torch.zeros(3, 2)}


EXPECTED = {
    "layers.0.q.weight": (2, 3),
    "layers.0.k.weight": (2, 3),
    "layers.0.q.bias": (2,),
    "layers.0.k.bias": (2,),
    "layers.0.fc.weight": (3, 2),
    "scale": (2,),
    "out.a.b": (1,),
}


def test_a_table_maps_there_and_back() -> None:
    ours, report = TABLE.to_ours({**official(), "step": torch.zeros(1)}, EXPECTED)
    assert {key: tuple(value.shape) for key, value in ours.items()} == EXPECTED
    assert report.dropped == {"dead.weight": "never used", "step": "training counter"}
    assert report.mapped["net.0.qkv.bias"] == ("layers.0.q.bias", "layers.0.k.bias")
    back = TABLE.to_official(ours)
    assert back.keys() == official().keys()
    for key, value in official().items():
        torch.testing.assert_close(back[key], value, rtol=0, atol=0)
    assert "6 tensors mapped, 2 dropped" in str(report)


def test_every_difference_is_named_by_its_official_key() -> None:
    state = official()
    state["net.0.fc.weight"] = torch.zeros(9, 9)
    state["stray"] = torch.zeros(1)
    state["head.c"] = torch.zeros(1)
    del state["net.0.qkv.bias"], state["scale.g"]
    with pytest.raises(ValueError, match="toy") as caught:
        TABLE.to_ours(state, EXPECTED)
    text = str(caught.value)
    assert "missing: net.0.qkv.bias" in text
    assert "scale.g" in text
    assert "2 unexpected: out.c (of head.c), stray" in text
    assert "net.0.fc.weight expected [3, 2], found [9, 9]" in text


def test_long_lists_are_cut_at_ten() -> None:
    with pytest.raises(ValueError, match=r"30 unexpected: .*\(30 in all\)") as caught:
        KeyTable("toy", []).to_ours({f"key.{i}": torch.zeros(1) for i in range(30)}, {})
    assert str(caught.value).count("key.") == 10


def test_our_key_without_official_name_is_refused() -> None:
    with pytest.raises(ValueError, match="1 unexpected: new"):
        TABLE.to_official({"new": torch.zeros(1)})


def test_a_row_must_use_the_same_letters_on_both_sides() -> None:
    with pytest.raises(ValueError, match="different letters"):
        KeyTable("toy", [Row("a.{i}", "b.{j}")])


def test_an_empty_model_is_filled_strictly_and_in_single_precision() -> None:
    model = build_empty(nn.Linear, in_features=3, out_features=2)
    assert model.weight.is_meta
    fill(model, {"weight": torch.ones(2, 3, dtype=torch.float16), "bias": torch.zeros(2)})
    assert model.weight.dtype == torch.float32
    assert not model.training
    assert float(model(torch.ones(3)).sum()) == 6
    with pytest.raises(RuntimeError, match="bias"):
        fill(build_empty(nn.Linear, in_features=3, out_features=2), {"weight": torch.ones(2, 3)})


@pytest.mark.parametrize("system", convert.systems())
def test_every_converter_keeps_the_convention(system: str) -> None:
    module = convert.module(system)
    assert all(isinstance(model, OfficialModel) for model in module.OFFICIAL)
    assert isinstance(module.COMPONENT, str)
    assert module.PIPELINE is None or module.PIPELINE.endswith("Pipeline")
    assert isinstance(module.FILES, tuple)
    assert module.recognise({"some.other.key": (1, 2)}) is False


def test_unknown_systems_options_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'enat'"):
        convert.load("enatt", tmp_path)
    with pytest.raises(TypeError, match="Did you mean 'num_heads'"):
        convert.load("enat", tmp_path, num_head=2)
    with pytest.raises(FileNotFoundError, match="has none of"):
        convert.load("enat", tmp_path)
    torch.save({"a": torch.zeros(2)}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"file\.pth.*enat"):
        convert.load("enat", tmp_path / "file.pth", num_heads=1)
    torch.save({"a": torch.tensor([torch.nan])}, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match="NaN or infinity"):
        convert.load("enat", tmp_path / "nan.pth", num_heads=1)
    assert convert.recognise(tmp_path / "file.pth") is None
