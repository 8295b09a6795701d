"""Checkpoints of a run: complete or absent, never in between.

    out/checkpoints/step-00001000/
        <module>.safetensors, <module>.ema.safetensors    weights and averages
        state.pt                                           step, optimizers, loss scaler; readable with weights_only=True
        config.yaml                                        the resolved configuration
        manifest.json                                      step and size of each file

A folder is written under a temporary name, flushed to disk and renamed: after a crash at any moment the newest named folder is whole.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genkit.checks import misshapen_keys, tell_differences

TEMPORARY = ".tmp-"
OLDER = "delete this checkpoint to resume from an older one"

Modules = Mapping[str, nn.Module]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, or not with this configuration."""


def sync_to_disk(path: Path) -> None:
    """Force a file or folder onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill(folder)` write a folder aside, flush it and give it its name in one rename, replacing an older one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{TEMPORARY}{target.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        fill(temporary)
        for path in sorted(temporary.rglob("*"), reverse=True):
            sync_to_disk(path)
        sync_to_disk(temporary)
        if target.exists():
            old = target.parent / f"{TEMPORARY}old-{target.name}"
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            shutil.rmtree(old)
        temporary.rename(target)
        sync_to_disk(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(target: Path, text: str) -> None:
    """Replace a small file atomically."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{TEMPORARY}{target.name}"
    temporary.write_text(text, encoding="utf-8")
    sync_to_disk(temporary)
    temporary.replace(target)


def folder_of(out: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return out / "checkpoints" / f"step-{step:08d}"


def is_complete(folder: Path) -> bool:
    """Tell whether a folder has every file of its manifest at its size."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    except (OSError, json.JSONDecodeError, KeyError):
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())


def find(out: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return [folder for folder in sorted((out / "checkpoints").glob("step-*")) if is_complete(folder)]


def remove_stale(out: Path) -> None:
    """Delete what interrupted writes have left."""
    for path in [*out.glob(f"{TEMPORARY}*"), *(out / "checkpoints").glob(f"{TEMPORARY}*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def save(out: Path, step: int, modules: Modules, ema: Modules, state: dict[str, Any], config: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of a step, unless it is there, and delete all but the newest `keep`.

    Args:
        out: run folder.
        step: finished steps.
        modules: name -> trained module.
        ema: name -> averaged module.
        state: what else resuming needs: tensors, numbers, strings, lists and dicts only.
        config: resolved configuration.
        keep: how many checkpoints stay.

    Returns:
        The folder.
    """

    def fill(folder: Path) -> None:
        for name, module in modules.items():
            save_file(_tensors(name, module), folder / f"{name}.safetensors")
        for name, module in ema.items():
            save_file(_tensors(name, module), folder / f"{name}.ema.safetensors")
        torch.save({"step": step, **state}, folder / "state.pt")
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        (folder / "manifest.json").write_text(json.dumps({"step": step, "files": sizes}, indent=1), encoding="utf-8")

    target = folder_of(out, step)
    if not is_complete(target):
        write_folder(target, fill)
    for old in find(out)[:-keep]:
        gone = old.parent / f"{TEMPORARY}{old.name}"
        old.rename(gone)
        shutil.rmtree(gone)
    return target


def load(folder: Path, modules: Modules, ema: Modules) -> dict[str, Any]:
    """Fill modules and averages from a checkpoint, strictly, and return the rest of its state on the CPU.

    Raises:
        CheckpointError: if a file is missing, damaged or a pickle of objects, or if tensors are missing, unexpected or misshapen.
    """
    for suffix, group in (("", modules), (".ema", ema)):
        for name, module in group.items():
            load_module(folder / f"{name}{suffix}.safetensors", module)
    try:
        return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder / 'state.pt'} cannot be read ({reason}); {OLDER}.") from error


def load_config(folder: Path) -> dict[str, Any]:
    """Return the resolved configuration a checkpoint was trained with."""
    try:
        return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"{folder / 'config.yaml'} cannot be read; {OLDER}.") from error


def load_module(path: Path, module: nn.Module) -> None:
    """Fill a module from a safetensors file; all tensors must be there with their shapes, and no others.

    Raises:
        CheckpointError: naming the file and the tensors.
    """
    try:
        tensors = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is missing, damaged or no safetensors file ({error}); {OLDER}.") from error
    own = module.state_dict()
    missing, unexpected = [k for k in own if k not in tensors], [k for k in tensors if k not in own]
    shapes, given = ({key: value.shape for key, value in state.items()} for state in (own, tensors))
    text = tell_differences(missing, unexpected, misshapen_keys(shapes, given))
    if text:
        remedy = "Resume with the task_config of the checkpoint or choose another train.out."
        raise CheckpointError(f"{path} does not fit the model: {text}. {remedy}")
    module.load_state_dict(tensors)


def load_optimizers(folder: Path, saved: Mapping[str, Any], optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
    """Restore optimizer states; learning rates and the like stay as the task set them.

    Raises:
        CheckpointError: if the optimizers or their numbers of tensors differ.
    """
    if set(saved) != set(optimizers):
        raise CheckpointError(f"{folder}: optimizers are {sorted(saved)} there and {sorted(optimizers)} here.")
    for name, optimizer in optimizers.items():
        own = optimizer.state_dict()["param_groups"]
        there, here = ([len(group["params"]) for group in groups] for groups in (saved[name]["param_groups"], own))
        if there != here:
            raise CheckpointError(f"{folder}: optimizer {name!r} has {there} tensors per group there and {here} here.")
        optimizer.load_state_dict({"state": saved[name]["state"], "param_groups": own})


def _tensors(name: str, module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state on the CPU, tied tensors written out once per name."""
    state = module.state_dict()
    others = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise TypeError(f"checkpoint: state of module {name!r} must be tensors, got others at {others[:10]}; register them as buffers.")
    return {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
