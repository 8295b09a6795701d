"""Which models there are: those in the package and the official ones that can be converted. Imports neither torch nor diffusers.

A packaged model is a pipeline folder `genkit/pretrained/<name>/`, called `genkit/<name>`. Beside its model_index.json lies genkit.json,
what `genkit list` shows without opening weights:

    {"summary": "text to 64x64 pictures of game assets", "licence": "CC0-1.0", "parameters": 8100000, "memory_mb": 180}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genkit.paths import pretrained_dir

PREFIX = "genkit/"
INDEX = "model_index.json"
SIDECAR = "genkit.json"
SIDECAR_KEYS = frozenset({"summary", "licence", "parameters", "memory_mb"})


@dataclass(frozen=True)
class ModelEntry:
    """One line of `genkit list`.

    Args:
        name: what `GenPipeline.from_pretrained` takes, or the name of an official model.
        kind: 'packaged' or 'official'.
        pipeline: class of the pipeline, if there is one.
        summary: what it does.
        licence: of the weights.
        parameters: number of weights.
        size_mb: size of the files, shared ones included; of official ones in fp32.
        memory_mb: memory needed to run it.
        source: folder, hub id or address.
    """

    name: str
    kind: str
    pipeline: str | None
    summary: str
    licence: str
    parameters: int | None
    size_mb: float | None
    memory_mb: float | None
    source: str


def packaged_names() -> list[str]:
    """Return the names of the models in the package, `genkit/...`."""
    root = pretrained_dir()
    return sorted(PREFIX + path.parent.name for path in root.glob(f"*/{INDEX}"))


def packaged_folder(name: str) -> Path:
    """Return the folder of a packaged model.

    Args:
        name: `genkit/<name>`.

    Raises:
        ValueError: if there is no such model; names the nearest.
    """
    from genkit.checks import choose

    return pretrained_dir() / choose(name, packaged_names(), "packaged model").removeprefix(PREFIX)


def shared_folder(entry: str) -> Path:
    """Return the folder of a component that several packaged models share.

    Args:
        entry: path below `genkit/pretrained`, such as `text-lowpoly/text_encoder`, as model_index.json names it under `_shared`.

    Raises:
        ValueError: if the path leaves that folder or names nothing.
    """
    root = pretrained_dir()
    folder = (root / entry).resolve()
    if not folder.is_relative_to(root.resolve()) or not folder.is_dir():
        raise ValueError(f"shared component {entry!r} is not a folder below {str(root)!r}; the model needs the package's own copy of it.")
    return folder


def write_sidecar(folder: str | Path, *, summary: str, licence: str, parameters: int, memory_mb: float) -> None:
    """Write what `genkit list` shows of a packaged model.

    Args:
        folder: of the model.
        summary: what it does, in a few words.
        licence: of the weights, as an SPDX identifier.
        parameters: number of weights.
        memory_mb: memory needed to run it.
    """
    content = {"summary": summary, "licence": licence, "parameters": parameters, "memory_mb": memory_mb}
    (Path(folder) / SIDECAR).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def packaged_models() -> list[ModelEntry]:
    """Return the models in the package."""
    entries = []
    for name in packaged_names():
        folder = pretrained_dir() / name.removeprefix(PREFIX)
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        sidecar = folder / SIDECAR
        about: Mapping[str, Any] = json.loads(sidecar.read_text(encoding="utf-8")) if sidecar.is_file() else {}
        folders = [folder, *(shared_folder(entry) for entry in index.get("_shared", {}).values())]
        size = sum(path.stat().st_size for root in folders for path in root.rglob("*") if path.is_file())
        entries.append(
            ModelEntry(
                name=name,
                kind="packaged",
                pipeline=index.get("_class_name"),
                summary=about.get("summary", ""),
                licence=about.get("licence", "see the model card"),
                parameters=about.get("parameters"),
                size_mb=size / 1e6,
                memory_mb=about.get("memory_mb"),
                source=str(folder),
            )
        )
    return entries


def official_models() -> list[ModelEntry]:
    """Return the official models that the converters know (imports them, and torch with them)."""
    from genkit import convert

    entries = []
    for system in convert.systems():
        module = convert.module(system)
        entries += [
            ModelEntry(
                name=f"{system}: {model.name}",
                kind="official",
                pipeline=module.PIPELINE,
                summary=model.note,
                licence=model.licence,
                parameters=model.parameters,
                size_mb=model.parameters * 4 / 1e6,
                memory_mb=model.memory_gb * 1e3,
                source=model.hub_id or model.source,
            )
            for model in module.OFFICIAL
        ]
    return entries


def list_models(official: bool = True) -> list[ModelEntry]:
    """Return the models that genkit knows.

    Args:
        official: also those that their authors publish and the converters read.

    Example:
        >>> all(model.name.startswith("genkit/") for model in list_models(official=False))
        True
    """
    return packaged_models() + (official_models() if official else [])
