"""`genkit video` on a tiny pipeline, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genkit.cli.main import main
from genkit.data.video_files import read_clip, write_clip
from tests.pipelines.test_vdt import FRAMES, SIDE, pipeline

PIXELS = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "vdt"
    pipeline("dpm-solver++", num_classes=2, id2label={0: "red", 1: "blue"}).save_pretrained(folder)
    return folder


def video(model: Path, *words: str) -> int:
    return main(["video", "--model", str(model), "--device", "cpu", *words])


def test_clips_are_written_with_a_sheet(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert video(model, "red", "--seed", "3", "--num-clips", "2", "--out", "a.webp", "--fps", "5") == 0
    said = capsys.readouterr().out
    assert "a_01.webp, a_02.webp: 2 clips of 4 frames, seeds 3 to 4" in said and "a-sheet.png" in said
    frames, fps = read_clip("a_02.webp")
    assert frames.shape == (FRAMES, SIDE, SIDE, 3) and fps == pytest.approx(5)
    assert Image.open("a-sheet.png").size == (FRAMES * (SIDE + 2) - 2, 2 * (SIDE + 2) - 2)
    assert video(model, "red", "--seed", "4", "--out", "b.webp") == 0
    assert np.array_equal(read_clip("b.webp")[0], frames)


@pytest.mark.parametrize(("task", "places"), [("predict", [0, 1]), ("backward", [2, 3]), ("interpolate", [0, 3])])
def test_given_frames_stay_and_the_sheet_shows_them(
    task: str, places: list[int], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clip(tmp_path / "in.webp", PIXELS, fps=20)
    words = ["--frames", str(tmp_path / "in.webp"), "--task", task, "--out", str(tmp_path / "out"), "--json", "--scheduler", "ddim"]
    assert video(model, *words) == 0
    record = json.loads(capsys.readouterr().out)
    made, _ = read_clip(tmp_path / "out")
    assert np.array_equal(made[places], PIXELS)
    sheet = np.asarray(Image.open(record["sheet"]))
    first = sheet[:SIDE, places[0] * (SIDE + 2) :][:, :SIDE]
    assert np.array_equal(first, PIXELS[0])
    hidden = next(i for i in range(FRAMES) if i not in places)
    assert (sheet[:SIDE, hidden * (SIDE + 2) :][:, :SIDE] == 160).all()


def test_a_region_is_completed(model: Path, tmp_path: Path) -> None:
    write_clip(tmp_path / "in", np.concatenate([PIXELS, PIXELS]))
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:2] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = ["--frames", str(tmp_path / "in"), "--task", "complete", "--mask", str(tmp_path / "mask.png")]
    assert video(model, *words, "--out", str(tmp_path / "out")) == 0
    made, _ = read_clip(tmp_path / "out")
    assert np.array_equal(made[:, 2:], np.concatenate([PIXELS, PIXELS])[:, 2:]) and not np.array_equal(made[:2], PIXELS)


def test_frames_of_another_size_need_resize(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_clip(tmp_path / "in.webp", np.zeros((1, 9, 7, 3), np.uint8))
    words = ["--frames", str(tmp_path / "in.webp"), "--task", "animate", "--out", str(tmp_path / "o.gif")]
    assert video(model, *words) == 2
    assert "7x9 pixels, the model was trained on 4x4; add --resize" in capsys.readouterr().err
    assert video(model, *words, "--resize", "--num-frames", "6") == 0
    assert len(read_clip(tmp_path / "o.gif")[0]) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "a.txt"], "--out must end in"),
        (["--out", "nowhere/a.gif"], "there is no folder"),
        (["--sheet", "a.jpg"], "--sheet must end in .png"),
        (["--frames", "none.gif"], "nothing at"),
        (["--task", "predict"], "give --frames too"),
        (["--mask", "m.png"], "nothing at"),
        (["--frames", "in", "--task", "complete"], "belong together"),
        (["--frames", "in", "--task", "animate"], "starts from one frame"),
        (["--frames", "in", "--num-frames", "2"], "nothing is left to make"),
        (["--frames", "in", "--task", "complete", "--mask", "wide.png"], "must be as large as the frames"),
        (["--scheduler", "dim"], "unknown scheduler 'dim'"),
        (["purple"], "purple"),
        ([" "], "prompt is empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_and_leave_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_clip("in", PIXELS)
    Image.new("L", (9, 4)).save("wide.png")
    assert video(model, *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.strip().count("\n") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "wide.png"]


@pytest.mark.parametrize("fps", ["0", "-3", "fast", "nan"])
def test_impossible_rates_are_refused(model: Path, fps: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        video(model, f"--fps={fps}")
    assert "above 0" in capsys.readouterr().err


def test_models_of_pictures_and_of_clips_name_each_other(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["video", "--model", "genkit/enat-lowpoly", "--device", "cpu"]) == 2
    assert "ENATPipeline, which makes no clips" in capsys.readouterr().err
    assert main(["generate", "red", "--model", str(model), "--device", "cpu"]) == 2
    assert "genkit video" in capsys.readouterr().err
