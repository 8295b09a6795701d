"""ShapePipeline on small random networks and a VAE that makes a ball of everything; cutting objects out of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from genkit.conditioners.pictures import object_rgba
from genkit.generators.shape_dit import ShapeDiT
from genkit.pipelines.base import GenPipeline
from genkit.pipelines.shape import ShapePipeline, as_shape_prompts
from genkit.schedulers.flow_matching import FlowMatchingScheduler
from tests.pipelines.toy_shapes import ENCODER, ball_pipeline, ball_vae, object_picture


@pytest.fixture(scope="module")
def pipe() -> ShapePipeline:
    return ball_pipeline()


def test_a_picture_becomes_a_closed_mesh(pipe: ShapePipeline) -> None:
    output = pipe(object_picture(), num_inference_steps=3, generator=[1])
    mesh = output.meshes[0]
    assert mesh.is_watertight and mesh.volume > 1 and output.latents.shape == (1, 8, 4) and output.seeds == [1]
    small = pipe(object_picture(), num_inference_steps=2, generator=[1], decoder="dense", max_faces=60).meshes[0]
    assert len(small.faces) <= 60


def test_a_shape_belongs_to_its_seed_and_object_picture(pipe: ShapePipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.0}
    both = pipe([object_picture(), object_picture(width=28)], generator=[1, 2, 3, 4], num_images_per_prompt=2, samples_at_once=4, **options)
    alone = pipe(object_picture(), generator=[2], **options)
    torch.testing.assert_close(both.latents[1:2], alone.latents, atol=1e-5, rtol=1e-4)
    assert (both.latents[0] - both.latents[1]).abs().max() > 1e-2
    guided, plain = (pipe(object_picture(), generator=[1], num_inference_steps=3, guidance_scale=scale).latents for scale in (4.0, 1.0))
    assert (guided - plain).abs().max() > 1e-3


def test_views_are_named_and_put_in_order(pipe: ShapePipeline) -> None:
    front, left = object_picture(), object_picture(width=28)
    options: dict[str, Any] = {"num_inference_steps": 2, "generator": [1]}
    first = pipe([front, left], views=["front", "left"], **options)
    again = pipe([left, front], views=[1, 0], **options)
    torch.testing.assert_close(first.latents, again.latents)
    assert len(first.meshes) == 1
    swapped = pipe([left, front], views=["front", "left"], **options)
    assert (swapped.latents - first.latents).abs().max() > 1e-5


def test_the_loop_can_be_steered_and_ends_where_the_call_does(pipe: ShapePipeline) -> None:
    states = [state.clone() for state in pipe.iterate(object_picture(), num_inference_steps=4, generator=[5])]
    assert [state.index for state in states] == [0, 1, 2, 3]
    torch.testing.assert_close(states[-1].sample, states[-2].sample)  # the empty last step
    torch.testing.assert_close(states[-2].predicted, states[-1].sample)
    final = pipe(object_picture(), num_inference_steps=4, generator=[5]).latents
    torch.testing.assert_close(states[-1].sample / pipe.vae.config["scale_factor"], final)

    def stop(pipe: Any, step: int, timestep: float, fields: dict[str, Any]) -> dict[str, Any]:
        return {"sample": torch.zeros_like(fields["sample"])} if step == 3 else {}

    assert not pipe(object_picture(), num_inference_steps=4, generator=[5], callback_on_step_end=stop).latents.any()


def test_folders_come_back(pipe: ShapePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    again = GenPipeline.from_pretrained(str(tmp_path / "model"))
    again.set_progress_bar_config(disable=True)
    assert isinstance(again, ShapePipeline)
    options: dict[str, Any] = {"num_inference_steps": 2, "generator": [3]}
    assert torch.equal(again(object_picture(), **options).latents, pipe(object_picture(), **options).latents)
    assert again.estimate_memory(2).peak > again.estimate_memory(1).weights > 0


def test_objects_are_cut_out_by_alpha_or_background() -> None:
    by_alpha = object_rgba(object_picture("RGBA", (0, 0, 0, 0)))
    by_colour = object_rgba(object_picture(background=(30, 90, 200)))
    assert ((by_alpha[..., 3] > 0) == (by_colour[..., 3] > 0)).mean() > 0.99 and by_colour[16, 16, 3] == 255
    grey = object_rgba(object_picture("RGB").convert("L"))
    assert grey[16, 16, 3] == 255 and grey[0, 0, 3] == 0
    with pytest.raises(ValueError, match="of one colour"):
        object_rgba(Image.new("RGB", (32, 32), "white"))
    with pytest.raises(ValueError, match="at least 16 x 16 pixels is needed, got 8 x 20"):
        object_rgba(Image.new("RGB", (8, 20), "white"))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="no plain background"):
        object_rgba(noise)


def test_bad_calls_say_what_is_wrong(pipe: ShapePipeline) -> None:
    with pytest.raises(ValueError, match="takes pictures, not text, got 'a chair'"):
        pipe("a chair")
    with pytest.raises(ValueError, match=r"views=\['front'\] name 1 pictures of an object, got 2"):
        pipe([object_picture(), object_picture()], views=["front"])
    with pytest.raises(ValueError, match="Did you mean 'front'"):
        pipe([object_picture()], views=["frnt"])
    pipe.register_to_config(takes_views=False)
    with pytest.raises(ValueError, match="takes one picture of an object"):
        pipe([object_picture()], views=["front"])
    pipe.register_to_config(takes_views=True)
    with pytest.raises(TypeError, match="several views of one object give views="):
        pipe([[object_picture(), object_picture()]])
    with pytest.raises(ValueError, match="num_inference_steps .* got 0, 1"):
        pipe(object_picture(), num_inference_steps=0)
    with pytest.raises(ValueError, match="max_faces must be at least 4"):
        pipe(object_picture(), max_faces=2)
    with pytest.raises(ValueError, match="the prompt is empty"):
        as_shape_prompts([], None)
    sizes: dict[str, Any] = {"in_channels": 4, "context_in_dim": 16, "hidden_size": 16, "num_heads": 2, "depth": 0, "depth_single": 1}
    others = (ball_vae(), FlowMatchingScheduler(), Dinov2Model(Dinov2Config(**ENCODER)))
    wide, narrow = ShapeDiT(**{**sizes, "in_channels": 6}), ShapeDiT(**{**sizes, "context_in_dim": 8})
    with pytest.raises(ValueError, match="makes latents of width 6, the VAE takes 4"):
        ShapePipeline(wide, *others)
    with pytest.raises(ValueError, match="conditions of width 8, image_encoder gives 16"):
        ShapePipeline(narrow, *others)
