"""The package's public names and how light its import is."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import genkit


def test_import_stays_light() -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'numpy'}"
    code = f"import sys, genkit, genkit.paths, genkit.catalogue; genkit.catalogue.packaged_models(); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", [name for name in genkit.__all__ if name != "__version__"])
def test_every_public_name_resolves_to_what_its_module_defines(name: str) -> None:
    assert getattr(genkit, name) is getattr(importlib.import_module(genkit.EXPORTS[name]), name)
    assert name in dir(genkit)


def test_the_list_of_public_names_is_the_table() -> None:
    assert set(genkit.__all__) == genkit.EXPORTS.keys() | {"__version__"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="GenPipelin"):
        _ = genkit.GenPipelin
