"""The key table of ENAT, both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from genkit import convert
from genkit.convert import enat
from genkit.generators.enat import ENATTransformer2DModel

SIZES = {"sample_size": 4, "hidden_size": 16, "num_heads": 2, "num_encoder_layers": 2, "num_decoder_layers": 2}
BLOCK = {
    "adaLN_modulation.1.weight": (128, 16), "adaLN_modulation.1.bias": (128,),
    "attn.q.weight": (16, 16), "attn.q.bias": (16,), "attn.kv.A.weight": (32, 16), "attn.kv.A.bias": (32,),
    "attn.kv.B.weight": (32, 16), "attn.kv.B.bias": (32,), "attn.proj.weight": (16, 16), "attn.proj.bias": (16,),
    "mlp.fc1.weight": (32, 16), "mlp.fc1.bias": (32,), "mlp.fc2.weight": (16, 32), "mlp.fc2.bias": (16,),
}  # fmt: skip
MLP = {"fc1.weight": (64, 16), "fc1.bias": (64,), "fc2.weight": (16, 64), "fc2.bias": (16,)}  # four times the width, whatever mlp_ratio is
SHAPES = {
    "x_embedder.word_embeddings.weight": (9, 16), "x_embedder.position_embeddings.weight": (16, 16),
    "x_embedder.LayerNorm.weight": (16,), "x_embedder.LayerNorm.bias": (16,), "y_embedder.embedding_table.weight": (6, 16),
    "prev_proj.norm.weight": (16,), "prev_proj.norm.bias": (16,), "norm.weight": (16,), "norm.bias": (16,),
    "mlm_layer.bias": (1, 1, 9), "mlm_layer.fc.weight": (16, 16), "mlm_layer.fc.bias": (16,),
    "mlm_layer.ln.weight": (16,), "mlm_layer.ln.bias": (16,),
    **{f"prev_embedder.{k}": v for k, v in MLP.items()}, **{f"prev_proj.mlp.{k}": v for k, v in MLP.items()},
    **{f"blocks.{i}.{k}": v for i in range(4) for k, v in BLOCK.items()},
}  # fmt: skip


@pytest.fixture
def official() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}


def test_way_there_and_back_gives_the_same_file(official: dict[str, Tensor]) -> None:
    model, report = enat.from_official(official, num_heads=2)
    back = enat.to_official(model)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[key], official[key]) for key in official)
    assert set(report.dropped) == {key for key in official if key.startswith("prev_embedder.")}


def test_sizes_are_read_from_the_shapes(official: dict[str, Tensor]) -> None:
    config = enat.from_official(official, num_heads=2, num_decoder_layers=1)[0].config
    expected = SIZES | {"num_encoder_layers": 3, "num_decoder_layers": 1, "codebook_size": 8, "num_classes": 5, "mlp_ratio": 2.0}
    assert {key: config[key] for key in expected} == expected
    wide = official | {"x_embedder.position_embeddings.weight": torch.zeros(10, 16)}
    assert enat.from_official(wide, num_heads=2, sample_size=[2, 5])[0].grid == (2, 5)


def test_a_model_of_ours_has_all_official_keys() -> None:
    model = ENATTransformer2DModel(**SIZES, codebook_size=8, num_classes=5, mlp_ratio=2.0)
    assert {key: tuple(value.shape) for key, value in enat.to_official(model).items()} == SHAPES
    with torch.device("meta"):
        large = ENATTransformer2DModel(sample_size=16, hidden_size=1024, num_heads=16, num_encoder_layers=22, num_decoder_layers=2)
    assert len(enat.to_official(large)) == 358


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_prefixed_files_load_by_system_name_and_are_recognised(official: dict[str, Tensor], suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"nnet_ema{suffix}"
    state = {f"module.{key}": value for key, value in official.items()} | {"module.x_embedder.position_ids": torch.arange(16)[None]}
    if suffix == ".pth":
        torch.save(state, file)
    else:
        save_file(state, file)
    model = convert.load("enat", file, num_heads=2)
    assert torch.equal(model.embedding.word.weight, official["x_embedder.word_embeddings.weight"])  # type: ignore[union-attr, arg-type]
    assert convert.recognise(tmp_path) == ("enat", file)


def test_misfitting_files_are_refused_by_key(official: dict[str, Tensor]) -> None:
    without = {key: value for key, value in official.items() if key != "blocks.1.attn.q.bias"}
    with pytest.raises(ValueError, match=r"1 missing: blocks\.1\.attn\.q\.bias"):
        enat.from_official(without, num_heads=2)
    with pytest.raises(ValueError, match="1 unexpected: stranger"):
        enat.from_official(official | {"stranger": torch.zeros(1)}, num_heads=2)
    with pytest.raises(ValueError, match=r"mlm_layer\.fc\.weight expected \[16, 16\], found \[16, 15\]"):
        enat.from_official(official | {"mlm_layer.fc.weight": torch.zeros(16, 15)}, num_heads=2)
    with pytest.raises(ValueError, match="not an ENAT checkpoint"):
        enat.from_official({"norm.weight": torch.zeros(4)})


def test_options_that_do_not_fit_are_refused(official: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="give num_heads"):
        enat.from_official(official)
    with pytest.raises(ValueError, match=r"1 \.\. 4"):
        enat.from_official(official, num_heads=2, num_decoder_layers=5)
    with pytest.raises(ValueError, match="16 rows"):
        enat.from_official(official, num_heads=2, sample_size=[3, 5])


def test_models_without_official_layout_are_refused() -> None:
    model = ENATTransformer2DModel(**SIZES, codebook_size=8, num_classes=5, shared_modulation=True)
    with pytest.raises(ValueError, match="no official name"):
        enat.to_official(model)
