"""Reading weight files: every format, every damage, and never any code."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from genkit.weights import check_finite, read_checkpoint, safetensors_header

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([True, False]), "c": torch.tensor(3, dtype=torch.int64)}


class Callbacks:
    """Stands for a class of a training framework."""

    def __init__(self, value: int) -> None:
        self.value = value


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def same(got: dict[str, Tensor]) -> None:
    assert got.keys() == STATE.keys()
    for key, value in STATE.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["plain", "prefixed", "wrapped", "wrapped prefixed", "safetensors", "old format"])
def test_every_layout_gives_the_same_state(form: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    content: Any = {"module." + key: value for key, value in STATE.items()} if "prefixed" in form else dict(STATE)
    if form == "safetensors":
        save_file(content, path)
    else:
        torch.save(
            {"state_dict": content, "epoch": 3} if "wrapped" in form else content, path, _use_new_zipfile_serialization=form != "old format"
        )
    same(read_checkpoint(path)[0])


def test_another_wrapper_is_read_when_named(tmp_path: Path) -> None:
    torch.save({"model_ema": STATE, "step": 1}, tmp_path / "file")
    same(read_checkpoint(tmp_path / "file", wrappers=("state_dict", "model_ema"))[0])
    with pytest.raises(ValueError, match="no tensors: model_ema, step"):
        read_checkpoint(tmp_path / "file")


def test_a_rich_pickle_gives_its_tensors_without_running_anything(tmp_path: Path) -> None:
    table = torch.arange(20.0).view(4, 5)
    state = OrderedDict(STATE)
    state["view"] = table.T[1:, ::2]
    state["parameter"] = torch.nn.Parameter(table.half())
    content = {
        "state_dict": state,
        "callbacks": {Callbacks: Callbacks(3)},
        "hyper_parameters": [Callbacks(1), {"x": {1, 2}}, Harmful(tmp_path / "harm")],
        "optimizer_states": [{"state": {0: {"exp_avg": table}}}],
    }
    torch.save(content, tmp_path / "last.ckpt")
    got, note = read_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "harm").exists()
    assert "without executing" in note
    torch.testing.assert_close(got.pop("view"), table.T[1:, ::2], rtol=0, atol=0)
    torch.testing.assert_close(got.pop("parameter"), table.half(), rtol=0, atol=0)
    same(got)


def test_a_pickle_of_the_old_format_with_objects_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "x": Harmful(tmp_path / "harm")}, tmp_path / "file", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="old-format"):
        read_checkpoint(tmp_path / "file")
    (tmp_path / "raw").write_bytes(pickle.dumps({"x": Harmful(tmp_path / "harm")}, protocol=2))
    with pytest.raises(ValueError, match="raw"):
        read_checkpoint(tmp_path / "raw")
    assert not (tmp_path / "harm").exists()


def test_a_tensor_that_claims_more_than_its_record_is_refused(tmp_path: Path) -> None:
    torch.save({"x": Callbacks(1), "state_dict": {"a": torch.zeros(3)}}, tmp_path / "file")
    with zipfile.ZipFile(tmp_path / "file") as source, zipfile.ZipFile(tmp_path / "changed", "w") as target:
        for item in source.infolist():
            data = source.read(item)
            target.writestr(item.filename, data[:4] if item.filename.endswith("data/0") else data)
    with pytest.raises(ValueError, match="does not fit its record"):
        read_checkpoint(tmp_path / "changed")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "empty"),
        (b"\0" * 100, "zero bytes"),
        (b"  <!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"something else", "neither safetensors nor"),
        (b"PK\x03\x04 cut off", "truncated"),
        (b"\x80\x02 garbage", "old-format|cannot be read"),
        (b"\xff\xff\xff\xff\xff\x00\x00\x00{}", "truncated"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{]", "unreadable"),
    ],
)
def test_damaged_files_are_clear_errors(content: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=text) as caught:
        read_checkpoint(tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
def test_truncated_files_are_clear_errors(keep: float, form: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    state = {"a": torch.randn(64, 64)}
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(ValueError, match="truncated|cannot be read|corrupt"):
        read_checkpoint(path)


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    for content, text in (([torch.zeros(1)], "list"), ({}, "empty"), ({"a": 3}, "no tensors: a")):
        torch.save(content, tmp_path / "file")
        with pytest.raises(ValueError, match=text):
            read_checkpoint(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_checkpoint(tmp_path / "nowhere")


def test_a_header_tells_shapes_and_refuses_pickles(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "file")
    assert safetensors_header(tmp_path / "file") == {key: tuple(value.shape) for key, value in STATE.items()}
    torch.save(STATE, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="pickles are not opened"):
        safetensors_header(tmp_path / "model.safetensors")


def test_non_finite_weights_are_named() -> None:
    check_finite(STATE, "x")
    with pytest.raises(ValueError, match="in 2 of 3 tensors: a, c"):
        check_finite({"a": torch.tensor([torch.nan]), "b": torch.zeros(1), "c": torch.tensor([torch.inf])}, "file")
