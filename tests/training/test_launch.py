"""From a recipe and a command line to a run, and one line for everything that is wrong."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path

import pytest
import yaml

from genkit.training import launch
from genkit.training.launch import RecipeError, find_recipe, main, merge, read_recipe
from tests.training.toy import Regression


@dataclasses.dataclass
class Inner:
    """Nested settings."""

    width: int = 8


@dataclasses.dataclass
class Config:
    """Settings of the toy task.

    Args:
        data: path of the data.
        lr: learning rate.
        inner: nested.
    """

    data: Path
    lr: float = 0.02
    inner: Inner = dataclasses.field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"task_config.lr must be above 0, got {self.lr}.")


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe and its child, and a task called toy."""

    def build(config: Config) -> Regression:
        if not config.data.exists():
            raise FileNotFoundError(f"task_config.data: no file {config.data}.")
        return Regression(lr=config.lr)

    module = types.ModuleType("genkit.tasks.toy")
    module.__dict__.update(Config=Config, build=build)
    monkeypatch.setitem(sys.modules, "genkit.tasks.toy", module)
    monkeypatch.setattr(launch, "task_names", lambda: ["toy", "other"])
    parent = {
        "task": "toy",
        "task_config": {"data": str(tmp_path), "lr": "1e-3", "inner": {"width": 4}},
        "train": {"out": str(tmp_path / "run"), "steps": 6, "batch_size": 4},
    }
    (tmp_path / "parent.yaml").write_text(yaml.safe_dump(parent))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "child.yaml").write_text("base: ../parent.yaml\ntrain: {steps: 4}\n")
    return tmp_path


def test_child_values_win_over_parent_and_command_line_over_both(recipes: Path) -> None:
    assert main(["--config", str(recipes / "sub" / "child.yaml"), "--train.log_every=2", "--task_config.inner.width", "16"]) == 0
    resolved = yaml.safe_load((recipes / "run" / "config.yaml").read_text())
    assert resolved["task"] == "toy"
    assert resolved["task_config"] == {"data": str(recipes), "lr": 0.001, "inner": {"width": 16}}
    assert (resolved["train"]["steps"], resolved["train"]["batch_size"], resolved["train"]["log_every"]) == (4, 4, 2)
    assert len((recipes / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (recipes / "run" / "export" / "net.safetensors").exists()


def test_resolved_configuration_is_itself_a_recipe(recipes: Path) -> None:
    assert main(["--config", "parent", "--train.steps", "2"], recipe_dir=recipes) == 0
    resolved = (recipes / "run" / "config.yaml").read_text()
    assert main(["--config", str(recipes / "run" / "config.yaml")]) == 0
    assert (recipes / "run" / "config.yaml").read_text() == resolved


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        (["--config", "parnt"], "unknown recipe 'parnt'. Did you mean 'parent'?"),
        (["--config", "parent", "--train.stepz", "3"], "train.stepz: unknown key of train 'stepz'. Did you mean 'steps'?"),
        (["--config", "parent", "--train.steps", "many"], "train.steps"),
        (["--config", "parent", "--train.steps", "0"], "train.steps must be at least 1, got 0"),
        (["--config", "parent", "--train.schedule", "linear"], "train.schedule"),
        (["--config", "parent", "--task_config.lr=-1"], "task_config.lr must be above 0, got -1.0"),
        (["--config", "parent", "--task_config.inner.height=3"], "inner.height"),
        (["--config", "parent", "--task_config.data", "/nowhere"], "task_config.data: no file /nowhere"),
        (["--config", "parent", "--steps", "3"], "--steps: unknown option 'steps'"),
        (["--config", "parent", "--task", "toys"], "unknown task 'toys'. Did you mean 'toy'? Known: other, toy."),
        (["--task", "toy", "--train.out=x", "--train.steps=1"], "train.batch_size"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(recipes: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments, recipe_dir=recipes) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not (recipes / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "must be a YAML mapping"),
        ("a: [", "cannot be read as YAML"),
        ("task: toy\ntrian: {}", "unknown key 'trian'. Did you mean 'train'?"),
        ("train: 3", "train must be a mapping, got 3"),
        ("base: gone.yaml", "gone.yaml cannot be read"),
        ("base: bad.yaml", "is its own parent"),
    ],
)
def test_bad_recipes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert message in str(caught.value)


def test_resuming_with_another_batch_size_is_one_line(recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "parent"], recipe_dir=recipes) == 0
    capsys.readouterr()
    assert main(["--config", "parent", "--train.batch_size", "8"], recipe_dir=recipes) == 2
    shown = capsys.readouterr().err
    assert "train.batch_size is 4 there and 8 here" in shown
    assert shown.count("\n") == 1


def test_help_lists_recipes_tasks_and_keys(recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"], recipe_dir=recipes) == 0
    shown = capsys.readouterr().out
    assert "recipes: parent" in shown
    assert "tasks: toy, other" in shown
    assert "--train.batch_size int" in shown
    with pytest.raises(SystemExit) as stopped:
        main(["--config", "parent", "--help"], recipe_dir=recipes)
    assert stopped.value.code == 0
    assert "--task_config.lr" in capsys.readouterr().out


def test_merge_replaces_lists_and_joins_mappings(recipes: Path) -> None:
    assert merge({"a": {"x": 1, "y": [1, 2]}, "b": 1}, {"a": {"y": [3]}, "c": None}) == {"a": {"x": 1, "y": [3]}, "b": 1, "c": None}
    assert find_recipe("parent", recipes) == recipes / "parent.yaml"
