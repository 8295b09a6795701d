"""The adversarial stage of tokenizers, the convolutional task, and generators on codes: who gets which gradient, exact resume, exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from genkit.distill.adversarial import GAN_FORMS
from genkit.eval.lpips import TRUNKS
from genkit.pipelines.base import GenPipeline
from genkit.pipelines.tokenizers import load_tokenizer
from genkit.tasks import conv_vqgan, nat, vim
from genkit.tasks._tokenizer import AdversarialConfig, QuantizerConfig
from genkit.tokenizers.conv_vqgan import ConvVQModel
from genkit.tokenizers.discriminators import LeCam
from genkit.training.config import TrainConfig, floored_cosine
from genkit.training.loop import Trainer
from genkit.training.task import StepContext
from tests.data.toy import strips, write_views
from tests.pipelines.toy import text_parts, toy_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("codes")
    write_views(root / "train.parquet", list(strips()))
    toy_tokenizer().save_pretrained(root / "vqvae")
    parts = text_parts()
    for name, part in parts.items():
        part.save_pretrained(root / name)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))


def config(folder: Path, **options: Any) -> conv_vqgan.Config:
    sizes: dict[str, Any] = {"channels": 32, "multipliers": (1, 1), "num_res_blocks": 1, "num_mid_blocks": 1}
    own = {"image_size": 8, "perceptual_weight": 0.0, "quantizer": QuantizerConfig(codebook_size=8, dim=4), **sizes, **options}
    return conv_vqgan.Config(data=str(folder / "train.parquet"), **own)


STYLE = AdversarialConfig("style", width=4, r1_gamma=1.0, r1_every=2, lecam_weight=0.1)


def context(step: int = 0) -> StepContext:
    return StepContext(step, 0, torch.device("cpu"))


def batch(task: conv_vqgan.ConvVQTask) -> dict[str, torch.Tensor]:
    side = task.config.image_size
    return {"image": torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1}


def test_each_side_learns_from_its_own_loss(folder: Path) -> None:
    task = conv_vqgan.build(config(folder, adversarial=STYLE, flip=False))
    optimizers = task.optimizers()
    steps = task.step(batch(task), context())
    first = next(steps)
    assert first.optimizer == "main"
    first.loss.backward()
    assert all(p.grad is not None for p in task.modules["vqvae"].parameters() if p.requires_grad)
    optimizers["main"].step()
    for module in task.modules.values():
        module.zero_grad(set_to_none=True)  # as the loop does: the discriminator's share of the first loss is gone
    second = next(steps)
    assert second.optimizer == "discriminator" and {"r1", "logits_real"} <= second.logs.keys()
    second.loss.backward()
    assert all(p.grad is None for p in task.modules["vqvae"].parameters())
    assert all(p.grad is not None for p in task.modules["discriminator"].parameters())
    assert "r1" not in list(task.step(batch(task), context(1)))[1].logs


def test_terms_add_up_with_a_fixed_and_an_adaptive_weight(folder: Path) -> None:
    for is_adaptive in (False, True):
        own = AdversarialConfig("patch", width=4, form="non_saturating", discriminator_form="hinge", weight=0.3, is_adaptive=is_adaptive)
        task = conv_vqgan.build(config(folder, image_size=32, adversarial=own, flip=False, laplace_weight=0.1))
        phase = next(task.step(batch(task), context()))
        logs = phase.logs
        weight = logs["adversarial_weight"] if is_adaptive else 0.3
        codes = 0.25 * logs["commitment"] + logs["codebook"]
        total = logs["l1"] + logs["l2"] + 0.1 * logs["laplace"] + weight * logs["adversarial"] + codes
        assert_close(phase.loss, total, rtol=1e-5, atol=1e-6)
    fake = torch.tensor([[1.0, 3.0], [-2.0, 0.0]])
    assert_close(GAN_FORMS["non_saturating"][0](fake), torch.nn.functional.softplus(-torch.tensor([2.0, -1.0])).mean())


def test_a_stage_that_has_not_begun_is_not_there(folder: Path) -> None:
    task = conv_vqgan.build(config(folder, adversarial=AdversarialConfig("style", width=4, start=3)))
    assert len(list(task.step(batch(task), context(2)))) == 1 and len(list(task.step(batch(task), context(3)))) == 2


def test_a_run_with_a_discriminator_resumes_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    exports = []
    for name, stops in (("whole", [None]), ("parts", [2, None])):
        train = TrainConfig(str(tmp_path / name), steps=4, batch_size=4, checkpoint_every=2, schedule="floored_cosine", warmup=1)
        for until in stops:
            Trainer(conv_vqgan.build(config(folder, adversarial=STYLE)), train).run(until=until)
        exports.append(load_tokenizer(str(tmp_path / name / "export" / "vqvae")))
    assert isinstance(exports[0], ConvVQModel)
    assert_close(exports[0].state_dict(), exports[1].state_dict(), rtol=0, atol=0)


def test_lpips_comes_from_the_users_file(folder: Path, tmp_path: Path) -> None:
    trunk, _ = TRUNKS["vgg"][0]()
    ends, state = (4, 9, 16, 23, 30), {}
    for key, value in trunk.state_dict().items():
        piece = next(i for i, end in enumerate(ends, 1) if int(key.split(".")[0]) < end)
        state[f"loss.perceptual_loss.net.slice{piece}.{key}"] = 0.1 * value
    state |= {f"loss.perceptual_loss.lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(TRUNKS["vgg"][1])}
    save_file(state, tmp_path / "official.safetensors")
    options: dict[str, Any] = {"perceptual_network": "lpips-vgg", "perceptual_weight": 1.0}
    task = conv_vqgan.build(config(folder, image_size=32, lpips_weights=str(tmp_path / "official.safetensors"), **options))
    assert float(next(task.step(batch(task), context())).logs["perceptual"]) > 0
    with pytest.raises(ValueError, match="lpips_weights belong to"):
        config(folder, **options)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="Did you mean 'hinge'"):
        AdversarialConfig(form="hing")
    with pytest.raises(ValueError, match="r1_every"):
        AdversarialConfig(r1_every=0)
    assert [round(floored_cosine(s, 2, 6, 0.3), 3) for s in range(8)] == [0, 0.5, 1, 0.854, 0.5, 0.3, 0.3, 0.3]
    assert floored_cosine(9, 2, None, 0.3) == 1 and len(list(LeCam().parameters())) == 0


CODE_TASKS: dict[str, Any] = {
    "nat": (nat, {"model": nat.ModelConfig(hidden_size=16, num_heads=2, depth=2)}),
    "nat-stack": (nat, {"model": nat.ModelConfig(hidden_size=16, num_heads=2, depth=2, stack="(shsa + conv + mlp) * 3")}),
    "nat-nested": (
        nat,
        {
            "model": nat.ModelConfig(hidden_size=16, num_heads=2, depth=2, stack="(attention + mlp(nested=(0.5, 1))) * 3"),
            "widths": (0.5, 1.0),
        },
    ),
    "nat-text": (nat, {"model": nat.ModelConfig(hidden_size=16, num_heads=2, depth=2, dropout=0.0)}),
    "vim": (vim, {"model": vim.ModelConfig(hidden_size=16, num_heads=2, depth=1)}),
    "vim-plain": (vim, {"model": vim.ModelConfig(hidden_size=16, num_heads=2, depth=1, dropout=0.0), "is_conditional": False}),
}


@pytest.mark.parametrize("name", CODE_TASKS)
def test_generators_on_codes_train_resume_and_export(name: str, folder: Path, tmp_path: Path) -> None:
    module, options = CODE_TASKS[name]
    names = {"text_encoder": str(folder / "text_encoder"), "tokenizer": str(folder / "tokenizer")} if name == "nat-text" else {}

    def fresh() -> Any:
        paths = {"vqvae": str(folder / "vqvae"), "data": str(folder / "train.parquet"), "cache": str(tmp_path / "codes")}
        return module.build(module.Config(**paths, image_size=8, prompts_per_picture=2, optimizer="muon", **names, **options))

    made = []
    for out, stops in (("whole", [None]), ("parts", [2, None])):
        train = TrainConfig(str(tmp_path / out), steps=4, batch_size=4, checkpoint_every=2, sample_every=4)
        for until in stops:
            result = Trainer(fresh(), train).run(until=until)
        pipe: Any = GenPipeline.from_pretrained(tmp_path / out / "export")
        pipe.set_progress_bar_config(disable=True)
        prompt = {"vim-plain": None, "nat-text": "a table"}.get(name, 0)
        made.append(pipe(prompt, generator=[1]).tokens)
    assert torch.equal(*made) and result.losses["main"] > 0
    task = fresh()
    task.dataset()
    assert task.generate([0, 1], StepContext(0, 0, torch.device("cpu"), {"transformer": task.modules["transformer"].eval()})).shape[0] == 2


def test_masks_of_nat_are_the_samples_own(folder: Path, tmp_path: Path) -> None:
    paths: dict[str, Any] = {"vqvae": str(folder / "vqvae"), "data": str(folder / "train.parquet"), "cache": str(tmp_path / "codes")}
    task = nat.build(nat.Config(**paths, image_size=8, model=nat.ModelConfig(hidden_size=16, num_heads=2, depth=2), mask_beta=(1.0, 1.0)))
    seen: list[torch.Tensor] = []
    task.modules["transformer"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    data = task.dataset()
    rows = [data[i] for i in range(8)]
    phase = next(task.step({key: torch.stack([row[key] for row in rows]) for key in ("indices", "index")}, context()))
    counts = (seen[0] == 32).sum(1)
    assert len(set(counts.tolist())) > 1 and int(counts.min()) >= 1
    assert float(phase.logs["masked"]) == pytest.approx(float(counts.float().mean()) / 16)
    with pytest.raises(ValueError, match="label_smoothing"):
        nat.Config("x", label_smoothing=1.0)
    with pytest.raises(ValueError, match="vim learns from class labels"):
        vim.Config("x", text_encoder="a", tokenizer="b")
