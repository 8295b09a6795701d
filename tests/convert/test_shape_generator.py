"""Official files of a whole shape generator: transformer, VAE and image encoder in one, settings beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from genkit import convert
from genkit.convert import dinov2, flashvdm, shape_dit
from genkit.generators.shape_dit import ShapeDiT
from genkit.pipelines.base import GenPipeline
from genkit.pipelines.shape import ShapePipeline
from tests.pipelines.toy_shapes import ball_vae

SETTINGS: dict[str, Any] = {
    "model": {"target": "Hunyuan3DDiT", "params": {"num_heads": 2, "time_factor": 500, "input_size": 8}},
    "vae": {"target": "ShapeVAE", "params": {"heads": 4, "num_latents": 8, "scale_factor": 1.5, "width": 16, "include_pi": False}},
    "image_processor": {"target": "ImageProcessorV2", "params": {"size": 28}},
    "scheduler": {"target": "FlowMatchEulerDiscreteScheduler", "params": {"num_train_timesteps": 1000, "shift": 2.0}},
}


def parts(guidance: bool = False) -> dict[str, dict[str, Tensor]]:
    """Return official state dicts of small networks by component."""
    torch.manual_seed(0)
    transformer = ShapeDiT(
        in_channels=4, context_in_dim=64, hidden_size=16, num_heads=2, depth=1, depth_single=1, guidance_embed=guidance
    )  # fmt: skip
    encoder = Dinov2Model(Dinov2Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14))
    conditioner = {f"main_image_encoder.model.{key}": value for key, value in dinov2.to_official(encoder).items()}
    return {"model": shape_dit.to_official(transformer), "vae": flashvdm.to_official(ball_vae()), "conditioner": conditioner}


def write(folder: Path, content: dict[str, dict[str, Tensor]], suffix: str, settings: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    file = folder / f"model.fp16.{suffix}"
    if suffix == "ckpt":
        torch.save(content, file)
    else:
        save_file({f"{name}.{key}": value.contiguous() for name, state in content.items() for key, value in state.items()}, file)
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS if settings is None else settings))
    return folder


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_whole_generator_opens_as_a_pipeline(suffix: str, tmp_path: Path) -> None:
    content = parts()
    folder = write(tmp_path / "hunyuan3d-dit-test", content, suffix)
    found = convert.recognise(folder)
    assert found is not None and found[0] == "shape_dit"
    pipe = cast(ShapePipeline, GenPipeline.from_pretrained(folder))
    assert isinstance(pipe, ShapePipeline)
    assert pipe.transformer.config["max_period"] == 500 and pipe.transformer.config["num_heads"] == 2
    assert pipe.vae.config["scale_factor"] == 1.5 and pipe.vae.config["num_latents"] == 8
    assert pipe.config["condition_size"] == 28 and pipe.config["num_inference_steps"] == 50
    assert pipe.scheduler.config["shift"] == 2.0 and pipe.scheduler.config["steps"] == "uniform"
    for name, back in {"model": shape_dit.to_official(pipe.transformer), "vae": flashvdm.to_official(pipe.vae)}.items():
        assert all(torch.equal(back[key], value) for key, value in content[name].items())
    image = Image.new("RGBA", (40, 32), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((8, 6, 30, 24), fill=(200, 30, 30, 255))
    pipe.set_progress_bar_config(disable=True)
    output = pipe(image, num_inference_steps=2, generator=[1], octree_resolution=24, decoder="dense")
    assert output.meshes[0].is_watertight


def test_a_turbo_file_gets_its_scheduler_and_few_steps(tmp_path: Path) -> None:
    told = {**SETTINGS, "scheduler": {"target": "ConsistencyFlowMatchEulerDiscreteScheduler", "params": {"pcm_timesteps": 50}}}
    pipe = cast(ShapePipeline, GenPipeline.from_pretrained(write(tmp_path / "a", parts(guidance=True), "safetensors", told)))
    assert pipe.scheduler.config["phases"] == 50 and pipe.config["num_inference_steps"] == 5
    del told["scheduler"]
    pipe = cast(ShapePipeline, GenPipeline.from_pretrained(write(tmp_path / "dit-turbo", parts(guidance=True), "safetensors", told)))
    assert pipe.scheduler.config["phases"] == 100


def test_a_transformer_alone_says_what_is_missing(tmp_path: Path) -> None:
    folder = write(tmp_path / "alone", {"model": parts()["model"]}, "safetensors")
    with pytest.raises(ValueError, match="also pass vae="):
        GenPipeline.from_pretrained(folder)
    pipe = convert.load("shape_dit", folder)
    assert isinstance(pipe, ShapeDiT) and pipe.config["max_period"] == 500


def test_a_vae_alone_is_a_vae(tmp_path: Path) -> None:
    folder = tmp_path / "hunyuan3d-vae"
    folder.mkdir()
    save_file(flashvdm.to_official(ball_vae(num_encoder_layers=1)), folder / "model.fp16.safetensors")
    (folder / "config.yaml").write_text(
        yaml.safe_dump(
            {"target": "ShapeVAE", "params": SETTINGS["vae"]["params"] | {"pc_size": 32, "pc_sharpedge_size": 32, "downsample_ratio": 4}}
        )
    )
    found = convert.recognise(folder)
    assert found is not None and found[0] == "flashvdm"
    vae = cast(Any, convert.load("flashvdm", folder))
    assert vae.config["heads"] == 4 and vae.config["pc_size"] == 32
    (folder / "config.yaml").write_text("nothing")
    with pytest.raises(ValueError, match="config.yaml' holds no settings"):
        convert.load("flashvdm", folder)
