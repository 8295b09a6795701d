"""PixArt as a one-step student and as a teacher: layout, pipeline, distillation from captions encoded before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from genkit import convert
from genkit.convert import sim
from genkit.distill.families import family_of, open_teacher
from genkit.generators import pixart
from genkit.pipelines.base import GenPipeline
from genkit.pipelines.pixart_one_step import PixArtOneStepPipeline
from genkit.tasks._conditions import read_conditions, write_conditions
from genkit.tasks.distill import Config, DistillTask
from genkit.tasks.text_encoder import train_tokenizer
from genkit.training.config import TrainConfig
from genkit.training.loop import Trainer
from genkit.weights import read_checkpoint

WIDTH, CAPTION, TOKENS = 16, 6, 5


def transformer(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = PixArtTransformer2DModel(
        sample_size=4, num_layers=1, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, patch_size=2,
        cross_attention_dim=WIDTH, caption_channels=CAPTION, norm_type="ada_norm_single", use_additional_conditions=False,
        interpolation_scale=1,
    )  # fmt: skip
    return model.eval()


def vae() -> Any:
    torch.manual_seed(1)
    blocks: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, layers_per_block=1).eval()


def text() -> dict[str, Any]:
    torch.manual_seed(2)
    tokenizer: PreTrainedTokenizerFast = train_tokenizer(["a golden chest", "a table"], 260, 8)
    config = T5Config(vocab_size=len(tokenizer), d_model=CAPTION, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return {"tokenizer": tokenizer, "text_encoder": T5EncoderModel(config).eval()}


def captions(count: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(TOKENS) < torch.tensor([5, 2, 3])[:count, None]
    return {"caption": torch.randn(count, TOKENS, CAPTION, generator=generator), "mask": mask}


def test_official_layout_both_ways(tmp_path: Path) -> None:
    model = transformer()
    official = sim.to_official(model)
    official["model.y_embedder.y_embedding"] = torch.randn(120, CAPTION)
    torch.save({"ema": {f"module.{key}": value for key, value in official.items()}}, tmp_path / "SIM-DiT-600M.pth")
    state, _ = read_checkpoint(tmp_path / "SIM-DiT-600M.pth", ("ema",))
    assert sim.recognise({key: tuple(value.shape) for key, value in state.items()})
    loaded = convert.load("sim", tmp_path, num_heads=2)
    for key, value in model.state_dict().items():
        assert_close(loaded.state_dict()[key], value, rtol=0, atol=0)
    official["model.pos_embed"] = official["model.pos_embed"] + 1
    with pytest.raises(ValueError, match="pos_embed differs from its formula"):
        sim.from_official(official, num_heads=2)
    with pytest.raises(ValueError, match="num_heads must divide the width 16, got 3"):
        sim.from_official(official, num_heads=3)


def test_one_step_pipeline_from_text_and_from_captions(tmp_path: Path) -> None:
    pipe: Any = PixArtOneStepPipeline(transformer(), vae(), **text())
    pair = pipe(["a table", "a chest"], generator=[1, 2], output_type="pt").images
    assert pair.shape == (2, 3, 8, 8) and pipe.image_size == (8, 8)
    assert torch.equal(pipe("a chest", generator=[2], output_type="pt").images[0], pair[1])
    caption, mask = pipe.encode_prompt(["a chest"])
    same = pipe(caption=caption, caption_mask=mask, generator=[2], output_type="pt").images
    assert torch.equal(same[0], pair[1])
    pipe.save_pretrained(tmp_path)
    again: Any = GenPipeline.from_pretrained(tmp_path)
    reloaded = again("a chest", generator=[2], output_type="pt").images[0]
    assert_close(reloaded, pair[1], rtol=0, atol=1e-5)  # diffusers makes the positional table anew, in another rounding
    with pytest.raises(ValueError, match="no text encoder; give caption"):
        PixArtOneStepPipeline(transformer(), vae())("a chest")
    with pytest.raises(ValueError, match="give either prompt, or caption"):
        pipe()
    with pytest.raises(ValueError, match="one step and no guidance"):
        pipe("a chest", guidance_scale=4.5)


def test_a_denoiser_keeps_what_is_nearly_clean() -> None:
    given, x = captions(2), torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        found = pixart.denoise(transformer(), x, torch.tensor([0.01, 0.01]), given["caption"], given["mask"])
    assert float((found - x).abs().max()) < 0.1


def test_distillation_from_captions_needs_no_text_encoder(tmp_path: Path) -> None:
    conditions = captions()
    write_conditions(tmp_path / "captions.safetensors", conditions, {name: rows[:1] for name, rows in captions().items()})
    rows, empty = read_conditions(tmp_path / "captions.safetensors")
    assert_close(rows["caption"], conditions["caption"], rtol=1e-3, atol=1e-3)
    assert empty["mask"].shape == (1, TOKENS)
    PixArtAlphaPipeline(None, None, vae(), transformer(), DPMSolverMultistepScheduler()).save_pretrained(tmp_path / "teacher")
    teacher = open_teacher(str(tmp_path / "teacher"))
    assert type(family_of(teacher)).__name__ == "PixArtFamily"
    settings = Config(teacher="toy", data=str(tmp_path / "captions.safetensors"), guidance_scale=2.0, lora=2, lr=1e-3)
    config = TrainConfig(out=str(tmp_path / "run"), steps=2, batch_size=3, checkpoint_every=2, log_every=1, sample_every=2)
    Trainer(DistillTask(settings, teacher), config).run()
    student: Any = GenPipeline.from_pretrained(tmp_path / "run" / "export")
    images = student(caption=rows["caption"][:1], caption_mask=rows["mask"][:1], generator=[1], output_type="pt").images
    assert images.shape == (1, 3, 8, 8)
    assert not any("lora" in name for name, _ in student.transformer.named_parameters())
    with pytest.raises(ValueError, match="no text encoder"):
        family_of(teacher).conditions(["a chest"])
    write_conditions(tmp_path / "bad.safetensors", conditions, {})
    with pytest.raises(ValueError, match="holds no conditions"):
        read_conditions(tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="written as safetensors"):
        write_conditions(tmp_path / "bad.pt", conditions, {})
