"""The frame of the command line: light, found by convention, one line for an expected error."""

from __future__ import annotations

import argparse
import subprocess
import sys
from types import ModuleType

import pytest

from genkit.cli import main as cli

HEAVY = "sorted({'torch', 'diffusers', 'transformers', 'accelerate', 'datasets', 'numpy', 'jsonargparse'} & sys.modules.keys())"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["generate", "--help"],
        ["generate"],
        ["generate", "a chest", "--num-images", "0"],
        ["generate", "a chest", "--nun-images", "4"],
        ["generate", "a chest", "--model", "genkit/enat-lowpoli"],
        ["generate", "a chest", "--image", "nowhere.png"],
        ["info", "genkit/nothing"],
        ["convert", "enatt", "nowhere.pth", "out"],
        ["verify", "--cases", "nowhere"],
        ["recipes"],
        ["nonsense"],
    ],
    ids=" ".join,
)
def test_help_and_argument_errors_import_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from genkit.cli.main import main
try:
    code = main({arguments!r})
except SystemExit as end:
    code = end.code
print("HEAVY", {HEAVY})
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr
    fine = "--help" in arguments or arguments == ["recipes"]
    assert done.returncode == (0 if fine else 2), done.stderr
    assert "Traceback" not in done.stderr


def test_every_command_has_help_arguments_and_run() -> None:
    commands = cli.find_commands()
    made = {"edit", "generate", "make", "reconstruct", "remesh", "shape", "video"}
    assert set(commands) == made | {"convert", "doctor", "eval", "info", "list", "recipes", "tokenize", "tokenizer-report", "verify"}
    for module in commands.values():
        assert isinstance(module, ModuleType)
        assert module.HELP
        assert not module.HELP.endswith(".")
        assert module.add_arguments(argparse.ArgumentParser()) is None
        assert callable(module.run)


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["genrate", "a chest"])
    assert end.value.code == 2
    assert "Did you mean 'generate'?" in capsys.readouterr().err


def test_unknown_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["generate", "a chest", "--num-imges", "4"])
    assert "Did you mean '--num-images'?" in capsys.readouterr().err


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 0
    assert "generate" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import genkit

    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == genkit.__version__


def test_expected_error_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "  "]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("genkit: error: prompt is empty")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_debug_raises() -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        cli.main(["generate", " ", "--debug"])


def test_error_from_elsewhere_says_its_type_and_how_to_see_more() -> None:
    try:
        int("many\nlines")
    except ValueError as error:
        text = cli.describe(error)
    assert text.startswith("ValueError: invalid literal")
    assert text.endswith("(--debug shows where)")
    assert "\n" not in text
