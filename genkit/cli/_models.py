"""Model names and devices as a person types them, checked before anything large is imported."""

from __future__ import annotations

import re
from pathlib import Path

from genkit.catalogue import packaged_folder, packaged_names
from genkit.checks import unknown


def find_local(name: str) -> Path:
    """Return the folder or file of a packaged model or one on disk.

    Raises:
        ValueError: if it is neither; names the nearest packaged model.
    """
    if name in packaged_names():
        return packaged_folder(name)
    path = Path(name).expanduser()
    if not path.exists():
        raise ValueError(unknown(name, packaged_names(), "model") + " A folder or an official file works too, if it is on this machine.")
    return path


def check_model(name: str) -> None:
    """Accept a packaged name, an existing file or folder, or what may be a hub id.

    Raises:
        ValueError: for anything else, and for names of ours that the package does not have; names the nearest.
    """
    if name in packaged_names() or Path(name).exists():
        return
    if name.startswith("genkit/") or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(unknown(name, packaged_names(), "model") + " A folder, an official file or a hub id (owner/name) works too.")


def pick_device(name: str | None) -> str:
    """Return the device to use: the one named, else an accelerator if there is one.

    Raises:
        ValueError: if torch cannot use the device.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    usable = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    usable += ["cuda"] if torch.cuda.is_available() else []
    usable += ["mps"] if torch.backends.mps.is_available() else []
    if name not in usable:
        raise ValueError(f"{unknown(name, usable, 'device')} `genkit doctor` says why an accelerator is missing.")
    return name
