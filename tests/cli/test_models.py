"""The commands that read and run models, on a tiny pipeline that is saved and opened as a user's would be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from genkit import ENATPipeline, ENATTransformer2DModel, MaskedTokenScheduler, ViTVQModel
from genkit.cli.main import main

TOWER = {"dim": 16, "depth": 1, "heads": 1, "mlp_dim": 16, "dim_head": 16}


def tiny_pipeline() -> ENATPipeline:
    """Return a class model with two classes and pictures of 16x16."""
    torch.manual_seed(0)
    return ENATPipeline(
        ENATTransformer2DModel(
            sample_size=4, hidden_size=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, codebook_size=8, num_classes=2
        ).eval(),
        ViTVQModel(
            patch_size=4, encoder_config=TOWER, decoder_config=TOWER, quantizer_config={"name": "simvq", "codebook_size": 8, "dim": 4}
        ).eval(),
        MaskedTokenScheduler(mask_token_id=8),
        id2label={0: "chest", 1: "table"},
        num_inference_steps=3,
    )


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


def generate(model: Path, *words: str) -> int:
    return main(["generate", "--model", str(model), "--device", "cpu", *words])


def test_generate_writes_a_grid_named_after_the_prompt_and_never_over_another(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert generate(model, "chest", "--seed", "5") == 0
    assert "chest.png: 4 pictures, seeds 5 to 8" in capsys.readouterr().out
    picture = Image.open("chest.png")
    assert picture.size == (2 * 16 + 2, 2 * 16 + 2)
    assert picture.text["prompt"] == "chest"  # type: ignore[attr-defined]  # PNG files have it
    assert generate(model, "chest", "--seed", "5") == 0
    assert Image.open("chest-2.png").tobytes() == picture.tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chest-2.png", "chest.png"]


def test_a_picture_is_the_same_alone_as_in_a_grid(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, alone = tmp_path / "grid.png", tmp_path / "alone.png"
    assert generate(model, "chest", "table", "--num-images", "3", "--seed", "10", "--out", str(grid), "--each", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["seeds"] == [10, 11, 12, 13, 14, 15]
    assert record["grid"] == str(grid)
    assert Image.open(grid).size == (3 * 18 - 2, 2 * 18 - 2)
    assert generate(model, "table", "--num-images", "1", "--seed", "14", "--out", str(alone)) == 0
    assert Image.open(alone).tobytes() == Image.open(record["images"][4]).tobytes()


def test_size_enlarges_the_grid_only(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "big.png"
    assert generate(model, "1", "--num-images", "1", "--seed", "1", "--size", "64", "--each", "--out", str(out)) == 0
    assert Image.open(out).size == (64, 64)
    small = Image.open(tmp_path / "big_01.png")
    assert small.size == (16, 16)
    assert small.resize((64, 64), Image.Resampling.NEAREST).tobytes() == Image.open(out).tobytes()


def test_repainting_keeps_what_the_mask_keeps(model: Path, tmp_path: Path) -> None:
    generate(model, "chest", "--num-images", "1", "--seed", "1", "--out", str(tmp_path / "a.png"))
    Image.new("L", (16, 16), 0).save(tmp_path / "nothing.png")
    half = Image.new("L", (16, 16), 0)
    half.paste(255, (0, 0, 8, 16))
    half.save(tmp_path / "half.png")
    repaint = ["table", "--num-images", "1", "--image", str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png")]
    assert generate(model, *repaint, "--mask", str(tmp_path / "half.png")) == 0
    assert Image.open(tmp_path / "b.png").size == (16, 16)


def test_an_edit_changes_the_white_area_alone(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Image.effect_noise((16, 16), 90).convert("RGB")
    before.save(tmp_path / "a.png")
    mask = Image.new("L", (16, 16), 0)
    mask.paste(200, (4, 4, 12, 12))
    mask.save(tmp_path / "mask.png")
    words = ["edit", str(tmp_path / "a.png"), "table", "--mask", str(tmp_path / "mask.png"), "--model", str(model), "--device", "cpu"]
    assert main([*words, "--seed", "3", "--num-images", "2", "--out", str(tmp_path / "b.png"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [Path(path).name for path in record["images"]] == ["b_01.png", "b_02.png"]
    after = Image.open(record["images"][0])
    white = mask.point([0] * 128 + [255] * 128)
    black = white.point([255] + [0] * 255)
    kept = [Image.composite(picture, Image.new("RGB", (16, 16)), black).tobytes() for picture in (before, after)]
    assert kept[0] == kept[1] and after.tobytes() != before.tobytes()
    assert Image.open(record["sheet"]).size == (4 * 18 - 2, 16)
    before.resize((20, 20)).save(tmp_path / "a.png")
    assert main([*words, "--out", str(tmp_path / "c.png")]) == 2
    assert "--mask must be as large as the picture, 20x20, got 16x16" in capsys.readouterr().err
    mask.resize((20, 20)).save(tmp_path / "mask.png")
    assert main([*words, "--out", str(tmp_path / "c.png")]) == 2
    assert "the picture is 20x20 pixels, the model makes 16x16; add --resize" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "c.png"), "--resize"]) == 0
    assert Image.open(tmp_path / "c.png").size == (16, 16)
    for changed, message in ((["--out", "x.jpg"], "--out must end in .png"), (["--sheet", "x.gif"], "--sheet must end in .png")):
        assert main([*words, *changed]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chst"], "unknown class 'chst'. Did you mean 'chest'?"),
        (["chest", "--out", "grid.jpg"], "--out must end in .png"),
        (["chest", "--out", "nowhere/grid.png"], "there is no folder"),
        (["chest", "--image", "a.png"], "--image and --mask belong together"),
        (["chest", "--device", "cuda:99"], "unknown device 'cuda:99'"),
        (["chest", "--seed", "4611686018427387903"], ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_generate_errors_are_one_line_and_leave_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code = generate(model, *words)
    error = capsys.readouterr().err
    if message:
        assert code == 2
        assert message in error
        assert error.strip().count("\n") == 0
        assert not list(tmp_path.iterdir())
    else:
        assert code == 0


def test_picture_that_is_none_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "a.png"
    text.write_text("no picture")
    assert generate(model, "chest", "--image", str(text), "--mask", str(text), "--out", str(tmp_path / "b.png")) == 2
    assert "is not a picture" in capsys.readouterr().err


def test_info_counts_what_the_files_hold(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(model), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    pipe = tiny_pipeline()
    assert about["pipeline"] == "ENATPipeline"
    assert about["settings"]["num_inference_steps"] == 3
    parts = {part["component"]: part for part in about["components"]}
    assert parts["transformer"]["parameters"] == sum(tensor.numel() for tensor in pipe.transformer.state_dict().values())
    assert parts["transformer"]["class"] == "genkit.ENATTransformer2DModel"
    assert parts["transformer"]["config"]["codebook_size"] == 8
    assert parts["vqvae"]["dtypes"].keys() == {"F32"}
    assert about["memory_mb"] == pytest.approx(pipe.estimate_memory(1).peak / 1e6)
    assert main(["info", str(model)]) == 0
    assert "ENATTransformer2DModel" in capsys.readouterr().out


def test_info_tells_lists_of_numbers_from_components(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "genkit/vdt-lowpoly", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert len(about["settings"]["latents_mean"]) == 8
    assert {part["component"] for part in about["components"]} == {"scheduler", "text_encoder", "tokenizer", "transformer", "vae"}


def test_info_of_a_component_folder(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(model / "vqvae"), "--json"]) == 0
    (part,) = json.loads(capsys.readouterr().out)["components"]
    assert part["class"] == "ViTVQModel"


def test_info_refuses_truncated_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"w": torch.ones(100)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-8])
    assert main(["info", str(tmp_path)]) == 2
    assert "truncated" in capsys.readouterr().err


def test_info_refuses_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"strange": torch.ones(2)}, tmp_path / "weights.safetensors")
    assert main(["info", str(tmp_path / "weights.safetensors")]) == 2
    assert "nor a checkpoint that a converter knows" in capsys.readouterr().err


def test_list_names_official_models_with_licence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)
    official = [model for model in models if model["kind"] == "official"]
    assert official
    assert all(model["licence"] and model["parameters"] and model["memory_mb"] and model["source"] for model in official)
    assert main(["list"]) == 0
    assert official[0]["name"] in capsys.readouterr().out
    assert main(["list", "--packaged", "--json"]) == 0
    assert not [model for model in json.loads(capsys.readouterr().out) if model["kind"] != "packaged"]


def test_verify_checks_a_certificate(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    from genkit.parity import certificate

    folder = tmp_path / "certified"
    shutil.copytree(model, folder)
    certificate.write(folder, [{"prompt": "chest", "generator": [1]}])
    assert main(["verify", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["ok"] == 1
    weights = next((folder / "vqvae").glob("*.safetensors"))
    other = tiny_pipeline().vqvae
    with torch.no_grad():
        for parameter in other.decoder.parameters():
            parameter.add_(0.1)
    other.save_pretrained(folder / "vqvae")
    assert weights.is_file()
    assert main(["verify", str(folder)]) == 1
    assert "FAIL 0.images" in capsys.readouterr().out


def test_verify_needs_a_model_or_cases(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ([], "either a packaged model or --cases"),
        ([str(model)], "has no certificate"),
        (["--cases", str(tmp_path)], "no case below"),
        ([str(model), "--only", "*"], "go with --cases"),
    ):
        assert main(["verify", *words]) == 2
        assert message in capsys.readouterr().err
