"""EDM: official layout both ways, pickles read without executing them."""

from __future__ import annotations

import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from genkit import convert
from genkit.cli.main import main
from genkit.convert import edm
from genkit.generators.edm import EDMUNet2DModel
from genkit.persistent_pickle import read_persistent_pickle
from genkit.pipelines.base import GenPipeline
from tests.generators.test_edm import UNETS, build, inputs


class Fake:
    """A persistent object of the official code, as its pickle has it: a description with source code, and a state."""

    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        easy_dict = sys.modules["dnnlib.util"].EasyDict
        self.meta = easy_dict(type="class", version=6, module_src="raise SystemExit('executed')", class_name=class_name, state=state)

    def __reduce__(self) -> tuple[Any, ...]:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


@pytest.fixture
def official_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of the official code, as far as writing a pickle needs them."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta: object) -> object:
        raise AssertionError("the official reader was called")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    util.EasyDict = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})  # type: ignore[attr-defined]
    for name, module in {"torch_utils": types.ModuleType("torch_utils"), "dnnlib": types.ModuleType("dnnlib")}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", persistence)
    monkeypatch.setitem(sys.modules, "dnnlib.util", util)


def persistent(tensors: dict[str, Tensor], class_name: str, arguments: dict[str, Any] | None = None) -> Fake:
    """Build the module tree of a state dict."""
    children: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Any] = {"_parameters": OrderedDict(), "_buffers": OrderedDict(), "_modules": OrderedDict(), "training": False}
    for key, value in tensors.items():
        head, _, rest = key.partition(".")
        if rest:
            children.setdefault(head, {})[rest] = value
        elif "filter" in key or key == "freqs":
            state["_buffers"][key] = value.clone()
        else:
            state["_parameters"][key] = nn.Parameter(value.clone())
    state["_parameters"]["absent"] = None
    for name, own in children.items():
        if name in ("enc", "dec"):
            container = nn.ModuleDict()
            groups: dict[str, dict[str, Tensor]] = {}
            for key, value in own.items():
                block, _, rest = key.partition(".")
                groups.setdefault(block, {})[rest] = value
            blocks: Any = OrderedDict((block, persistent(part, "UNetBlock")) for block, part in groups.items())
            container._modules = blocks
            state["_modules"][name] = container
        else:
            state["_modules"][name] = persistent(own, "SongUNet" if name == "model" else "Linear")
    state |= {"_init_args": (), "_init_kwargs": arguments or {}, "skip_scale": np.sqrt(0.5), "resolutions": {8, 4}}
    return Fake(class_name, state)


def official_arguments(name: str) -> dict[str, Any]:
    """Return the official constructor's arguments of a toy network."""
    own = {key: value for key, value in UNETS[name].items() if key != "name"}
    own |= {"model_type": "DhariwalUNet" if name == "adm" else "SongUNet", "img_resolution": 8, "img_channels": 3}
    return own | {"label_dim": 3, "augment_dim": 2, "use_fp16": False, "channel_mult": tuple(own["channel_mult"])}


@pytest.mark.parametrize("name", sorted(UNETS))
def test_round_trip_through_the_official_layout(name: str) -> None:
    model = build(name)
    official = edm.to_official(model)
    again, report = edm.from_official(official)
    assert again.config["unet_config"] == {**model.config["unet_config"], **again.config["unet_config"], "dropout": 0.1}
    assert all("resampling" in reason for reason in report.dropped.values())
    with torch.no_grad():
        assert_close(again(**inputs()).sample, model(**inputs()).sample, rtol=0, atol=0)
    for key, value in edm.to_official(again).items():
        assert_close(value, official[key], rtol=0, atol=0)


def test_attention_rows_are_stored_by_head_and_channel() -> None:
    rows = torch.arange(2 * 4 * 3)
    ours = edm._thirds(rows, heads=2)
    assert ours[:4].tolist() == [0, 3, 6, 9] and ours[8:10].tolist() == [1, 4]
    assert_close(edm._interleaved(ours, heads=2), rows, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["song", "ncsn", "adm"])
@pytest.mark.usefixtures("official_modules")
def test_official_pickles_are_read_without_executing_them(name: str, tmp_path: Path) -> None:
    model = build(name, preconditioner_config={"name": "vp"})
    network = persistent(edm.to_official(model), "VPPrecond", official_arguments(name))
    path = tmp_path / "edm.pkl"
    path.write_bytes(pickle.dumps({"ema": network, "loss_fn": Fake("EDMLoss", {"P_mean": -1.2}), "dataset_kwargs": {"path": "x"}}))
    loaded = convert.load("edm", path)
    assert isinstance(loaded, EDMUNet2DModel) and loaded.config["preconditioner_config"] == {"name": "vp"}
    with torch.no_grad():
        assert_close(loaded(**inputs()).sample, model(**inputs()).sample, rtol=0, atol=0)
    pipe = GenPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == "EDMPipeline"
    assert pipe(1, num_inference_steps=2, generator=[1], output_type="pt").images.shape == (1, 3, 8, 8)


@pytest.mark.usefixtures("official_modules")
def test_the_command_writes_a_model_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "edm.pkl"
    path.write_bytes(pickle.dumps({"ema": persistent(edm.to_official(build()), "EDMPrecond", official_arguments("song"))}))
    assert main(["convert", "edm", str(path), str(tmp_path / "out")]) == 0
    assert "tensors mapped" in capsys.readouterr().out
    assert EDMUNet2DModel.from_pretrained(tmp_path / "out").config["label_dim"] == 3


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo harm",)


class HarmfulNumber:
    def __reduce__(self) -> tuple[Any, ...]:
        scalar: Any = np.float64(1).__reduce__()[0]
        return scalar, (np.dtype("O"), b"")


@pytest.mark.usefixtures("official_modules")
def test_any_other_name_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "bad.pkl"
    for content, message in (
        ({"ema": Harmful()}, r"asks for (posix|nt)\.system, which a file of networks does not need"),
        ({"ema": HarmfulNumber()}, "no pickle of networks"),
        ({"ema": Fake("EDMPrecond", {"x": Harmful()})}, "asks for"),
        ({"ema": 1}, "without a network under 'ema'"),
    ):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=message):
            convert.load("edm", path)
    path.write_bytes(pickle.dumps({"ema": 1})[:-3])
    with pytest.raises(ValueError, match="damaged"):
        read_persistent_pickle(path)


def test_arguments_that_cannot_be_followed_are_named() -> None:
    with pytest.raises(ValueError, match="unknown: window"):
        edm.config_of("EDMPrecond", {"img_resolution": 8, "window": 3})
    with pytest.raises(ValueError, match="unknown preconditioner 'EDM2Precond'"):
        edm.config_of("EDM2Precond", {"img_resolution": 8})
    with pytest.raises(ValueError, match="no EDM network"):
        edm.from_official({"a": torch.zeros(1)})
    official = edm.to_official(build())
    official.pop("model.map_layer0.bias")
    with pytest.raises(ValueError, match=r"1 missing: model\.map_layer0\.bias"):
        edm.from_official(official)


def test_what_is_ours_has_no_official_layout() -> None:
    with pytest.raises(ValueError, match=r"no official name: .*unet\.layout"):
        edm.to_official(build("layout"))
    with pytest.raises(ValueError, match="patch_size=2"):
        edm.to_official(build(patch_size=2, unet_config={**UNETS["song"], "attn_resolutions": [2]}))
