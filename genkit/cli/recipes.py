"""`genkit recipes`: the training recipes and launch scripts that come with the package."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from genkit.checks import choose
from genkit.cli._output import add_json, print_json, print_table
from genkit.paths import LAUNCH_FOLDERS, recipes_dir

HELP = "list, show or copy the training recipes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("action", nargs="?", choices=("list", "show", "copy"), default="list", help="what to do (default: %(default)s)")
    parser.add_argument("name", nargs="?", help="recipe to show or copy, as listed")
    parser.add_argument("folder", nargs="?", type=Path, help="copy: where to put the recipe and the scripts of its launch folder")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """List the recipes, print one, or copy one with its scripts."""
    given = [word for word in (args.name, args.folder) if word is not None]
    wanted = {"list": 0, "show": 1, "copy": 2}[args.action]
    if len(given) != wanted:
        usage = {"list": "", "show": " NAME", "copy": " NAME FOLDER"}[args.action]
        raise ValueError(f"recipes {args.action} takes {wanted} argument(s): genkit recipes {args.action}{usage}.")
    recipes = find_recipes()
    if args.action == "list":
        return show_list(recipes, args.json)
    path = recipes[choose(args.name, recipes, "recipe")]
    if args.action == "show":
        print(path.read_text(), end="")
        return 0
    copied = copy(path, args.folder)
    print_json([str(item) for item in copied]) if args.json else print("\n".join(f"wrote {item}" for item in copied))
    return 0


def find_recipes() -> dict[str, Path]:
    """Return every recipe by name: `tokenizers/simvq_lowpoly` is `tokenizers/recipes/simvq_lowpoly.yaml`."""
    root = recipes_dir()
    files = sorted(path for folder in LAUNCH_FOLDERS for path in (root / folder / "recipes").glob("*.yaml"))
    return {f"{path.relative_to(root).parts[0]}/{path.stem}": path for path in files}


def describe(path: Path) -> str:
    """Return what a recipe says of itself: its first line, a comment."""
    with path.open() as file:
        line = file.readline()
    return line.lstrip("# ").strip() if line.startswith("#") else ""


def show_list(recipes: dict[str, Path], as_json: bool) -> int:
    """Print every recipe with its description."""
    if as_json:
        print_json([{"name": name, "description": describe(path), "path": str(path)} for name, path in recipes.items()])
        return 0
    print_table(("recipe", "what it does"), [(name, describe(path)) for name, path in recipes.items()])
    print(f"\nThey lie in {recipes_dir()}. `genkit recipes copy NAME FOLDER` makes a copy to edit and launch.")
    return 0


def copy(recipe: Path, folder: Path) -> list[Path]:
    """Copy a recipe, and the scripts and recipes of its launch folder that are not there yet, keeping their places.

    Args:
        recipe: the YAML file.
        folder: receives `<launch folder>/...`; made if missing.

    Returns:
        The files written.

    Raises:
        FileExistsError: if the recipe is there already; it may have been edited.
    """
    root = recipes_dir()
    target = folder / recipe.relative_to(root)
    if target.exists():
        raise FileExistsError(f"{str(target)!r} is there already and may hold your edits; choose another folder or remove it.")
    launch = root / recipe.relative_to(root).parts[0]
    scripts = sorted(path for path in launch.rglob("*") if path.suffix in (".py", ".yaml") and path != recipe)
    written = []
    for source in (recipe, *scripts):
        place = folder / source.relative_to(root)
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, place)
            written.append(place)
    return written
