"""Open pipeline folders: find them, check them, load their components. Every problem is one error that names the file and the key."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import genkit
from genkit.catalogue import INDEX, PREFIX, packaged_folder, packaged_names, shared_folder
from genkit.checks import choose, misshapen_keys, tell_differences, unknown
from genkit.weights import PICKLE_SUFFIXES, check_finite, safetensors_header

LIBRARIES = ("genkit", "diffusers", "transformers")
HUB_OPTIONS = frozenset({"revision", "token", "cache_dir", "local_files_only", "force_download"})
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.md"]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate(name_or_path: str | Path) -> Path | None:
    """Return the local file or folder that a name stands for, or None if it is a hub id.

    Args:
        name_or_path: packaged name (`genkit/...`, looked up first), path or hub id.

    Raises:
        ValueError: for an unknown packaged name.
        FileNotFoundError: for a path that does not exist and cannot be a hub id.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if name in packaged_names():
        return packaged_folder(name)
    if path.exists():
        return path
    if name.startswith(PREFIX):
        return packaged_folder(name)
    if isinstance(name_or_path, str) and HUB_ID.fullmatch(name) and path.suffix.lower() not in (*PICKLE_SUFFIXES, ".safetensors"):
        return None
    raise FileNotFoundError(
        f"{name!r} is neither a packaged model ({', '.join(packaged_names()) or 'none'}), an existing path nor a hub id (owner/name)."
    )


def download(hub_id: str, files: list[str], **options: Any) -> Path:
    """Download files of a hub repository into the hub's cache.

    Args:
        hub_id: `owner/name`.
        files: names or patterns; never code, never pickles unless named.
        **options: those in HUB_OPTIONS.

    Returns:
        The folder of the snapshot.

    Raises:
        OSError: if the repository does not exist or cannot be reached and is not in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(hub_id, allow_patterns=files, **options))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, ConnectionError) as error:
        raise OSError(
            f"hub model {hub_id!r} cannot be opened: it is not in the local cache and the hub gave no answer or no such repository "
            f"({str(error).strip().splitlines()[0]}). Check the name and the network, or give a local folder or one of {packaged_names()}."
        ) from error


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of a pipeline folder's model_index.json.

    Raises:
        FileNotFoundError: if the folder has none; says what the folder is instead.
        ValueError: if it is broken or names no class.
    """
    path = folder / INDEX
    if not path.is_file():
        config = folder / "config.json"
        name = _read_json(config).get("_class_name") if config.is_file() else None
        what = (
            f"it holds one component; open it with {name}.from_pretrained" if name else "and no converter knows its files (`genkit list`)"
        )
        raise FileNotFoundError(f"{str(folder)!r} is not a pipeline folder: it has no {INDEX}, {what}.")
    index = _read_json(path)
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{str(path)!r} names no pipeline class: expected a string under '_class_name', got {index.get('_class_name')!r}.")
    return index


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not valid JSON ({error}); it is corrupt: download or save it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got a {type(content).__name__}.")
    return content


def load_components(
    folder: Path, index: Mapping[str, Any], passed: Mapping[str, Any], torch_dtype: torch.dtype | None, variant: str | None
) -> dict[str, Any]:
    """Load the components of a pipeline folder.

    Args:
        folder: the pipeline folder.
        index: content of its model_index.json.
        passed: components that the caller brings instead.
        torch_dtype: type of the weights, fp32 if None.
        variant: of the weight files, such as 'fp16'.

    Returns:
        Component by name; None for those that are absent on purpose.

    Raises:
        ValueError: naming the file, and key, that is wrong.
    """
    shared = index.get("_shared", {})
    jobs = []
    components: dict[str, Any] = {}
    for name, entry in index.items():
        if name.startswith("_") or not (isinstance(entry, list) and len(entry) == 2) or name in passed:
            continue
        if entry[1] is None:
            components[name] = None
            continue
        place = shared_folder(shared[name]) if name in shared else folder / name
        if not place.is_dir():
            raise FileNotFoundError(f"{str(folder / INDEX)!r} names component {name!r}, but the folder {str(place)!r} does not exist.")
        cls = _resolve_class(entry[0], entry[1], folder / INDEX)
        _check_component(cls, place, variant)
        jobs.append((name, cls, place))
    with quiet():
        components |= {name: _load_component(cls, place, torch_dtype or torch.float32, variant) for name, cls, place in jobs}
    return components


def _resolve_class(library: str, class_name: str, source: Path) -> Any:
    """Return a component's class; only from the libraries that are trusted to load it."""
    if library not in LIBRARIES:
        raise ValueError(
            f"{str(source)!r}: component library must be one of {', '.join(LIBRARIES)}, got {library!r}; foreign code is not run."
        )
    module = genkit if library == "genkit" else importlib.import_module(library)
    names = genkit.EXPORTS.keys() if library == "genkit" else dir(module)
    if class_name not in names:
        raise ValueError(f"{str(source)!r}: {unknown(class_name, [n for n in names if n[0].isupper()], f'{library} class')}")
    cls = getattr(module, class_name)
    if not hasattr(cls, "from_pretrained"):
        raise ValueError(f"{str(source)!r}: {library}.{class_name} is not a component that can be loaded.")
    return cls


def _check_component(cls: Any, folder: Path, variant: str | None) -> None:
    """Check a component's files before any is loaded: config keys, presence, format, completeness, and for ours keys and shapes."""
    if not issubclass(cls, nn.Module):
        if issubclass(cls, SchedulerMixin):
            _check_config(cls, folder / "scheduler_config.json")
        return
    files = weight_files(folder, variant)
    headers = {file: safetensors_header(file) for file in files}
    config = _check_config(cls, folder / "config.json")
    if cls.__module__.split(".")[0] != "genkit":
        return
    try:
        with torch.device("meta"):
            expected = {key: tuple(value.shape) for key, value in cls.from_config(config).state_dict().items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(folder / 'config.json')!r}: {error}") from error
    found = {key: shape for header in headers.values() for key, shape in header.items()}
    where = {key: file for file, header in headers.items() for key in header}
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    wrong = misshapen_keys(expected, found)
    first = next((where[key.split()[0]] for key in [*unexpected, *wrong]), files[0])
    raise_loading(first, cls.__name__, missing, unexpected, wrong)


def raise_loading(file: Path, class_name: str, missing: list[str], unexpected: list[str], wrong: list[str]) -> None:
    """Raise one error that lists what differs between a weight file and its model, or return if nothing does.

    Raises:
        ValueError: with the first ten keys of each sort and their number.
    """
    text = tell_differences(missing, unexpected, wrong)
    if text:
        raise ValueError(
            f"{str(file)!r} does not fit {class_name} and its config.json: {text}. The folder mixes files of different models."
        )


def _check_config(cls: Any, path: Path) -> dict[str, Any]:
    """Return a component's config after checking, for our classes, that it has no key that the class does not know."""
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist; the component's config is missing.")
    config = _read_json(path)
    if cls.__module__.split(".")[0] == "genkit":
        accepted = set(inspect.signature(cls.__init__).parameters) - {"self"}
        for key in config:
            if not key.startswith("_") and key not in accepted:
                raise ValueError(f"{str(path)!r}: {unknown(key, accepted, f'{cls.__name__} config key')}")
    return config


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the safetensors files of a component folder.

    Raises:
        ValueError: if there are pickles only.
        FileNotFoundError: if there are no weights, or a shard is missing.
    """
    mark = f".{variant}" if variant else ""
    stems = ("diffusion_pytorch_model", "model")
    for stem in stems:
        single = folder / f"{stem}{mark}.safetensors"
        index = folder / f"{stem}.safetensors.index{mark}.json"
        if single.is_file():
            return [single]
        if index.is_file():
            shards = [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
            absent = [shard.name for shard in shards if not shard.is_file()]
            if absent:
                raise FileNotFoundError(f"{str(index)!r} names shards that are not there: {', '.join(absent)}; download them again.")
            return shards
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ValueError(
            f"{str(folder)!r} has pickled weights only ({', '.join(pickles)}); pickles can run code and are not opened here. "
            "Save the model with safe_serialization=True, or convert an official checkpoint with `genkit convert`."
        )
    raise FileNotFoundError(f"{str(folder)!r} has no weights: expected {stems[0]}{mark}.safetensors or {stems[1]}{mark}.safetensors.")


def _load_component(cls: Any, folder: Path, dtype: torch.dtype, variant: str | None) -> Any:
    """Load one component whose files were checked."""
    if issubclass(cls, PreTrainedModel):
        return _load_transformers_model(cls, folder, dtype, variant)
    if issubclass(cls, ModelMixin):
        model = cls.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, variant=variant)
        check_finite(model.state_dict(), weight_files(folder, variant)[0])
        return model.eval()
    try:
        return cls.from_pretrained(folder, local_files_only=True)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(folder)!r} cannot be opened as {cls.__name__}: {error}") from error


def _load_transformers_model(cls: Any, folder: Path, dtype: torch.dtype, variant: str | None) -> nn.Module:
    """Load a transformers model and check what its own loader only warns about."""
    file = weight_files(folder, variant)[0]
    try:
        model, info = cls.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            variant=variant,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except RuntimeError as error:
        raise ValueError(f"{str(file)!r} does not fit {cls.__name__}: {error}") from error
    mismatched = info["mismatched_keys"]
    wrong = misshapen_keys({key: want for key, _, want in mismatched}, {key: found for key, found, _ in mismatched})
    raise_loading(file, cls.__name__, sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), wrong)
    check_finite(model.state_dict(), file)
    result: nn.Module = model.eval()
    return result


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and loading reports, and restore them afterwards."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def check_options(given: Mapping[str, Any], accepted: set[str], what: str) -> None:
    """Refuse options that nobody reads.

    Raises:
        TypeError: naming the option and the nearest that is accepted.
    """
    for name in given:
        if name not in accepted:
            raise TypeError(unknown(name, accepted, f"option of {what}"))


def required(cls: Any) -> list[str]:
    """Return the components that a pipeline class cannot do without."""
    parameters = inspect.signature(cls.__init__).parameters
    return [
        name for name, item in parameters.items() if name != "self" and item.default is item.empty and item.kind is not item.VAR_KEYWORD
    ]


def pipeline_class(index: Mapping[str, Any], source: Path) -> Any:
    """Return the pipeline class that a folder names.

    Raises:
        ValueError: if genkit has no such pipeline.
    """
    pipelines = [name for name in genkit.EXPORTS if name.endswith("Pipeline") and name != "GenPipeline"]
    try:
        return getattr(genkit, choose(index["_class_name"], pipelines, "pipeline class"))
    except ValueError as error:
        raise ValueError(f"{str(source)!r}: {error}") from error
