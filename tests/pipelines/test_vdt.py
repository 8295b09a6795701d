"""VDTPipeline: what is given stays, seeds, masks, windows, guidance, schedulers, latents, files, bad input."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from genkit.convert.vdt import to_official
from genkit.generators.vdt import VDTTransformer3DModel
from genkit.pipelines.base import GenPipeline
from genkit.pipelines.vdt import VDTPipeline
from genkit.schedulers.gaussian import GaussianDiffusion
from genkit.schedulers.named import SOLVERS, noise_scheduler
from tests.pipelines.toy import text_parts

SIDE, FRAMES = 4, 4


def network(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"sample_size": SIDE, "in_channels": 3, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_frames": FRAMES}
    model = VDTTransformer3DModel(**sizes | options).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model


def pipeline(scheduler: str = "ddim", **options: Any) -> Any:
    parts = {name: options.pop(name) for name in ("vae", "text_encoder", "tokenizer", "id2label", "guidance_scale") if name in options}
    pipe = VDTPipeline(network(**options), noise_scheduler(scheduler), num_inference_steps=2, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip(frames: int, seed: int = 0, side: int = SIDE) -> Tensor:
    return torch.rand(frames, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(
    ("word", "given", "places"),
    [("predict", 2, [0, 1]), ("backward", 2, [2, 3]), ("interpolate", 2, [0, 3]), ("interpolate", 3, [0, 2, 3]), ("animate", 1, [0])],
)
def test_what_is_given_comes_out_as_it_went_in(word: str, given: int, places: list[int]) -> None:
    frames = clip(given)
    made = pipeline()(frames=frames, mask=word, generator=[3], output_type="pt").frames
    assert made.shape == (1, FRAMES, 3, SIDE, SIDE)
    assert torch.equal(made[0, places], frames)


def test_a_mask_in_pixels_completes_a_clip() -> None:
    frames, mask = clip(3), torch.zeros(3, SIDE, SIDE, dtype=torch.bool)
    mask[1:, :2] = True
    made = pipeline()(frames=frames, mask=mask, generator=[3], output_type="pt").frames[0]
    kept = ~mask[:, None].expand_as(frames)
    assert len(made) == 3 and torch.equal(made[kept], frames[kept]) and not torch.equal(made, frames)


def test_the_given_region_of_the_state_changes_nothing() -> None:
    pipe = pipeline("ddpm")
    frames = clip(2)
    plain = list(pipe.iterate(frames=frames, generator=[3]))[-1].composed
    states = pipe.iterate(frames=frames, generator=[3])
    first = next(states)
    first.sample = torch.where(first.run.mask[:, :, None], first.sample, torch.randn_like(first.sample))
    assert torch.equal(list(states)[-1].composed, plain)


@pytest.mark.parametrize("name", ["ddpm", "dpm-solver++"])
def test_a_loop_goes_on_from_any_saved_state(name: str) -> None:
    pipe = pipeline(name)
    states = list(pipe.iterate(frames=clip(2), num_inference_steps=4, generator=[3]))
    for saved in states[:-1]:
        again = list(pipe.iterate(state=saved))
        assert [state.index for state in again] == list(range(saved.index + 1, 4))
        assert torch.equal(again[-1].composed, states[-1].composed)
    changed = states[0].clone()
    changed.sample += 1
    assert not torch.equal(list(pipe.iterate(state=changed))[-1].composed, states[-1].composed)
    with pytest.raises(ValueError, match="nothing is left to do"):
        pipe.iterate(state=states[-1])
    with pytest.raises(ValueError, match="leave prompt and other arguments out"):
        pipe.iterate(state=states[0], frames=clip(2))


def test_a_clip_depends_on_its_seed_alone() -> None:
    pipe = pipeline("ddpm", num_classes=2, id2label={0: "red", 1: "blue"}, guidance_scale=2.0)
    both = pipe(["red", "blue"], frames=clip(1), generator=[1, 2], output_type="pt").frames
    assert torch.equal(pipe("blue", frames=clip(1), generator=[2], output_type="pt").frames[0], both[1])
    together = pipe(["red", "blue"], frames=clip(1), generator=[1, 2], output_type="pt", samples_at_once=2).frames
    assert_close(together, both, rtol=0, atol=1e-4)
    assert not torch.equal(pipe("red", frames=clip(1), generator=[2], output_type="pt").frames[0], both[1])


def test_a_mask_that_is_true_everywhere_is_generation() -> None:
    pipe = pipeline()
    everywhere = torch.ones(FRAMES, SIDE, SIDE, dtype=torch.bool)
    masked = pipe(frames=clip(FRAMES), mask=everywhere, generator=[1], output_type="pt").frames
    assert torch.equal(masked, pipe(generator=[1], output_type="pt").frames)


@pytest.mark.parametrize("name", SOLVERS)
def test_schedulers_by_name(name: str) -> None:
    made = pipeline(name)(generator=[1], num_inference_steps=4, output_type="pt").frames
    assert made.isfinite().all() and float(made.std()) > 0.01


def test_the_ancestral_scheduler_is_the_published_chain() -> None:
    pipe, steps, frames = pipeline("ddpm"), 6, clip(2)
    diffusion = GaussianDiffusion(respacing=str(steps))
    source = torch.Generator().manual_seed(9)
    x = torch.randn(FRAMES, 3, SIDE, SIDE, generator=source)[None]
    clean, mask = torch.zeros_like(x), torch.ones(1, FRAMES, 1, 1, 1, dtype=torch.bool)
    clean[0, :2], mask[0, :2] = frames, False
    with torch.no_grad():
        for i in reversed(range(steps)):
            t = torch.tensor([i])
            output = pipe.transformer(torch.where(mask, x, clean), diffusion.timesteps[t]).sample
            noise = torch.randn(3, FRAMES, SIDE, SIDE, generator=source)[None].transpose(1, 2) if i else torch.zeros_like(x)
            x, _ = diffusion.ancestral_step(x, t, output[:, :, :3], output[:, :, 3:], noise)
    made = list(pipe.iterate(frames=frames, num_inference_steps=steps, generator=[9]))[-1].composed
    assert_close(made, torch.where(mask, x, clean), rtol=1e-4, atol=1e-4)


def test_long_clips_go_on_window_by_window() -> None:
    pipe = pipeline()
    frames = clip(2)
    long = pipe(frames=frames, num_frames=9, overlap=1, generator=[4], output_type="pt").frames[0]
    first = pipe(frames=frames, generator=[4], output_type="pt").frames[0]
    assert len(long) == 9
    assert torch.equal(long[:FRAMES], first)
    raw = list(pipe.iterate(frames=frames, generator=[4]))[-1].composed[0]  # windows go on from what was made, before it is clamped
    second = pipe(frames=raw[-1:], mask="animate", generator=[4 + FRAMES], output_type="pt").frames[0]
    assert_close(long[FRAMES : 2 * FRAMES - 1], second[1:], rtol=0, atol=1e-6)


def test_more_given_frames_than_a_window_are_kept() -> None:
    frames = clip(7)
    made = pipeline()(frames=frames, num_frames=9, generator=[4], output_type="pt").frames[0]
    assert len(made) == 9
    assert torch.equal(made[:7], frames)


def test_text_and_guidance() -> None:
    pipe = pipeline(text_dim=6, **text_parts(6))
    made = [pipe(text, generator=[1], guidance_scale=scale, output_type="pt").frames for text in ("a table", "a chest") for scale in (1, 3)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(made, 2))
    assert not torch.equal(pipe(generator=[1], output_type="pt").frames, made[0])


def test_latents_of_a_vae_are_decoded_a_few_frames_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        latent_channels=4, norm_num_groups=2, sample_size=8).eval()  # fmt: skip
    seen: list[int] = []
    pipe, decode = pipeline(in_channels=4, vae=vae), vae.decode

    def counted(z: Tensor) -> Any:
        seen.append(len(z))
        return decode(z)

    monkeypatch.setattr(vae, "decode", counted)
    monkeypatch.setattr("genkit.pipelines.vdt.FRAMES_AT_ONCE", 3)
    frames = clip(1, side=8)
    made = pipe(frames=frames, mask="animate", generator=[1], output_type="pt").frames
    assert seen == [3, 1] and made.shape == (1, FRAMES, 3, 8, 8)
    assert torch.equal(made[0, 0], frames[0])
    assert pipe.image_size == (8, 8) and pipe.estimate_memory().peak > 0


def test_saved_pipelines_and_official_files_open(tmp_path: Path) -> None:
    pipe = pipeline(num_classes=1)
    pipe.save_pretrained(tmp_path / "pipe")
    again: Any = GenPipeline.from_pretrained(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(generator=[1], output_type="pt").frames, pipe(generator=[1], output_type="pt").frames)
    save_file(to_official(pipe.transformer), tmp_path / "vdt.safetensors")
    official: Any = GenPipeline.from_pretrained(tmp_path / "vdt.safetensors", num_heads=2, scheduler=pipe.scheduler)
    official.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"generator": [1], "num_inference_steps": 2, "output_type": "pt"}
    assert_close(official(**options).frames, pipe(**options).frames, rtol=0, atol=1e-4)


def test_frames_come_as_pictures_arrays_and_tensors() -> None:
    pipe = pipeline()
    pixels = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    options: dict[str, Any] = {"generator": [1], "output_type": "pt"}
    made = pipe(frames=pixels, **options).frames
    assert torch.equal(pipe(frames=[Image.fromarray(frame) for frame in pixels], **options).frames, made)
    assert torch.equal(pipe(frames=torch.from_numpy(pixels / np.float32(255)).movedim(-1, 1) * 2 - 1, **options).frames, made)
    pictures = pipe(frames=pixels, generator=[1]).frames[0]
    assert np.array_equal(np.asarray(pictures[1]), pixels[1]) and len(pictures) == FRAMES
    assert pipe(frames=pixels, generator=[1], output_type="np").frames.shape == (1, FRAMES, SIDE, SIDE, 3)


MASK = torch.ones(FRAMES, SIDE, SIDE, dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": clip(FRAMES)}, "4 of 4 frames are given"),
        ({"frames": clip(2)[:0]}, "at least one frame"),
        ({"frames": []}, "at least one picture"),
        ({"frames": clip(2), "mask": "animate"}, "starts from one frame, got 2"),
        ({"frames": clip(1), "mask": "interpolate"}, "at least 2 key frames"),
        ({"frames": clip(1), "mask": "complete"}, "give the mask itself"),
        ({"frames": clip(1), "mask": "predikt"}, "predict"),
        ({"frames": clip(1), "mask": "generate"}, "uses no frames"),
        ({"mask": "predict"}, "none are given"),
        ({"mask": MASK}, "none are given"),
        ({"frames": clip(FRAMES), "mask": ~MASK}, "nothing to make"),
        ({"frames": clip(3), "mask": MASK}, r"mask must be bool \[3, 4, 4\]"),
        ({"frames": clip(FRAMES), "mask": MASK.float()}, "bool"),
        ({"frames": clip(FRAMES), "mask": MASK, "num_frames": 3}, "whole clip"),
        ({"frames": clip(1, side=5)}, "multiples of 2"),
        ({"frames": torch.zeros(2, 1, 3, SIDE, SIDE), "num_images_per_prompt": 3}, "expected 1 or 3, got 2"),
        ({"num_frames": 0}, "at least 1, got 0"),
        ({"num_frames": 9, "overlap": FRAMES}, "overlap must lie in 1 .. 3"),
        ({"frames": clip(2), "mask": "interpolate", "num_frames": 9}, "fills one window"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"guidance_scale": 2.0}, "needs a prompt"),
        ({"prompt": "a table"}, "takes no prompt"),
        ({"output_type": "jpg"}, "output type"),
    ],
)
def test_bad_calls_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline()(**options)


def test_bad_components_are_refused() -> None:
    with pytest.raises(ValueError, match="pass the VAE"):
        pipeline(in_channels=4)
    with pytest.raises(ValueError, match="all or none"):
        pipeline(text_dim=6)
    with pytest.raises(ValueError, match="6 and 5|5 and 6"):
        pipeline(text_dim=5, **text_parts(6))
    with pytest.raises(TypeError, match="PIL images, an array or a tensor, got str"):
        pipeline()(frames="clip.gif")
