"""`genkit tokenize` and `genkit tokenizer-report` with the packaged tokenizer on a small folder of pictures."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.cli.main import main
from genkit.data.images import open_dataset
from genkit.data.tokens import TokenCache
from genkit.pipelines.tokenizers import DataTokens, load_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "pictures").mkdir()
    generator = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(generator.integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    return str(tmp_path / "pictures")


def test_codes_are_the_tokenizers_and_mirrored_ones_follow(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "codes"
    assert main(["tokenize", folder, "--out", str(out), "--flip", "--batch-size", "3", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["rows"] == 10 and said["grid"] == [16, 16] and said["codebook_size"] == 512 and said["bytes"] == 10 * 256 * 2
    model, data = load_tokenizer("genkit/enat-lowpoly"), open_dataset(folder, 64)
    pictures = torch.stack([data[i]["image"] for i in range(5)])
    expected = torch.cat([model.encode(pictures).indices, model.encode(pictures.flip(-1)).indices]).flatten(1)
    assert torch.equal(TokenCache(out).indices(slice(None)), expected)


def test_a_stopped_job_goes_on_and_a_finished_one_has_nothing_to_do(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, encode, asked = tmp_path / "codes", DataTokens.encode, list[range]()

    def stopping(self: DataTokens, rows: range) -> torch.Tensor:
        asked.append(rows)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return encode(self, rows)

    monkeypatch.setattr(DataTokens, "encode", stopping)
    options = ["tokenize", folder, "--out", str(out), "--batch-size", "2"]
    with contextlib.suppress(KeyboardInterrupt):
        main(options)
    assert main(options) == 0
    assert asked == [range(2), range(2, 4), range(2, 4), range(4, 5)]
    assert main(options) == 0 and len(asked) == 4
    assert "there already" in capsys.readouterr().out.splitlines()[-1]


def test_tiles_are_part_of_what_codes_are_made_from(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, options = str(tmp_path / "codes"), ["--size", "128", "--out", str(tmp_path / "codes")]
    assert main(["tokenize", folder, *options, "--tile", "64"]) == 0
    assert TokenCache(out).meta.grid == (32, 32)
    assert main(["tokenize", folder, *options]) == 2
    assert "tokenizer_hash" in capsys.readouterr().err


def test_report_writes_a_page_and_says_the_figures(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.html"
    assert main(["tokenizer-report", folder, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "5 of 64x64 pixels, 16x16 codes each" in printed and "dB in the mean" in printed and f"wrote {out}" in printed
    assert out.read_text(encoding="utf-8").count("<img ") == 3 * 5
    assert main(["tokenizer-report", folder, "--out", str(out), "--size", "128", "--tile", "64", "--num-pictures", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["pictures"] == 2 and said["rows"] == 32 and 5 < said["psnr"] < 40 and 0 < said["utilisation"] <= 1
    assert said["bits_per_pixel"] == pytest.approx(9 / 16) and said["entropy_bits_per_pixel"] <= said["bits_per_pixel"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenizer-report", "{folder}", "--out", "report.pdf"], "--out must end in .html"),
        (["tokenizer-report", "{folder}/0.png"], "is a single picture; give the folder it lies in"),
        (["tokenize", "{folder}", "--model", "genkit/enat-lowpol"], "Did you mean 'genkit/enat-lowpoly'?"),
        (["tokenize", "{folder}", "--model", "genkit/shape-vae-lowpoly"], "has no image tokenizer"),
        (["tokenize", "{folder}", "--size", "256"], "smaller than size=256"),
        (["tokenize", "{folder}", "--size", "66"], "multiples of the patch 4x4, got 66x66"),
        (["tokenize", "{folder}", "--size", "128", "--tile", "30"], "multiples of the patch 4x4, got 30x30"),
        (["tokenize", "missing"], "missing"),
        (["tokenize", "missing.png"], "there is no picture at 'missing.png'"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], message: str, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [argument.format(folder=folder) for argument in arguments]
    out = ["--out", str(tmp_path / "codes")] if given[0] == "tokenize" else []
    assert main([*given, *out]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("genkit: error:") and len(error.splitlines()) == 1
