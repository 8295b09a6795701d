"""Official checkpoints to genkit and back: `load`, `recognise`, `export`. One file per system, found by its name."""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from genkit.checks import choose, unknown
from genkit.convert.base import ConversionReport
from genkit.paths import whole_folder
from genkit.weights import PICKLE_SUFFIXES, check_finite, read_checkpoint

logger = logging.getLogger(__name__)


def systems() -> list[str]:
    """Return the names of the systems that have a converter."""
    return sorted(name for _, name, _ in pkgutil.iter_modules(__path__) if name != "base" and not name.startswith("_"))


def module(system: str) -> ModuleType:
    """Return the converter of a system.

    Raises:
        ValueError: if there is none; names the nearest.
    """
    return importlib.import_module(f"{__name__}.{choose(system, systems(), 'system')}")


def load(system: str, path: str | Path, **options: Any) -> nn.Module:
    """Load an official checkpoint as a genkit model.

    Args:
        system: name of the converter ("enat").
        path: file or folder as its authors published it.
        **options: what the file does not tell; the converter's `from_official` lists them.

    Returns:
        The model in fp32 and eval mode. What was mapped and dropped goes to the log.
    """
    return load_with_report(system, path, **options)[0]


def load_with_report(system: str, path: str | Path, **options: Any) -> tuple[nn.Module, ConversionReport]:
    """Load an official checkpoint, see `load`, and return the model with the report of the conversion.

    Raises:
        FileNotFoundError: if the file is missing.
        TypeError: if the converter does not know an option.
        ValueError: if the file is corrupt, has NaN or infinity, or does not fit the system.
    """
    converter = module(system)
    accepted = [name for name, item in inspect.signature(converter.from_official).parameters.items() if item.kind is item.KEYWORD_ONLY]
    for option in options:
        if option not in accepted:
            raise TypeError(unknown(option, accepted, f"option of the {system} converter"))
    file = _checkpoint_file(Path(path), converter)
    state, note, found = _read(converter, file)
    options = found | options
    check_finite(state, file)
    try:
        model, report = converter.from_official(state, **options)
    except ValueError as error:
        raise ValueError(f"{str(file)!r}: {error}") from error
    logger.info("%s (%s)\n%s", file, note, report)
    return model, report


def convert(system: str, path: str | Path, out: str | Path, **options: Any) -> ConversionReport:
    """Write an official checkpoint as a genkit model folder (config and safetensors), completely or not at all.

    Args:
        system: name of the converter.
        path: official file or folder.
        out: folder to write.
        **options: see `load`.

    Returns:
        What was mapped and dropped.
    """
    model, report = load_with_report(system, path, **options)
    with whole_folder(out) as folder:
        model.save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]  # converters return diffusers models
    return report


def export(system: str, model: nn.Module) -> dict[str, Tensor]:
    """Return a model's weights under their official names.

    Args:
        system: name of the converter.
        model: a model of ours.
    """
    state: dict[str, Tensor] = module(system).to_official(model)
    return state


def recognise(path: str | Path) -> tuple[str, Path] | None:
    """Tell which system an official file or folder belongs to, by its layout.

    Args:
        path: file or folder.

    Returns:
        System and checkpoint file, or None if no converter knows it.
    """
    path = Path(path)
    for system in sorted(systems(), key=lambda name: not getattr(module(name), "WHOLE", False)):
        converter = module(system)
        files = [path] if path.is_file() else [path / name for name in converter.FILES if (path / name).is_file()]
        for file in files:
            state = _read(converter, file, is_asked=True)[0]
            if converter.recognise({key: tuple(value.shape) for key, value in state.items()}):
                return system, file
    return None


def _read(converter: ModuleType, file: Path, is_asked: bool = False) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """Return state dict, note and options of a file, by the converter's own reader where it has one for such files.

    A file that is only asked about, and that the common reader cannot open, is no checkpoint of this system.
    """
    own = converter.read(file) if hasattr(converter, "read") else None
    if own is not None:
        found: tuple[dict[str, Tensor], str, dict[str, Any]] = own
        return found
    if is_asked and file.suffix == ".pkl":
        return {}, "", {}
    told = converter.options(file) if hasattr(converter, "options") and not is_asked else {}
    return (*read_checkpoint(file, getattr(converter, "WRAPPERS", ("state_dict",))), told)


def _checkpoint_file(path: Path, converter: ModuleType) -> Path:
    """Return the file to read: the path itself or the first known file in the folder."""
    if not path.is_dir():
        return path
    found = next((path / name for name in converter.FILES if (path / name).is_file()), None)
    if found is None:
        present = sorted(item.name for item in path.iterdir() if item.suffix in (*PICKLE_SUFFIXES, ".safetensors"))
        raise FileNotFoundError(
            f"folder {str(path)!r} has none of {', '.join(converter.FILES)}; it has {', '.join(present) or 'no weights'}."
        )
    return found
