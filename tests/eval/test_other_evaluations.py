"""CLIP metrics, reconstructions, clips and meshes: functions and command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from genkit.cli.main import main
from genkit.eval import clip
from genkit.eval.clips import Clips
from genkit.eval.extract import extract
from genkit.eval.i3d import I3D
from genkit.eval.meshes import compare as compare_meshes
from genkit.eval.pairs import compare
from genkit.eval.pictures import open_source
from genkit.eval.reconstruction import psnr_per_image, psnr_pooled
from tests.eval.test_networks import lpips, weights_for


def pictures(folder: Path, count: int, seed: int, side: int = 24) -> Path:
    rng = np.random.default_rng(seed)
    for i in range(count):
        label = folder / ("red_box" if i % 2 else "tree")
        label.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side + 4, 3)).astype(np.uint8)).save(label / f"{i}.png")
    return folder


# ---- CLIP ----


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights and a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 10, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 8}, projection_dim=12)
    words = {word: i for i, word in enumerate(["<s>", "</s>", "<pad>", "<unk>", "red", "box", "tree"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8, **marks).save_pretrained(folder)
    return folder


def test_embeddings_are_those_of_the_model(clip_model: Path, tmp_path: Path) -> None:
    extractor = clip.ClipExtractor(clip_model)
    square = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    pixels = (torch.from_numpy(square).permute(2, 0, 1) / 255 - torch.tensor(clip.MEAN)[:, None, None]) / torch.tensor(clip.STD)[
        :, None, None
    ]
    found = extractor([square], ["image"])["image"]
    vision = extractor.model.vision_model(pixel_values=pixels[None])
    torch.testing.assert_close(found, extractor.model.visual_projection(vision.pooler_output).detach(), rtol=1e-5, atol=1e-6)
    wide = np.concatenate([np.zeros((16, 4, 3), np.uint8), square, np.zeros((16, 5, 3), np.uint8)], axis=1)
    torch.testing.assert_close(extractor([wide], ["image"])["image"], found, rtol=1e-5, atol=1e-6)  # the middle square
    texts = extractor.embed_texts(["red box", "tree", "red box"], batch_size=2)
    torch.testing.assert_close(texts[0], texts[2], rtol=1e-5, atol=1e-6)


def test_clip_metrics(clip_model: Path, tmp_path: Path) -> None:
    extractor = clip.ClipExtractor(clip_model)
    real, fake = (extract(open_source(pictures(tmp_path / str(s), 24, s)), extractor, ["image"], cache="") for s in (0, 1))
    assert clip.cmmd(real, real, extractor).value == pytest.approx(0, abs=1e-9)
    found = clip.cmmd(real, fake, extractor)
    assert found.value > 0 and found.ci is not None and found.ci[0] < found.value < found.ci[1]
    score = clip.clip_score(fake, ["tree"] * 24, extractor)
    assert 0 <= score.value <= 100
    with pytest.raises(ValueError, match="one text per picture, got 3 texts for 24 pictures"):
        clip.clip_score(fake, ["a", "b", "c"], extractor)


def test_clip_commands(clip_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pictures(tmp_path / "a", 6, 0), pictures(tmp_path / "b", 6, 1)
    options = ["--clip", str(clip_model), "--device", "cpu", "--cache", "", "--json"]
    assert main(["eval", "cmmd", str(a), str(b), *options]) == 0
    assert json.loads(capsys.readouterr().out)["metric"] == "cmmd"
    assert main(["eval", "clip-score", str(a), *options]) == 0  # folder names are the texts
    assert json.loads(capsys.readouterr().out)["num_fake"] == 6
    assert main(["eval", "cmmd", str(a), str(b)]) == 2
    assert "needs --clip MODEL" in capsys.readouterr().err


# ---- reconstructions ----


def test_pairs_of_files(tmp_path: Path) -> None:
    originals = open_source(pictures(tmp_path / "a", 4, 0))
    for i in range(len(originals)):
        picture = originals.read(i)
        path = (tmp_path / "b" / picture.name).with_suffix(".webp")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.pixels // 2 * 2).save(path, lossless=True)
    reconstructions = open_source(tmp_path / "b")
    found = compare(originals, reconstructions, lpips("squeeze"))
    x, y = (
        torch.cat([torch.from_numpy(s.read(i).pixels.copy()).permute(2, 0, 1)[None] for i in range(4)])
        for s in (reconstructions, originals)
    )
    assert found["psnr"]["value"] == pytest.approx(float(psnr_per_image(x, y).mean()))
    assert found["psnr-pooled"]["value"] == pytest.approx(float(psnr_pooled(x, y)))
    assert found["psnr"]["ci"][0] < found["psnr"]["value"] and found["ssim-skimage"]["count"] == 4
    assert found["lpips"]["value"] > 0 and "ms-ssim" not in found  # 24 pixels are too few for five scales
    same = compare(originals, originals)
    assert same["psnr"]["value"] == float("inf") and same["psnr"]["equal"] == 4


def test_what_is_no_pair_is_refused(tmp_path: Path) -> None:
    a = open_source(pictures(tmp_path / "a", 4, 0))
    with pytest.raises(ValueError, match="has 4 pictures and .* 2; they must be pairs"):
        compare(a, open_source(pictures(tmp_path / "b", 2, 0)))
    other = pictures(tmp_path / "c", 4, 0)
    (other / "tree" / "0.png").rename(other / "tree" / "00.png")
    with pytest.raises(ValueError, match="different files: tree/0, tree/00"):
        compare(a, open_source(other))
    with pytest.raises(ValueError, match=r"sizes differ, \[24, 28\] and \[30, 34\]"):
        compare(a, open_source(pictures(tmp_path / "d", 4, 0, side=30)))


def test_reconstruction_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pictures(tmp_path / "a", 3, 0), pictures(tmp_path / "b", 3, 1)
    assert main(["eval", "reconstruction", str(a), str(b)]) == 0
    text = capsys.readouterr().out
    assert "psnr-pooled" in text and "ssim-torchmetrics" in text
    assert main(["eval", "reconstruction", str(a), str(b), "--lpips", "alex"]) == 2
    assert "give all three" in capsys.readouterr().err


# ---- clips ----


def test_clips_from_arrays_and_folders_of_frames(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 7, 6, 5, 3)).astype(np.uint8)
    np.save(tmp_path / "a.npy", frames)
    for i, clip_frames in enumerate(frames):
        (tmp_path / "b" / f"clip{i}").mkdir(parents=True)
        for j, frame in enumerate(clip_frames):
            Image.fromarray(frame).save(tmp_path / "b" / f"clip{i}" / f"{j:02d}.png")
    for path in (tmp_path / "a.npy", tmp_path / "b"):
        clips = Clips(path, frames=3, stride=2)
        assert len(clips) == 2
        np.testing.assert_array_equal(clips.read(1).permute(0, 2, 3, 1).numpy(), frames[1, [0, 2, 4]])
        with pytest.raises(ValueError, match="9"):
            Clips(path, frames=5, stride=2)
    with pytest.raises(FileNotFoundError, match="holds no clips"):
        Clips(tmp_path / "none")


@pytest.mark.slow
def test_fvd_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(weights_for(I3D.expected()), tmp_path / "i3d.pt")
    rng = np.random.default_rng(0)
    for name, shift in (("a", 0), ("b", 100)):
        np.save(tmp_path / f"{name}.npy", (rng.integers(0, 100, (3, 10, 20, 24, 3)) + shift).astype(np.uint8))
    words = ["--i3d", str(tmp_path / "i3d.pt"), "--frames", "10", "--device", "cpu"]
    assert main(["eval", "fvd", str(tmp_path / "a.npy"), str(tmp_path / "b.npy"), *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["value"] > 0
    assert main(["eval", "fvd", str(tmp_path / "a.npy"), str(tmp_path / "a.npy"), *words]) == 0
    assert "2,048 clips" in capsys.readouterr().out


def moving_squares(path: Path, count: int, seed: int, speed: int) -> Path:
    """Write clips of coloured squares that move to the right."""
    rng = np.random.default_rng(seed)
    clips = np.zeros((count, 4, 32, 32, 3), dtype=np.uint8)
    for clip_frames in clips:
        top, colour = rng.integers(0, 20), rng.integers(100, 256, 3)
        for j, frame in enumerate(clip_frames):
            frame[top : top + 8, 2 + speed * j : 10 + speed * j] = colour
    np.save(path, clips)
    return path


def test_clip_distance_on_frame_features_sees_motion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speeds = {"real": (0, 0), "same": (1, 0), "faster": (1, 6)}
    paths = {name: str(moving_squares(tmp_path / f"{name}.npy", 24, seed, speed)) for name, (seed, speed) in speeds.items()}
    found = {}
    for name in ("same", "faster"):
        words = ["--network", "efficientnet-lite0", "--frames", "4", "--device", "cpu", "--json"]
        assert main(["eval", "fvd", paths["real"], paths[name], *words]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    assert found["same"]["metric"] == "frechet-clips" and "not FVD" in found["same"]["warnings"][0]
    assert found["faster"]["ci"][0] > found["same"]["value"]
    assert main(["eval", "fvd", paths["real"], paths["same"]]) == 2
    assert "needs --i3d FILE" in capsys.readouterr().err
    assert main(["eval", "fvd", paths["real"], paths["same"], "--network", "efficientnet-lite0", "--frames", "1"]) == 2
    assert "at least 2 frames" in capsys.readouterr().err


# ---- meshes ----


def test_a_mesh_against_itself_and_a_larger_one() -> None:
    box, larger = trimesh.creation.box((2, 2, 2)), trimesh.creation.box((2.2, 2.2, 2.2))
    same, other = compare_meshes(box, box, count=2000, queries=500), compare_meshes(box, larger, count=2000, queries=500)
    assert same["volume-iou"] == 1 and same["face-ratio"] == 1 and same["watertight"] == 1
    assert same["chamfer-l1-sum"] < 0.15 and same["normal-consistency"] > 0.9
    assert other["chamfer-l1-sum"] > same["chamfer-l1-sum"] and 0.5 < other["volume-iou"] < 0.9


def test_mesh_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes: dict[str, Any] = {"box": trimesh.creation.box((1, 1, 1)), "ball": trimesh.creation.icosphere(2)}
    for folder in ("true", "predicted"):
        (tmp_path / folder).mkdir()
        for name, shape in shapes.items():
            shape.export(tmp_path / folder / f"{name}.ply")
    words = ["--points", "200", "--json"]
    assert main(["eval", "mesh", str(tmp_path / "true"), str(tmp_path / "predicted"), *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ball"]["volume-iou"]["value"] == 1 and found["box"]["face-ratio"]["value"] == 1
    (tmp_path / "predicted" / "box.ply").rename(tmp_path / "predicted" / "cube.ply")
    assert main(["eval", "mesh", str(tmp_path / "true"), str(tmp_path / "predicted"), *words]) == 2
    assert "different meshes: box, cube" in capsys.readouterr().err
    (tmp_path / "true" / "ball.ply").write_text("no mesh")
    assert main(["eval", "mesh", str(tmp_path / "true" / "ball.ply"), str(tmp_path / "predicted" / "cube.ply")]) == 2
    assert "cannot be read as a mesh" in capsys.readouterr().err
