"""`genkit convert`: options as typed, the report, and nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from genkit import ViTVQModel, convert
from genkit.cli.convert import parse_option, systems
from genkit.cli.main import main

TOWER = {"dim": 16, "depth": 1, "heads": 2, "mlp_dim": 32, "dim_head": 8, "act": "tanh"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return an official file made from a tiny model."""
    torch.manual_seed(0)
    model = ViTVQModel(
        patch_size=4,
        encoder_config=TOWER,
        decoder_config=TOWER,
        quantizer_config={"name": "l2_vq", "codebook_size": 8, "dim": 4},
        official_range=True,
        sample_size=8,
    )
    path = tmp_path / "official.safetensors"
    save_file({key: value.contiguous() for key, value in convert.export("vit_vqgan", model).items()}, path)
    return path


def test_systems_are_those_of_the_converters() -> None:
    assert systems() == convert.systems()


@pytest.mark.parametrize(
    ("text", "value"),
    [("a=3", 3), ("a=0.5", 0.5), ("a=22,2", (22, 2)), ("a=true", True), ("a=name", "name"), ("a=x=y", "x=y"), ("a=", "")],
)
def test_option_values_have_the_type_they_spell(text: str, value: object) -> None:
    assert parse_option(text) == ("a", value)


@pytest.mark.parametrize("text", ["a", "=3", "a b=3"])
def test_option_without_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="KEY=VALUE"):
        parse_option(text)


def test_convert_writes_a_model_folder_and_reports(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "converted"
    assert main(["convert", "vit_vqgan", str(checkpoint), str(out), "--option", "dim_head=8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["mapped"]
    assert ViTVQModel.from_pretrained(out).config["decoder_config"]["dim"] == 16
    assert main(["convert", "vit_vqgan", str(checkpoint), str(out)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vit_vqgn", "{file}", "{out}"], "Did you mean 'vit_vqgan'?"),
        (["vit_vqgan", "missing.ckpt", "{out}"], "no checkpoint at"),
        (["vit_vqgan", "{file}", "{out}", "--option", "dim_heads=8"], "Did you mean 'dim_head'?"),
        (["vit_vqgan", "{file}", "{out}", "--option", "dim_head=7"], ""),
    ],
)
def test_convert_errors_leave_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    out = tmp_path / "converted"
    assert main(["convert", *(word.format(file=checkpoint, out=out) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_info_describes_an_official_file(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(checkpoint), "--option", "dim_head=8", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["official"] == "vit_vqgan"
    assert about["components"][0]["class"] == "ViTVQModel"
    assert about["components"][0]["config"]["quantizer_config"]["codebook_size"] == 8
    assert main(["info", str(checkpoint)]) == 2
    assert "give dim_head" in capsys.readouterr().err
