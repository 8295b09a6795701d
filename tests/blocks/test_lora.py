"""Laws of LoRA: nothing at the start, merging, files, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from genkit.blocks import stack
from genkit.blocks.lora import LoRA, LoRAWeights, add_lora, merged


def blocks() -> Any:
    torch.manual_seed(0)
    return stack.build("(attention(heads=2) + mlp(ratio=2)) * 2", 8)


def run(model: Any, x: torch.Tensor) -> torch.Tensor:
    for block in model:
        x = block(x)
    return x


def changed(model: Any, rank: int = 2, alpha: float | None = None) -> Any:
    add_lora(model, rank, alpha)
    for part in model.modules():
        if isinstance(part, LoRA):
            nn.init.normal_(part.lora_B.weight)
    return model


def test_it_changes_nothing_at_the_start_and_trains_alone() -> None:
    plain, model, x = blocks(), blocks(), torch.randn(3, 5, 8)
    trained = add_lora(model, 2)
    assert torch.equal(run(model, x), run(plain, x))
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained} and len(trained) == 2 * 2 * 3
    run(model, x).sum().backward()
    assert all(p.grad is not None for p in trained) and all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_merged_is_the_same_network_of_plain_layers() -> None:
    model, x = changed(blocks(), alpha=6.0), torch.randn(3, 5, 8)
    plain = merged(model)
    assert plain.state_dict().keys() == blocks().state_dict().keys() and any(isinstance(part, LoRA) for part in model.modules())
    assert_close(run(plain, x), run(model, x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(run(plain, x), run(blocks(), x), atol=1e-2)
    layer = model[0].branches[0].f.q
    assert_close(layer.weight, plain[0].branches[0].f.q.weight)


def test_files_are_peft_s_and_are_applied_in_part_or_undone(tmp_path: Path) -> None:
    model, x = changed(blocks(), alpha=6.0), torch.randn(3, 5, 8)
    LoRAWeights.of(model, "genkit/base").save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 6.0, "genkit/base")
    stored, plain = LoRAWeights.load(tmp_path), blocks()
    stored.apply(plain)
    assert_close(run(plain, x), run(model, x), rtol=1e-4, atol=1e-5)
    stored.apply(plain, -1.0)
    assert_close(run(plain, x), run(blocks(), x), rtol=1e-3, atol=1e-4)


def test_peft_opens_them(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, x = changed(blocks(), alpha=6.0), torch.randn(3, 5, 8)
    LoRAWeights.of(model).save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(Whole(blocks()), tmp_path)
    assert_close(theirs(x), run(model, x), rtol=1e-4, atol=1e-5)


class Whole(nn.Module):
    """Blocks as a model whose layers have the same names."""

    def __init__(self, inner: nn.ModuleList) -> None:
        super().__init__()
        for i, block in enumerate(inner):
            self.add_module(str(i), block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.children():
            x = block(x)
        return x


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no linear maps named .*it has .*fc1"):
        add_lora(blocks(), 2, targets=("query",))
    with pytest.raises(ValueError, match="rank must lie in 1 .. 8"):
        add_lora(blocks(), 9)
    model = changed(blocks())
    with pytest.raises(ValueError, match="has LoRA already"):
        add_lora(model, 2)
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors, adapter_config.json"):
        LoRAWeights.load(tmp_path)
    stored = LoRAWeights.of(model, "genkit/base")
    with pytest.raises(ValueError, match="layers that ModuleList lacks.*trained on genkit/base"):
        stored.apply(blocks()[:1])
    wide: Any = stack.build("(attention(heads=2) + mlp) * 2", 16)
    before = wide[0].branches[0].f.q.weight.clone()
    with pytest.raises(ValueError, match=r"changes 0.branches.0.f.q \[8, 8\], the model's is \[16, 16\]"):
        stored.apply(wide)
    assert torch.equal(wide[0].branches[0].f.q.weight, before)
    with pytest.raises(ValueError, match="has no LoRA"):
        LoRAWeights.of(blocks())
    stored.save(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_rslora": True}))
    with pytest.raises(ValueError, match=r"another kind \(use_rslora\)"):
        LoRAWeights.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(ValueError, match="no plain LoRA"):
        LoRAWeights.load(tmp_path)
