"""Trainings of the same minutes: what comparisons of networks and quantizers share."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from genkit.paths import recipes_dir
from genkit.training import launch
from genkit.training.loop import Trainer

PROBE = 20  # steps that tell the speed


def train_for(recipe: str, overrides: Sequence[str], out: Path, minutes: float, skip: int = 0) -> tuple[Path, int, float]:
    """Train a recipe for as many steps as fit some minutes by the speed of the first ones.

    Args:
        recipe: "family/name", such as "tokenizers/simvq_lowpoly".
        overrides: of the recipe, as on a command line.
        out: folder of the runs `probe` and `run` and of the number of steps; a second call goes on where the first was stopped.
        minutes: of training.
        skip: first steps that are unlike the others and tell no speed.

    Returns:
        Folder of the export, steps, seconds they took in all calls.
    """
    family, name = recipe.split("/")
    values = launch.read_recipe(recipes_dir() / family / "recipes" / f"{name}.yaml")

    def run(folder: Path, steps: int, until: int | None = None) -> float:
        given = [*overrides, "--train.out", str(folder), "--train.steps", str(steps), "--train.warmup", str(min(100, steps))]
        task, task_config, config = launch.resolve(values, None, given)
        return Trainer(importlib.import_module(f"genkit.tasks.{task}").build(task_config), config).run(until=until).seconds

    noted, before = out / "steps.txt", skip + 5
    if not noted.is_file():
        run(out / "probe", before + PROBE, before)
        each = run(out / "probe", before + PROBE) / PROBE
        noted.write_text(f"{max(before, round(minutes * 60 / each))}\n", encoding="utf-8")
    steps, clock = int(noted.read_text(encoding="utf-8")), out / "seconds.txt"
    earlier = float(clock.read_text(encoding="utf-8")) if clock.is_file() else 0.0
    clock.write_text(f"{earlier + run(out / 'run', steps):.1f}\n", encoding="utf-8")
    return out / "run" / "export", steps, float(clock.read_text(encoding="utf-8"))
