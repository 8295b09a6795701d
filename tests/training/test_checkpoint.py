"""A checkpoint is whole or absent, and loads strictly."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from genkit.training import checkpoint


def save(out: Path, step: int, keep: int = 2) -> Path:
    net = nn.Linear(2, 2)
    return checkpoint.save(out, step, {"net": net}, {"net": net}, {"optimizers": {}}, {"train": {"seed": 0}}, keep)


def test_round_trip_and_keeping_the_last_n(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        folder = save(tmp_path, step)
    assert [path.name for path in checkpoint.find(tmp_path)] == ["step-00000002", "step-00000003"]
    net, average = nn.Linear(2, 2), nn.Linear(2, 2)
    state = checkpoint.load(folder, {"net": net}, {"net": average})
    assert state == {"step": 3, "optimizers": {}}
    torch.testing.assert_close(net.weight, average.weight, rtol=0, atol=0)
    assert checkpoint.load_config(folder) == {"train": {"seed": 0}}
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    first = nn.Linear(2, 2)
    net = nn.Sequential(first, nn.Linear(2, 2))
    net[1].weight = first.weight
    folder = checkpoint.save(tmp_path, 1, {"net": net}, {}, {}, {}, 1)
    other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    checkpoint.load(folder, {"net": other}, {})
    torch.testing.assert_close(other[1].weight, first.weight, rtol=0, atol=0)


def test_interrupted_write_leaves_the_older_checkpoint_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def fail(path: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "sync_to_disk", fail)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_stale_and_incomplete_folders_are_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    broken = save(tmp_path, 2)
    (broken / "state.pt").write_bytes((broken / "state.pt").read_bytes()[:-1])
    stale = tmp_path / "checkpoints" / ".tmp-step-00000003"
    stale.mkdir()
    (stale / "net.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-config.yaml").write_text("half")
    assert [path.name for path in checkpoint.find(tmp_path)] == ["step-00000001"]
    checkpoint.remove_stale(tmp_path)
    assert not stale.exists()
    assert not (tmp_path / ".tmp-config.yaml").exists()
    save(tmp_path, 2)  # the incomplete one is replaced
    assert checkpoint.is_complete(broken)


def test_tensors_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file({"weight": torch.zeros(3, 2), "extra": torch.zeros(1)}, path)
    with pytest.raises(
        checkpoint.CheckpointError,
        match=r"1 missing: bias; 1 unexpected: extra; 1 of the wrong shape: weight .*\[2, 2\], found \[3, 2\]",
    ):
        checkpoint.load_module(path, nn.Linear(2, 2))


@pytest.mark.parametrize("content", [b"", b"PK not tensors", pickle.dumps({"weight": 1})])
def test_damaged_weights_and_pickles_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match="damaged or no safetensors"):
        checkpoint.load_module(path, nn.Linear(2, 2))


def test_state_with_objects_is_not_unpickled(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    torch.save({"step": 1, "path": Path("x")}, folder / "state.pt")
    with pytest.raises(checkpoint.CheckpointError, match=r"state\.pt cannot be read"):
        checkpoint.load(folder, {}, {})


def test_folder_replaces_an_older_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "export"
    checkpoint.write_folder(target, lambda folder: (folder / "old").mkdir())
    checkpoint.write_folder(target, lambda folder: (folder / "new").mkdir())
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
