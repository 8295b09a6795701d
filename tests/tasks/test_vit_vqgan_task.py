"""The tokenizer's training task: what is learned when, and that the start without quantization leaves a used codebook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.testing import assert_close

from genkit.tasks import vit_vqgan
from genkit.tasks.losses import perceptual_distance
from genkit.tasks.vit_vqgan import QuantizerConfig
from genkit.tokenizers.quantizers import SimVQ, build_quantizer
from genkit.tokenizers.quantizers.stats import CodebookStats
from genkit.tokenizers.vit_vqgan import ViTVQModel
from genkit.training.config import TrainConfig
from genkit.training.launch import resolve
from genkit.training.loop import Trainer
from genkit.training.task import Phase, StepContext
from tests.data.toy import strips, write_views


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("views") / "train.parquet"
    write_views(path, list(strips()))
    return str(path)


def config(data: str, **options: Any) -> vit_vqgan.Config:
    tower = vit_vqgan.TowerConfig(dim=16, depth=1, heads=2, mlp_dim=16, dim_head=8)
    codes = vit_vqgan.QuantizerConfig(codebook_size=8, dim=4)
    settings: dict[str, Any] = {"image_size": 8, "patch_size": 2, "perceptual_weight": 0.0} | options
    return vit_vqgan.Config(data=data, encoder=tower, decoder=tower, quantizer=codes, **settings)


def one_step(task: vit_vqgan.ViTVQTask, step: int) -> Phase:
    batch = {"image": torch.stack([task.dataset()[i]["image"] for i in range(4)])}
    ema = {"vqvae": ViTVQModel.from_config(task.modules["vqvae"].config)}
    return next(task.step(batch, StepContext(step=step, seed=0, device=torch.device("cpu"), ema=ema)))


def test_loss_is_the_weighted_sum_of_its_terms(data: str) -> None:
    task = vit_vqgan.build(config(data, l1_weight=2.0, l2_weight=0.5))
    phase = one_step(task, 0)
    logs = phase.logs
    assert_close(phase.loss, 2 * logs["l1"] + 0.5 * logs["l2"] + 0.25 * logs["commitment"] + logs["codebook"], rtol=1e-5, atol=1e-6)


def test_a_tower_takes_a_stack_string_from_a_recipe(data: str) -> None:
    stack, tower = "cga(window=2) + mlp(2), modulation", {"dim": 16, "depth": 1, "heads": 2, "mlp_dim": 16}
    settings = {"data": data, "image_size": 8, "patch_size": 2, "perceptual_weight": 0.0, "encoder": tower, "decoder": tower | {"depth": 2}}
    recipe = {"task": "vit_vqgan", "task_config": settings, "train": {"out": "runs", "steps": 1, "batch_size": 4}}
    _, resolved, _ = resolve(recipe, None, ["--task_config.decoder.stack", stack])
    task = vit_vqgan.build(resolved)
    model = cast(ViTVQModel, task.modules["vqvae"])
    assert model.config["decoder_config"]["stack"] == stack and "stack" not in model.config["encoder_config"]
    phase = one_step(task, 0)
    phase.loss.backward()
    assert phase.loss.isfinite() and all(p.grad is not None for name, p in model.named_parameters() if name.startswith("decoder.blocks"))
    assert any("filters" in name for name, _ in model.named_parameters())


def test_quantizer_learns_only_after_its_start(data: str) -> None:
    task = vit_vqgan.build(config(data, quantize_after=3, fit_pictures=4))
    quantizer = cast(SimVQ, cast(ViTVQModel, task.modules["vqvae"]).quantizer)
    for step, learns in ((2, False), (3, True)):
        task.modules["vqvae"].zero_grad()
        phase = one_step(task, step)
        phase.loss.backward()
        assert ("commitment" in phase.logs) == learns == (quantizer.embedding_proj.weight.grad is not None)


def test_codes_start_at_the_latents_in_model_and_average(data: str) -> None:
    task = vit_vqgan.build(config(data, quantize_after=1, fit_pictures=12))
    model = cast(ViTVQModel, task.modules["vqvae"])
    ema = {"vqvae": ViTVQModel.from_config(model.config)}
    images = torch.stack([task.dataset()[i]["image"] for i in range(12)])
    next(task.step({"image": images}, StepContext(step=1, seed=0, device=torch.device("cpu"), ema=ema)))
    stats = CodebookStats(8)
    stats.update(model.encode(images).indices)
    assert stats.compute()["utilisation"] == 1.0
    assert_close(ema["vqvae"].quantizer.state_dict(), model.quantizer.state_dict(), rtol=0, atol=0)


def test_training_exports_a_tokenizer_and_resumes_across_the_start_of_quantization(data: str, tmp_path: Path) -> None:
    exports = []
    for name, stops in (("whole", [None]), ("parts", [2, None])):
        train = TrainConfig(out=str(tmp_path / name), steps=5, batch_size=4, checkpoint_every=2, log_every=1)
        for until in stops:
            Trainer(vit_vqgan.build(config(data, quantize_after=2, fit_pictures=4)), train).run(until=until)
        exports.append(ViTVQModel.from_pretrained(tmp_path / name / "export" / "vqvae"))
    assert_close(exports[0].state_dict(), exports[1].state_dict(), rtol=0, atol=0)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["psnr"] > 0 for line in lines)


def test_pictures_to_judge_are_reconstructions(data: str) -> None:
    task = vit_vqgan.build(config(data))
    average = task.modules["vqvae"].eval()
    pictures = task.generate([0, 1], StepContext(10, 0, torch.device("cpu"), {"vqvae": average}))
    with torch.no_grad():
        expected = average(torch.stack([task.dataset()[i]["image"] for i in (0, 1)])).sample
    torch.testing.assert_close(pictures.detach(), expected, rtol=1e-5, atol=1e-5)


def test_impossible_settings_name_their_key(data: str) -> None:
    with pytest.raises(ValueError, match="l1_weight"):
        config(data, l1_weight=-1.0)
    with pytest.raises(ValueError, match="lr"):
        config(data, lr=0.0)


def test_perceptual_distance_is_zero_on_equals_and_blind_to_scale() -> None:
    maps = [torch.randn(2, 5, 4, 4), torch.randn(2, 7, 2, 2)]
    assert perceptual_distance(maps, maps).item() == 0
    assert_close(perceptual_distance([3 * m for m in maps], maps), torch.tensor(0.0), rtol=0, atol=1e-5)
    assert_close(perceptual_distance([-m for m in maps], maps), torch.tensor(4.0), rtol=1e-4, atol=0)
    zero = torch.zeros(1, 3, 2, 2, requires_grad=True)
    perceptual_distance([zero], [torch.ones(1, 3, 2, 2)]).backward()
    assert zero.grad is not None and zero.grad.isfinite().all()


def test_any_quantizer_is_named_with_its_own_options() -> None:
    fsq = QuantizerConfig("fsq", options={"levels": [5, 5]}).settings()
    assert fsq == {"name": "fsq", "levels": [5, 5]}
    moving = QuantizerConfig("ema_vq", 64, 8, options={"revive_below": 1.0}).settings()
    assert build_quantizer(moving).codebook_size == 64
    with pytest.raises(ValueError, match="Did you mean 'simvq'"):
        QuantizerConfig("simvk").settings()
