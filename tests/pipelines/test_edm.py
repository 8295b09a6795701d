"""EDMPipeline and OneStepPipeline: seeds, guidance, resuming, diffusers' schedulers, text, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch.testing import assert_close

from genkit.generators.edm import EDMUNet2DModel
from genkit.pipelines.base import GenPipeline
from genkit.pipelines.edm import EDMPipeline, OneStepPipeline
from genkit.schedulers.edm_heun import EDMHeunScheduler
from tests.distill.toy import NAMES, UNET, denoiser, teacher
from tests.pipelines.toy import text_parts


def student(label_dim: int = 2) -> Any:
    return OneStepPipeline(denoiser(label_dim), id2label=dict(NAMES) if label_dim else None)


def test_a_picture_depends_on_its_seed_alone() -> None:
    pipe = teacher()
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
    both = pipe(["blue", "red"], generator=[1, 2], **options).images
    assert torch.equal(pipe("red", generator=[2], **options).images[0], both[1])
    assert_close(pipe(["blue", "red"], generator=[1, 2], samples_at_once=2, **options).images, both, rtol=0, atol=1e-4)
    assert not torch.equal(pipe("red", generator=[3], **options).images[0], both[1])
    one = student()
    pair = one(["blue", "red"], generator=[1, 2], output_type="pt").images
    assert torch.equal(one("red", generator=[2], output_type="pt").images[0], pair[1])


def test_guidance_one_costs_one_branch_and_is_plain() -> None:
    pipe, rows = teacher(), []
    pipe.unet.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    pipe("red", num_inference_steps=2, generator=[1])
    pipe("red", num_inference_steps=2, generator=[1], guidance_scale=1.5)
    assert rows == [1, 1, 1, 2, 2, 2]


def test_resuming_with_churn_gives_the_same_end() -> None:
    pipe = teacher()
    pipe.scheduler = EDMHeunScheduler(s_churn=2.0)
    states = [state.clone() for state in pipe.iterate("red", num_inference_steps=4, generator=[5])]
    again = list(pipe.iterate(state=states[1]))
    assert torch.equal(again[-1].sample, states[-1].sample) and len(again) == 2
    assert len(pipe.preview(states[0])) == 1
    with pytest.raises(ValueError, match="after the last of 4 steps"):
        pipe.iterate(state=states[-1])
    with pytest.raises(ValueError, match="leave prompt and other arguments out"):
        pipe.iterate("red", state=states[0])


def test_a_callback_sees_and_changes_the_state() -> None:
    pipe, seen = teacher(), []

    def freeze(pipe: object, index: int, sigma: float, fields: dict[str, Any]) -> dict[str, Any]:
        seen.append((index, sorted(fields)))
        return {"sample": torch.zeros_like(fields["sample"])}

    names = ("sample", "denoised")
    changed = pipe("red", num_inference_steps=2, generator=[1], output_type="pt", callback_on_step_end=freeze,
                   callback_on_step_end_tensor_inputs=names)  # fmt: skip
    assert seen == [(0, ["denoised", "sample"]), (1, ["denoised", "sample"])]
    assert float(changed.images.abs().max()) == 0


def test_diffusers_solver_reaches_the_same_picture() -> None:
    pipe = teacher()
    wanted = pipe("red", num_inference_steps=60, generator=[1], output_type="pt").images
    pipe.scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0)
    found = pipe("red", num_inference_steps=60, generator=[1], output_type="pt").images
    assert float((found - wanted).abs().mean()) < 0.01
    pipe.scheduler = EulerDiscreteScheduler()
    with pytest.raises(ValueError, match="EulerDiscreteScheduler does not work on noise levels"):
        pipe("red", num_inference_steps=2)


def test_text_and_unconditional_models(tmp_path: Path) -> None:
    text = text_parts()
    pipe: Any = EDMPipeline(EDMUNet2DModel(sample_size=8, label_dim=6, unet_config=UNET).eval(), EDMHeunScheduler(), **text)
    pipe.set_progress_bar_config(disable=True)
    rows = pipe.encode_prompt(["a table", "a golden chest"])
    assert_close(rows.norm(dim=1), torch.ones(2), rtol=1e-5, atol=0)
    images = pipe("a table", num_images_per_prompt=2, num_inference_steps=2, generator=7, output_type="pt").images
    pipe.save_pretrained(tmp_path)
    again: Any = GenPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again("a table", num_images_per_prompt=2, num_inference_steps=2, generator=7, output_type="pt").images, images)
    free = teacher(label_dim=0)
    assert free(num_images_per_prompt=3, num_inference_steps=2, generator=1, output_type="np").images.shape == (3, 8, 8, 3)
    with pytest.raises(ValueError, match="unconditional and takes no prompt, got 'red'"):
        free("red")
    with pytest.raises(ValueError, match="conditions of width 6, the text encoder gives 5"):
        OneStepPipeline(pipe.unet, **text_parts(5))


def test_memory_is_estimated_and_outputs_have_their_types() -> None:
    pipe = teacher()
    assert pipe.estimate_memory(8, guidance=True, samples_at_once=8).peak > pipe.estimate_memory(1).peak
    assert student()("red", output_type="np", return_dict=False)[0].shape == (1, 8, 8, 3)
    assert pipe("red", num_inference_steps=1, return_dict=False)[1] != []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "green"}, "unknown class 'green'"),
        ({"prompt": "red", "num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        ({"prompt": "red", "guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"prompt": "red", "num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1"),
        ({"prompt": "red", "output_type": "jpg"}, "unknown output type"),
        ({"prompt": "red", "generator": [1, 2]}, "one seed per sample"),
    ],
)
def test_impossible_calls_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        teacher()(**options)


def test_a_student_takes_one_step_without_guidance() -> None:
    with pytest.raises(ValueError, match="one step and no guidance, got num_inference_steps=4"):
        student()("red", num_inference_steps=4)
    with pytest.raises(ValueError, match="sigma_init must be above 0"):
        OneStepPipeline(denoiser(), sigma_init=0)
    with pytest.raises(ValueError, match="takes 2 classes, id2label names 1"):
        OneStepPipeline(denoiser(), id2label={0: "red"})
