"""`genkit info`: what a model is made of, from its files. Weights are loaded for official checkpoints, and where no memory is on record."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from genkit.catalogue import INDEX, SIDECAR, shared_folder
from genkit.cli._models import find_local
from genkit.cli._output import add_json, bytes_text, print_json, print_table
from genkit.cli.convert import add_option, parse_option

HELP = "show a model's components, parameters, sizes, configuration, licence and memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="packaged name, folder, or official file")
    add_option(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print what is known of the model."""
    path, options = find_local(args.model), dict(parse_option(text) for text in args.option)
    is_folder = (path / INDEX).is_file() or (path / "config.json").is_file()
    if is_folder and options:
        raise ValueError(f"--option is for official checkpoints; {str(path)!r} is a genkit folder and tells all of itself.")
    if (path / INDEX).is_file():
        about = describe_pipeline(args.model, path)
    elif is_folder:
        about = {"name": args.model, "path": str(path), "components": [describe_component(path.name, path)]}
    else:
        about = describe_official(args.model, path, options)
    if args.json:
        print_json(about)
    else:
        show(about)
    return 0


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: if the file is damaged; names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}; write the model again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got {type(content).__name__}; write the model again.")
    return content


def _is_component(value: Any) -> bool:
    """Tell whether an entry of an index names a component, as [library, class]; other lists are settings."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def describe_pipeline(name: str, folder: Path) -> dict[str, Any]:
    """Describe a pipeline folder and each of its components."""
    index = read_json(folder / INDEX)
    shared = index.get("_shared", {})
    components = []
    for key, value in index.items():
        if key.startswith("_") or not _is_component(value):
            continue
        place = shared_folder(shared[key]) if key in shared else folder / key
        components.append(describe_component(key, place) | {"class": ".".join(value), "shared": shared.get(key)})
    settings = {key: value for key, value in index.items() if not (key.startswith("_") or _is_component(value) or value == [None, None])}
    about = read_json(folder / SIDECAR) if (folder / SIDECAR).is_file() else {"memory_mb": estimate_memory(folder)}
    return {
        "name": name,
        "path": str(folder),
        "pipeline": index.get("_class_name"),
        "summary": about.get("summary"),
        "licence": about.get("licence"),
        "memory_mb": about.get("memory_mb"),
        "settings": settings,
        "components": components,
        "card": str(folder / "README.md") if (folder / "README.md").is_file() else None,
    }


def estimate_memory(folder: Path) -> float:
    """Load a pipeline to estimate the peak memory of a call for one picture, in MB."""
    from genkit.pipelines.base import GenPipeline

    pipe: Any = GenPipeline.from_pretrained(folder)
    return float(pipe.estimate_memory(1).peak / 1e6)


def describe_component(name: str, folder: Path) -> dict[str, Any]:
    """Describe a component's folder: class, config, parameters by data type, size of its files."""
    configs = [folder / name for name in ("config.json", "scheduler_config.json", "tokenizer_config.json")]
    config = next((read_json(path) for path in configs if path.is_file()), {})
    count: Counter[str] = Counter()
    for path in sorted(folder.glob("*.safetensors")):
        count.update(count_parameters(path))
    return {
        "component": name,
        "class": config.get("_class_name") or next(iter(config.get("architectures", [])), None),
        "parameters": sum(count.values()),
        "dtypes": dict(count),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "config": {key: value for key, value in config.items() if not key.startswith("_")},
    }


def count_parameters(path: Path) -> Counter[str]:
    """Return the number of values per data type in a safetensors file, from its header.

    Raises:
        ValueError: if the header is damaged or the file shorter than it says.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(size)) if size <= path.stat().st_size else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise ValueError(f"{str(path)!r} is not a safetensors file or is damaged; download or write it again.")
    tensors = [value for key, value in header.items() if key != "__metadata__"]
    end = max((value["data_offsets"][1] for value in tensors), default=0)
    if path.stat().st_size < 8 + size + end:
        raise ValueError(f"{str(path)!r} is truncated: {path.stat().st_size} bytes, expected {8 + size + end}; download or write it again.")
    count: Counter[str] = Counter()
    for value in tensors:
        count[value["dtype"]] += math.prod(value["shape"])
    return count


def describe_official(name: str, path: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Describe an official checkpoint: which system it is of, what conversion maps and drops.

    Raises:
        ValueError: if no converter knows its layout.
    """
    from genkit import convert

    found = convert.recognise(path)
    if found is None:
        raise ValueError(
            f"{str(path)!r} is neither a model folder (model_index.json or config.json) nor a checkpoint that a converter knows; "
            f"converters: {', '.join(convert.systems())}."
        )
    system, file = found
    model, report = convert.load_with_report(system, file, **options)
    config = {key: value for key, value in dict(getattr(model, "config", {})).items() if not key.startswith("_")}
    component = {
        "component": convert.module(system).COMPONENT,
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtypes": {},
        "bytes": file.stat().st_size,
        "config": config,
    }
    licences = {official.licence for official in convert.module(system).OFFICIAL}
    return {
        "name": name,
        "path": str(file),
        "official": system,
        "licence": " or ".join(sorted(licences)) or None,
        "mapped": len(report.mapped),
        "dropped": report.dropped,
        "components": [component],
    }


def show(about: dict[str, Any]) -> None:
    """Print a description for a person."""
    print(about["name"])
    converted = f"{about['official']}, {about['mapped']} tensors mapped, {len(about['dropped'])} dropped" if "official" in about else None
    texts = {
        "what": about.get("summary"),
        "pipeline": about.get("pipeline"),
        "official": converted,
        "licence": about.get("licence"),
        "memory": bytes_text(about["memory_mb"] * 1e6) if about.get("memory_mb") else None,
        "settings": ", ".join(f"{key}={value}" for key, value in about.get("settings", {}).items()),
        "path": about["path"],
        "card": about.get("card"),
    }
    print_table(("", ""), [(f"  {key}", str(value)) for key, value in texts.items() if value])
    rows = []
    for part in about["components"]:
        dtypes = ", ".join(part["dtypes"])
        where = f" (shared: {part['shared']})" if part.get("shared") else ""
        count = f"{part['parameters'] / 1e6:,.2f} M {dtypes}" if part["parameters"] else ""
        rows.append((part["component"] + where, part["class"] or "", count, bytes_text(part["bytes"])))
    print()
    print_table(("component", "class", "parameters", "size"), rows)
    for part in about["components"]:
        if part["config"]:
            print(f"\n{part['component']}: " + ", ".join(f"{key}={value}" for key, value in part["config"].items()))
