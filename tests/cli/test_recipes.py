"""`genkit recipes`: the list, the text, a copy that can be launched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genkit.cli.main import main
from genkit.cli.recipes import find_recipes


def test_list_shows_every_recipe_with_its_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {item["name"] for item in listed} == find_recipes().keys() != set()
    assert all(len(item["description"]) > 10 for item in listed)
    assert main(["recipes"]) == 0
    assert listed[0]["description"] in capsys.readouterr().out


def test_show_prints_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    name, path = next(iter(find_recipes().items()))
    assert main(["recipes", "show", name]) == 0
    assert capsys.readouterr().out == path.read_text()


def test_copy_brings_scripts_and_parents_and_keeps_edits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, path = next(item for item in find_recipes().items() if "\nbase:" in item[1].read_text())
    folder = path.parent.parent.name
    assert main(["recipes", "copy", name, str(tmp_path)]) == 0
    copied = tmp_path / folder / "recipes" / path.name
    assert copied.read_text() == path.read_text()
    assert (tmp_path / folder / "train.py").is_file()
    parent = path.read_text().split("base:")[1].split()[0]
    assert (copied.parent / parent).is_file()
    copied.write_text("edited")
    capsys.readouterr()
    assert main(["recipes", "copy", name, str(tmp_path)]) == 2
    assert "may hold your edits" in capsys.readouterr().err
    assert copied.read_text() == "edited"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show"], "takes 1 argument"),
        (["show", "tokenizers/simvq_lowpol"], "Did you mean 'tokenizers/simvq_lowpoly'?"),
        (["copy", "tokenizers/simvq_lowpoly"], "takes 2 argument"),
        (["list", "extra"], "takes 0 argument"),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["recipes", *words]) == 2
    assert message in capsys.readouterr().err
