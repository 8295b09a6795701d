"""Training of the video transformer: text, latents, sprites; exact resume; masks; a pipeline at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch.testing import assert_close

from genkit.data.clips import open_clips
from genkit.data.video_masks import MaskMixture
from genkit.pipelines.base import GenPipeline
from genkit.pipelines.vdt import VDTPipeline
from genkit.tasks._clip_metrics import held_out_clips
from genkit.tasks.vdt import Config, DiffusionConfig, SamplingConfig, VDTTask, build
from genkit.tokenizers.vit_vqgan import ViTVQModel
from genkit.training.config import TrainConfig
from genkit.training.evaluation import EvaluationConfig
from genkit.training.loop import Trainer
from genkit.training.task import StepContext
from tests.data.toy import strips, write_views
from tests.pipelines.toy import text_parts, toy_tokenizer

MODEL: dict[str, Any] = {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    return str(write_views(folder / "train.parquet", list(strips())))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))


def task(data: str, text: bool = False, vae: Any = None, **options: Any) -> VDTTask:
    own = {"model": MODEL, "sampling": SamplingConfig(num_inference_steps=2), **options}
    config = Config(data=data, image_size=8, num_frames=4, **own)
    parts = text_parts() if text else None
    return VDTTask(config, open_clips(data, 8, 4), (parts["text_encoder"], parts["tokenizer"]) if parts else None, vae)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("text", [True, False])
def test_a_run_ends_in_a_pipeline(text: bool, optimizer: str, data: str, tmp_path: Path) -> None:
    def fresh() -> VDTTask:
        masks = {"random": 1.0, "predict:1": 1.0, "keys:2": 1.0}
        return task(
            data, text, optimizer=optimizer, masks=masks, gradient_checkpointing=text, diffusion=DiffusionConfig(predict_clean=text)
        )

    config = TrainConfig(out=str(tmp_path / "a"), steps=4, batch_size=4, checkpoint_every=2, log_every=1, sample_every=4)
    assert Trainer(fresh(), config).run().losses["main"] > 0
    torn = TrainConfig(**{**config.__dict__, "out": str(tmp_path / "b")})
    Trainer(fresh(), torn).run(until=2)
    Trainer(fresh(), torn).run()
    clips = []
    for out in "ab":
        pipe: Any = GenPipeline.from_pretrained(tmp_path / out / "export")
        pipe.set_progress_bar_config(disable=True)
        clips.append(pipe("a table" if text else None, generator=[1], output_type="pt").frames)
    assert torch.equal(*clips) and pipe.transformer.config["merged"]
    assert pipe.scheduler.config["prediction_type"] == ("sample" if text else "epsilon")
    assert {file.name.split("-")[0] for file in (tmp_path / "a" / "samples").iterdir()} == {"animated", "generated"}


def test_turntables_begin_anywhere_and_stay_in_order(data: str) -> None:
    built = task(data)
    frames = torch.arange(4.0).view(1, 4, 1, 1, 1).expand(64, 4, 3, 1, 1)
    context = StepContext(0, 0, torch.device("cpu"))
    found = built.clips({"frames": frames}, context)[:, :, 0, 0, 0]
    assert {int(row[0]) for row in found} == {0, 1, 2, 3}
    assert torch.equal((found - found[:, :1]) % 4, torch.arange(4.0).expand(64, 4))
    fixed = task(data, any_start=False).clips({"frames": frames}, context)
    assert torch.equal(fixed, frames)


def test_what_is_given_gets_no_error(data: str) -> None:
    built = task(data, masks={"predict:3": 1.0}, model={**MODEL, "learn_sigma": False})
    built.dataset()
    seen = []
    built.modules["transformer"].register_forward_hook(lambda module, args, output: seen.append((args[0], output.sample)))
    batch = {"frames": torch.randn(2, 4, 3, 8, 8), "index": torch.arange(2)}
    phase = next(iter(built.step(batch, StepContext(0, 0, torch.device("cpu")))))
    x, output = seen[0]
    (gradient,) = torch.autograd.grad(phase.loss, output)
    assert float(gradient[:, :3].abs().max()) == 0 and float(gradient[:, 3].abs().max()) > 0
    clean = built.clips(batch, StepContext(0, 0, torch.device("cpu")))
    assert torch.equal(x[:, :3], clean[:, :3]) and not torch.equal(x[:, 3], clean[:, 3])


def test_latents_come_from_the_posterior_a_few_frames_at_a_time(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        latent_channels=4, norm_num_groups=2, sample_size=8).eval()  # fmt: skip
    built = task(data, vae=vae, model={**MODEL, "patch_size": 2})
    assert cast(Any, built.modules["transformer"]).config["in_channels"] == 4
    frames, context = torch.rand(2, 4, 3, 8, 8), StepContext(0, 0, torch.device("cpu"))
    whole = built.latents(frames, context)
    monkeypatch.setattr("genkit.tasks.vdt.ENCODED_AT_ONCE", 3)
    assert_close(task(data, vae=vae, model={**MODEL, "patch_size": 2}).latents(frames, context), whole, rtol=1e-5, atol=1e-5)
    assert whole.shape == (2, 4, 4, 4, 4) and not torch.equal(whole, built.latents(frames, StepContext(1, 0, torch.device("cpu"))))
    Trainer(built, TrainConfig(out=str(tmp_path / "run"), steps=1, batch_size=2, sample_every=1)).run()
    pipe: Any = GenPipeline.from_pretrained(tmp_path / "run" / "export")
    assert pipe.vae is not None and pipe.image_size == (8, 8)


def test_latents_of_an_image_tokenizer_are_normalised_and_may_snap_to_codes(data: str, tmp_path: Path) -> None:
    built = task(data, vae=toy_tokenizer(), model={**MODEL, "patch_size": 2})
    clips = torch.stack([built.data[i]["frames"] for i in range(len(built.data))])
    latents = built.latents(clips, StepContext(0, 0, torch.device("cpu")))
    assert latents.shape == (len(clips), 4, 4, 4, 4)
    flat = latents.transpose(1, 2).flatten(2).transpose(0, 1).flatten(1)
    assert_close(flat.mean(1), torch.zeros(4), atol=1e-4, rtol=0)
    assert_close(flat.std(1), torch.ones(4), atol=1e-3, rtol=0)
    Trainer(built, TrainConfig(out=str(tmp_path / "run"), steps=1, batch_size=2, sample_every=1)).run()
    pipe: Any = GenPipeline.from_pretrained(tmp_path / "run" / "export")
    assert pipe.image_size == (8, 8) and len(pipe.config["latents_mean"]) == 4 and pipe.estimate_memory().peak > 0
    vqvae = built.frame_latents.coder
    assert isinstance(vqvae, ViTVQModel)
    assert_close(pipe.decode(latents)[0], vqvae.decode_latents(vqvae.encode_latents(clips[0]), (4, 4)), atol=1e-4, rtol=1e-3)
    pipe.register_to_config(snap_latents=True)
    decoded = pipe.decode(latents)
    assert_close(pipe.decode(latents + 1e-4), decoded, atol=1e-5, rtol=0)
    assert_close(decoded[0], vqvae.decode(vqvae.encode(clips[0]).indices).sample, atol=1e-4, rtol=1e-3)
    given = clips[0, :1]
    assert torch.equal(pipe(frames=given, mask="animate", generator=[1], output_type="pt").frames[0, :1], given)
    with pytest.raises(ValueError, match="latents_mean and latents_std"):
        VDTPipeline(pipe.transformer, pipe.scheduler, vae=vqvae)


def test_sprites_train_too(tmp_path: Path) -> None:
    np.save(tmp_path / "digits.npy", np.full((3, 28, 28), 255, np.uint8))
    config = Config(sprites=str(tmp_path / "digits.npy"), sequences=5, image_size=32, num_frames=3, model={**MODEL, "patch_size": 8})
    built = build(config)
    assert cast(Any, built.modules["transformer"]).config["in_channels"] == 3
    Trainer(built, TrainConfig(out=str(tmp_path / "run"), steps=1, batch_size=2)).run()


def test_mixtures_draw_their_modes() -> None:
    mixture = MaskMixture({"predict:1": 3.0, "unconditional": 1.0, "keys:3": 0.0})
    masks = [mixture.draw(5, 1, 1, (i + 0.5) / 400).flatten().tolist() for i in range(400)]
    share = sum(mask[0] is False for mask in masks) / 400
    assert 0.65 < share < 0.85 and all(mask[1:] == [True] * 4 for mask in masks)
    keys = MaskMixture({"keys:3": 1.0}).draw(5, 1, 1, 0.1).flatten().tolist()
    assert keys == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": None}, "give data or sprites"),
        ({"sprites": "b"}, "give data or sprites"),
        ({"masks": {"predickt": 1.0}}, "predict"),
        ({"masks": {"predict:x": 1.0}}, "mode:N"),
        ({"masks": {"predict": 0.0}}, "weights"),
        ({"masks": {}}, "weights"),
        ({"null_probability": 2.0}, "null_probability must lie in"),
        ({"lr": 0.0}, "lr and prompts_per_clip"),
        ({"text_encoder": "a"}, "give both or none"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**{"data": "a", **options})


def test_text_needs_captions(tmp_path: Path) -> None:
    np.save(tmp_path / "clips.npy", np.zeros((2, 4, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="no captions"):
        task(str(tmp_path / "clips.npy"), text=True)


def test_restored_and_made_clips_are_judged_while_training(data: str, tmp_path: Path) -> None:
    evaluate = EvaluationConfig(data, metrics=("psnr", "ssim", "frechet-clips"), num_samples=3, batch_size=2, size=32)
    masks = {"predict:2": 1.0, "spatial_temporal": 1.0, "unconditional": 1.0, "random": 1.0}
    built = task(data, text=True, masks=masks)
    config = TrainConfig(str(tmp_path / "run"), steps=2, batch_size=2, evaluate_every=2, evaluate=evaluate)
    Trainer(built, config).run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {key.removeprefix("eval/"): value for line in lines for key, value in line.items() if key.startswith("eval/")}
    assert set(found) == {"psnr/predict:2", "ssim/predict:2", "psnr/spatial_temporal", "ssim/spatial_temporal", "frechet-clips"}
    context = StepContext(2, 0, torch.device("cpu"), {"transformer": built.modules["transformer"].eval()})
    assert built.evaluate(evaluate, context) == built.evaluate(evaluate, context)  # the same clips, masks and seeds each time
    perfect = cast(Any, built)
    truth = torch.stack([built.data[i]["frames"] for i in range(3)])
    perfect.pipeline = lambda transformer: Repeater(truth)
    assert perfect.evaluate(evaluate, context)["psnr/predict:2"] == pytest.approx(58.92, abs=0.01)
    for metrics, message in ((("psrn",), "Did you mean 'psnr'"), (("fvd",), "needs train.evaluate.weights")):
        with pytest.raises(ValueError, match=message):
            Trainer(task(data), TrainConfig(str(tmp_path), 2, 2, evaluate_every=2, evaluate=EvaluationConfig(data, metrics)))


class Repeater:
    """A pipeline that makes the true clips."""

    def __init__(self, truth: torch.Tensor) -> None:
        self.truth = truth

    def set_progress_bar_config(self, **options: Any) -> None:
        pass

    def __call__(self, *prompts: Any, generator: list[int], **options: Any) -> Any:
        return type("Output", (), {"frames": self.truth[generator]})


def test_sprites_are_judged_on_other_ways_or_a_fixed_set(tmp_path: Path) -> None:
    np.save(tmp_path / "digits.npy", np.random.default_rng(0).integers(0, 256, (5, 8, 8), np.uint8))
    np.save(tmp_path / "test.npy", np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), np.uint8))
    model = {**MODEL, "patch_size": 8, "learn_sigma": False}
    config = Config(sprites=str(tmp_path / "digits.npy"), image_size=32, num_frames=4, model=model, masks={"predict:2": 1})
    config.sampling.num_inference_steps = 1
    built = build(config)
    context = StepContext(0, 0, torch.device("cpu"), {"transformer": built.modules["transformer"].eval()})
    found = built.evaluate(EvaluationConfig(str(tmp_path / "digits.npy"), metrics=("mse",), num_samples=2), context)
    assert set(found) == {"mse/predict:2"} and found["mse/predict:2"] > 0
    moving = held_out_clips(EvaluationConfig(str(tmp_path / "digits.npy"), num_samples=2), True, 32, 4, 1, 0)
    assert len(moving) == 2 and not torch.equal(moving[0]["frames"], built.data[0]["frames"])
    fixed = held_out_clips(EvaluationConfig(str(tmp_path / "test.npy")), True, 16, 4, 1, 0)
    assert len(fixed) == 3 and fixed[0]["frames"].shape == (4, 1, 16, 16)
