"""`genkit doctor` finds what is broken, in the packages as they would be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from genkit.cli import doctor


def run_doctor(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the command with packages of `path` found before the installed ones."""
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(path), str(root)))}
    command = [sys.executable, "-m", "genkit", "doctor", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path, check=False)


@pytest.mark.slow
def test_torchvision_that_does_not_fit_is_named_with_a_remedy(tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    done = run_doctor(tmp_path, "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert not report["ok"]
    (broken,) = (check for check in report["checks"] if check["state"] == "broken")
    assert broken["name"] == "import torchvision"
    assert "torchvision::nms" in broken["detail"]
    assert "pip uninstall torchvision" in broken["remedy"]
    assert "pip uninstall torchvision" in run_doctor(tmp_path).stdout


@pytest.mark.slow
def test_sound_machine_ends_with_0(tmp_path: Path) -> None:
    done = run_doctor(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "Nothing is broken." in done.stdout


def test_version_outside_the_range_is_broken() -> None:
    check = doctor.check_version("numpy", SpecifierSet(">=999"), None)
    assert check.state == "broken"
    assert check.remedy == "pip install 'numpy>=999'"
    assert doctor.check_version("numpy", SpecifierSet(">=1"), None).state == "ok"


def test_absent_package_is_broken_unless_an_extra_asks_for_it() -> None:
    assert doctor.check_version("no-such-package", SpecifierSet(), None).state == "broken"
    assert doctor.check_version("no-such-package", SpecifierSet(), "video").state == "note"
