"""The repository keeps its shape: launch folders, import directions, README, recipes, the wheel."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from genkit.paths import LAUNCH_FOLDERS, pretrained_dir, recipes_dir
from genkit.training import launch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

BASE = {"checks", "paths", "weights", "persistent_pickle", "catalogue"}  # leaves of the package
NETWORKS = {"blocks", "tokenizers", "generators", "conditioners", "schedulers", "data"}
# The table of docs/architecture.md: what the modules of a folder may import when they are loaded.
MAY_IMPORT = {
    "blocks": set(),
    "tokenizers": {"blocks"},
    "generators": {"blocks", "tokenizers", "schedulers"},
    "conditioners": {"blocks"},
    "schedulers": set(),
    "data": set(),
    "eval": {"blocks", "data"},
    "training": {"data", "eval"},
    "pipelines": NETWORKS,
    "distill": NETWORKS | {"training"},
    "tasks": NETWORKS | {"pipelines", "distill", "training", "eval"},
    "convert": {"blocks", "tokenizers", "generators", "schedulers"},
    "parity": NETWORKS | {"pipelines", "distill", "tasks", "training", "eval", "convert"},
    "cli": set(),
}


def imports_at_load(path: Path) -> set[str]:
    """Return the genkit modules that a file imports when it is loaded: not in functions, not for type checkers."""
    found: set[str] = set()
    stack: list[ast.stmt] = list(ast.parse(path.read_text()).body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.If):
            stack += node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else [*node.body, *node.orelse]
        elif isinstance(node, ast.ClassDef | ast.Try | ast.With):
            stack += node.body
    return {name for name in found if name == "genkit" or name.startswith("genkit.")}


def modules() -> dict[str, Path]:
    """Return every module of the package by name."""
    files = {}
    for path in sorted((ROOT / "genkit").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize("folder", LAUNCH_FOLDERS)
def test_launch_folder_is_no_package(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert not list((ROOT / folder).rglob("__init__.py")), "a package called tokenizers at the root hides the Hugging Face library"


def test_hugging_face_tokenizers_is_found_from_the_root() -> None:
    done = run_python("import tokenizers; print(tokenizers.__file__)")
    assert done.returncode == 0, done.stderr
    assert not done.stdout.startswith(str(ROOT / "tokenizers"))


def test_import_genkit_imports_nothing_heavy() -> None:
    done = run_python("import sys, genkit; print(sorted({'torch', 'diffusers', 'transformers', 'numpy'} & sys.modules.keys()))")
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names_resolve() -> None:
    import genkit

    missing = [name for name in genkit.__all__ if not hasattr(genkit, name)]
    assert not missing


def test_imports_follow_the_directions() -> None:
    wrong = []
    for name, path in modules().items():
        parts = name.split(".")
        if len(parts) < 2 or parts[1] not in MAY_IMPORT:
            continue
        allowed = MAY_IMPORT[parts[1]] | {parts[1]} | BASE
        for imported in imports_at_load(path):
            target = imported.split(".")[1:2]
            if target and target[0] not in allowed and target[0] not in {"__version__"}:
                wrong.append(f"{name} imports {imported}")
    assert not wrong


def test_no_import_cycles() -> None:
    files = modules()
    graph = {name: {target for target in imports_at_load(path) & files.keys() if target != name} for name, path in files.items()}
    # `from genkit.x import y` counts for genkit.x.y too if that is a module; then the package itself is only its container.
    state: dict[str, str] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if state.get(name) == "done":
            return
        assert state.get(name) != "open", f"import cycle: {' -> '.join((*path, name))}"
        state[name] = "open"
        for target in sorted(graph[name]):
            if not name.startswith(target + "."):
                visit(target, (*path, name))
        state[name] = "done"

    for name in files:
        visit(name, ())


def recipe_files() -> list[Path]:
    return sorted(path for folder in LAUNCH_FOLDERS for path in (ROOT / folder).rglob("*.yaml"))


@pytest.mark.parametrize("path", recipe_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_is_yaml_with_a_description(path: Path) -> None:
    text = path.read_text()
    assert isinstance(yaml.safe_load(text), dict)
    assert re.match(r"# \S.{10,}", text), "the first line of a recipe is a comment that says what it is for"


@pytest.mark.parametrize("path", recipe_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_is_a_configuration_of_its_task(path: Path) -> None:
    recipe = launch.read_recipe(path)
    name, _, train = launch.resolve(recipe, None, [])
    assert name == recipe["task"] and train.steps == recipe["train"]["steps"]


def test_recipes_are_found_in_a_checkout() -> None:
    assert recipes_dir() == ROOT


def test_wheel_carries_the_launch_folders() -> None:
    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {folder: f"genkit/recipes/{folder}" for folder in LAUNCH_FOLDERS}


@pytest.mark.slow
def test_built_wheel_holds_package_models_and_recipes(tmp_path: Path) -> None:
    import zipfile

    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for path in [*recipe_files(), *(ROOT / "genkit" / "pretrained").rglob("*.safetensors")]:
        inside = path.relative_to(ROOT).as_posix()
        assert inside in names or f"genkit/recipes/{inside}" in names
    assert "genkit/py.typed" in names


def test_versions_agree() -> None:
    import genkit

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == genkit.__version__


def test_constraints_satisfy_the_ranges() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    untested = {"av", "wandb", "genkit-torch"}
    for line in [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name not in untested:
            assert requirement.specifier.contains(pinned[name]), f"{line}: constraints.txt pins {pinned.get(name)}"
    assert "torchvision" not in pinned


def test_readme_opens_with_the_two_commands() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [re.sub(r"\s+", " ", line).strip() for line in blocks[0].splitlines() if line.strip()]
    assert lines == [
        'pip install -c constraints.txt -e . && genkit generate "a treasure chest" --num-images 4',
        "pip install -c constraints.txt -e '.[test]' && pytest",
    ]


def test_readme_links_point_to_files() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert targets
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_readme_launches_recipes_that_exist() -> None:
    launched = re.findall(r"accelerate launch (\S+) --config (\S+)", README)
    assert launched
    assert not [path for pair in launched for path in pair if not (ROOT / path).is_file()]


def test_readme_names_only_commands_that_parse() -> None:
    from genkit.cli.main import parse

    lines = [line.split(" #")[0] for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    commands = [part.strip() for line in lines for part in line.split("&&") if part.strip().startswith("genkit ")]
    assert len(commands) >= 7
    import shlex

    for command in commands:
        args = parse(shlex.split(command)[1:])
        assert args.run


@pytest.mark.slow
@pytest.mark.skipif(not (pretrained_dir() / "enat-lowpoly").is_dir(), reason="the packaged model is not there")
def test_readme_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert examples
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), names)
