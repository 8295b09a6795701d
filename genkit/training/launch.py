"""From a recipe to a run: read the YAML, apply the command line, build the task, train.

A recipe names a task and holds what its `Config` and the training loop are told:

    base: parent.yaml            # optional, relative to this file; its values stay unless given here
    task: vit_vqgan              # genkit/tasks/vit_vqgan.py: Config (a dataclass) and build(config)
    task_config: {width: 256}
    train: {out: runs/tokenizer, steps: 20000, batch_size: 32}
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from genkit.checks import unknown
from genkit.training.config import ConfigError, TrainConfig, plain

RECIPE_KEYS = ("base", "task", "task_config", "train")


class RecipeError(ConfigError):
    """A recipe or command line that cannot be used; the message names the key."""


def main(argv: Sequence[str] | None = None, recipe_dir: Path | None = None) -> int:
    """Train what a recipe says.

    Args:
        argv: arguments; those of the process if None.
        recipe_dir: folder whose recipes `--config` may give by bare name.

    Returns:
        Exit status: 0 when done, 1 when training failed, 2 for a recipe or argument that cannot be used, 128 + signal when stopped.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--task")
    given, rest = first.parse_known_args(arguments)
    if not given.config and not given.task:
        return _general_help(arguments, recipe_dir)
    try:
        recipe = read_recipe(find_recipe(given.config, recipe_dir)) if given.config else {}
        task, config, train = resolve(recipe, given.task, rest)
    except RecipeError as error:
        return _fail(str(error), 2)
    return _train(task, config, train)


def task_names() -> list[str]:
    """Return the tasks there are: the modules of genkit.tasks."""
    folder = Path(__file__).resolve().parent.parent / "tasks"
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def find_recipe(name: str, recipe_dir: Path | None) -> Path:
    """Return the file of a recipe given by path, or by bare name in `recipe_dir`.

    Raises:
        RecipeError: if there is none; lists those of `recipe_dir`.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = {file.stem: file for file in sorted(recipe_dir.glob("*.yaml"))} if recipe_dir else {}
    if path.stem in known and path.parent == Path():
        return known[path.stem]
    raise RecipeError(f"--config: no file {name}; {unknown(name, known, 'recipe')}")


def read_recipe(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a recipe and its parents; a child's values win, dicts are merged, lists replaced.

    Raises:
        RecipeError: if a file is missing, not a YAML mapping, has unknown keys, or is its own parent.
    """
    path = path.resolve()
    if path in seen:
        raise RecipeError(f"base: {path} is its own parent; remove one `base:`.")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path} must be a YAML mapping with the keys {', '.join(RECIPE_KEYS)}, got {type(recipe).__name__}.")
    for key in recipe:
        if key not in RECIPE_KEYS:
            raise RecipeError(f"{path}: {unknown(key, RECIPE_KEYS, 'key')}")
    for key in ("task_config", "train"):
        if not isinstance(recipe.get(key) or {}, dict):
            raise RecipeError(f"{path}: {key} must be a mapping, got {recipe[key]!r}.")
    base = recipe.pop("base", None)
    return merge(read_recipe(path.parent / base, (*seen, path)), recipe) if base else recipe


def merge(parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parent's values with the child's in their place, dict by dict."""
    merged = dict(parent)
    for key, value in child.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def resolve(recipe: Mapping[str, Any], task: str | None, overrides: Sequence[str]) -> tuple[str, Any, TrainConfig]:
    """Turn a recipe and command-line overrides into typed configurations.

    Args:
        recipe: merged recipe.
        task: name given on the command line, or None.
        overrides: such as `--train.steps 100 --task_config.data PATH`.

    Returns:
        Task name, its `Config`, and the training configuration.

    Raises:
        RecipeError: naming the key that is unknown, missing or impossible.
    """
    from jsonargparse import ArgumentError, ArgumentParser, Namespace

    name = task or recipe.get("task")
    if not isinstance(name, str):
        raise RecipeError(f"task: name one of {', '.join(task_names())}.")
    module = _task_module(name)
    about = f"Train {name}; --config gives a recipe."
    parser = ArgumentParser(prog=f"train --task {name}", exit_on_error=False, allow_abbrev=False, description=about)
    parser.add_argument("--task_config", type=module.Config)
    parser.add_argument("--train", type=TrainConfig)
    groups = {"task_config": module.Config, "train": TrainConfig}
    for key, kind in groups.items():
        _check_keys(key, recipe.get(key) or {}, kind)
    _check_options(overrides, groups)
    given = [text for key in groups if recipe.get(key) for text in (f"--{key}", json.dumps(plain(recipe[key])))]
    try:
        parsed: Namespace = parser.parse_args([*given, *overrides])
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name before jsonargparse 4.49
        built = instantiate(parsed)
    except (ArgumentError, ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error
    return name, built.task_config, built.train


def _task_module(name: str) -> ModuleType:
    """Import a task by convention."""
    if name not in task_names():
        raise RecipeError(f"task: {unknown(name, task_names(), 'task')}")
    return importlib.import_module(f"genkit.tasks.{name}")


def _check_keys(where: str, values: Mapping[str, Any], kind: type) -> None:
    """Refuse keys that the dataclass `kind` does not have, with the nearest one that it has."""
    fields = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in fields:
            raise RecipeError(f"{where}.{key}: {unknown(key, fields, f'key of {where}')}")


def _check_options(options: Sequence[str], groups: Mapping[str, type]) -> None:
    """Refuse options that name no field of a group."""
    for option in options:
        key, _, name = option.split("=")[0].removeprefix("--").partition(".")
        if not option.startswith("--") or option in ("--help", "--train.help", "--task_config.help"):
            continue
        if key not in groups:
            known = ["config", "task", *groups]
            raise RecipeError(f"{option}: {unknown(key, known, 'option')} Give values as --train.KEY or --task_config.KEY.")
        if name:
            _check_keys(key, {name.split(".")[0]: None}, groups[key])


def _train(name: str, config: Any, train: TrainConfig) -> int:
    """Build the task and run the loop; report what the user can mend in one line."""
    from genkit.training.checkpoint import CheckpointError
    from genkit.training.loop import NonFiniteError, Trainer

    try:
        task = _task_module(name).build(config)
        trainer = Trainer(task, train, {"task": name, "task_config": plain(config), "train": plain(train)})
    except (ValueError, OSError, ImportError) as error:
        return _fail(str(error), 2)
    try:
        result = trainer.run()
    except (ConfigError, CheckpointError) as error:
        return _fail(str(error), 2)
    except NonFiniteError as error:
        return _fail(str(error), 1)
    return 128 + result.stopped_by if result.stopped_by else 0


def _general_help(arguments: Sequence[str], recipe_dir: Path | None) -> int:
    """Say how to start, or what is missing."""
    recipes = sorted(path.stem for path in recipe_dir.glob("*.yaml")) if recipe_dir else []
    usage = "--config RECIPE.yaml [--train.KEY VALUE ...] [--task_config.KEY VALUE ...]"
    lists = [f"recipes: {', '.join(recipes) or 'none here'}", f"tasks: {', '.join(task_names()) or 'none'}"]
    if not {"--help", "-h"} & set(arguments):
        return _fail("; ".join([f"--config is missing: name a recipe. usage: {usage}", *lists]), 2)
    print(f"usage: {usage}", *lists, "\nWith --config, --help also lists the keys of the recipe's task. Training:", sep="\n")
    for field in dataclasses.fields(TrainConfig):
        default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
        print(f"  --train.{field.name} {field.type}{default}")
    return 0


def _fail(message: str, status: int) -> int:
    """Print one line of error, once for all local processes."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("error: " + " ".join(message.split()), file=sys.stderr)
    return status
