"""Distillation of a masked-token generator into fewer steps."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from genkit.data.images import open_dataset
from genkit.generators.enat import ENATTransformer2DModel
from genkit.pipelines.base import GenPipeline
from genkit.pipelines.enat import ENATPipeline
from genkit.schedulers.masked_token import MaskedTokenScheduler
from genkit.tasks.token_distill import Config, TokenDistillTask
from genkit.tokenizers.vit_vqgan import ViTVQModel
from genkit.training.config import TrainConfig
from genkit.training.loop import Trainer
from genkit.training.task import StepContext
from tests.distill.toy import NAMES, pictures, teacher

CODES = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures and a class teacher."""
    root = tmp_path_factory.mktemp("tokens")
    pictures(root / "data")
    torch.manual_seed(0)
    tower = {"dim": 16, "depth": 1, "heads": 1, "mlp_dim": 16, "dim_head": 16}
    vqvae = ViTVQModel(2, tower, tower, {"name": "simvq", "codebook_size": CODES, "dim": 4}, sample_size=8)
    sizes: dict[str, Any] = {"sample_size": 4, "hidden_size": 16, "num_heads": 2, "num_encoder_layers": 1, "num_decoder_layers": 1}
    net = ENATTransformer2DModel(**sizes, codebook_size=CODES, num_classes=2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    pipe = ENATPipeline(net.eval(), vqvae.eval(), MaskedTokenScheduler(mask_token_id=CODES, guidance="constant"), id2label=dict(NAMES))
    pipe.save_pretrained(root / "teacher")
    return root


def task(folder: Path, **options: Any) -> TokenDistillTask:
    settings: dict[str, Any] = {"student_steps": 2, "teacher_factor": 2, "cache": str(folder / "cache")}
    config = Config(teacher=str(folder / "teacher"), data=str(folder / "data"), image_size=8, **{**settings, **options})
    return TokenDistillTask(config, open_dataset(config.data, 8), GenPipeline.from_pretrained(config.teacher))


def start(built: TokenDistillTask) -> tuple[dict[str, Tensor], StepContext]:
    data: Any = built.dataset()
    batch = {"indices": data.indices(slice(0, 6)), "index": torch.arange(6)}
    average = copy.deepcopy(built.modules["transformer"]).eval().requires_grad_(False)
    return batch, StepContext(0, 0, torch.device("cpu"), {"transformer": average})


def test_targets_are_the_teachers_own_words_at_each_token(folder: Path) -> None:
    """Tokens that stay masked to the end carry the last step's log-probabilities, those revealed first the first step's."""
    built = task(folder, guidance_scale=1.0)
    _, ctx = start(built)
    net: Any = built.frozen["teacher"]
    ids, index = torch.full((3, 16), CODES), torch.arange(16).expand(3, 16)
    condition = {"class_labels": torch.tensor([0, 1, 0])}
    found = built.targets(ids, index, 0, condition, ctx)
    assert_close(found.exp().sum(-1), torch.ones(3, 16), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        first = net(ids, condition, masked_index=index, logits_at="masked").logits.log_softmax(-1)
    is_first = (found - first).abs().amax(-1) < 1e-6
    revealed = 16 - built.schedules[1].masked_counts(16)[0]
    assert is_first.sum(1).tolist() == [revealed] * 3


def test_guided_targets_differ_from_plain_ones(folder: Path) -> None:
    ends = []
    for scale in (1.0, 3.0):
        built = task(folder, guidance_scale=scale)
        _, ctx = start(built)
        ids, index = torch.full((2, 16), CODES), torch.arange(16).expand(2, 16)
        ends.append(built.targets(ids, index, 1, {"class_labels": torch.tensor([0, 1])}, ctx))
    assert not torch.allclose(ends[0], ends[1])


def test_only_the_student_learns_and_the_teacher_is_its_start(folder: Path) -> None:
    built = task(folder, reuse_probability=0.0)
    batch, ctx = start(built)
    for mine, theirs in zip(built.modules["transformer"].parameters(), built.frozen["teacher"].parameters(), strict=True):
        assert torch.equal(mine, theirs) and not theirs.requires_grad
    (phase,) = built.step(batch, ctx)
    phase.loss.backward()
    assert float(phase.loss.detach()) > 0
    assert any(p.grad is not None and bool(p.grad.any()) for p in built.modules["transformer"].parameters())
    assert all(p.grad is None for p in built.frozen["teacher"].parameters())


def test_training_brings_the_student_nearer_and_exports_its_steps(folder: Path, tmp_path: Path) -> None:
    built = task(folder, lr=3e-3, null_probability=0.0)
    config = TrainConfig(out=str(tmp_path), steps=60, batch_size=6, checkpoint_every=60, log_every=1, ema_decay=0.9)
    Trainer(built, config).run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-15:]) < 0.7 * sum(losses[:15])
    pipe: Any = GenPipeline.from_pretrained(tmp_path / "export")
    assert pipe.config["num_inference_steps"] == 2 and pipe.config["guidance_scale"] == 1.0


def test_teachers_and_plans_that_do_not_fit_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="teacher_factor at least 2"):
        Config(teacher="x", teacher_factor=1)
    with pytest.raises(ValueError, match=r"masked-token teacher \(ENATPipeline\), got EDMPipeline"):
        TokenDistillTask(Config(teacher="x"), open_dataset(folder / "data", 8), teacher())
