"""Laws of the ViT-VQGAN tokenizer on tiny real configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from genkit.tokenizers.vit_vqgan import SIZES, ViTVQModel

TOWER: dict[str, Any] = {"dim": 16, "depth": 2, "heads": 2, "mlp_dim": 24, "dim_head": 8}


def tiny(quantizer: str = "simvq", **options: Any) -> ViTVQModel:
    torch.manual_seed(0)
    decoder = {**TOWER, "dim": 32, "heads": 1, "dim_head": 32}
    return ViTVQModel(
        **{
            "patch_size": 4,
            "encoder_config": TOWER,
            "decoder_config": decoder,
            "quantizer_config": {"name": quantizer, "codebook_size": 50, "dim": 6},
        }
        | options
    )


@pytest.fixture(params=["patch", "conv"])
def model(request: pytest.FixtureRequest) -> ViTVQModel:
    return tiny(stem=request.param).eval()


def test_any_size_that_the_patch_divides(model: ViTVQModel) -> None:
    for h, w in ((4, 4), (8, 20), (12, 8)):
        x = torch.rand(3, 3, h, w) * 2 - 1
        out = model(x)
        assert out.sample.shape == x.shape and out.indices.shape == (3, h // 4, w // 4) and out.indices.dtype == torch.int64


def test_decoding_the_codes_gives_the_reconstruction(model: ViTVQModel) -> None:
    x = torch.rand(2, 3, 8, 12) * 2 - 1
    out = model(x)
    assert_close(model.decode(out.indices).sample, out.sample, rtol=1e-5, atol=1e-5)
    assert_close(model.decode(out.indices.flatten(1), grid=(2, 3)).sample, model.decode(out.indices).sample, rtol=0, atol=0)


def test_without_quantization_the_decoder_sees_the_latents(model: ViTVQModel) -> None:
    x = torch.rand(2, 3, 8, 12) * 2 - 1
    out = model(x, quantize=False)
    assert_close(out.latents, model(x).latents, rtol=0, atol=0)
    assert_close(out.sample, model.decode_latents(out.latents, (2, 3)), rtol=0, atol=0)
    assert out.indices is None and (out.sample - model(x).sample).abs().max() > 1e-3


def test_results_do_not_depend_on_the_batch(model: ViTVQModel) -> None:
    x = torch.rand(3, 3, 8, 8) * 2 - 1
    whole, alone = model(x), model(x[1:2])
    assert_close(whole.sample[1:2], alone.sample, rtol=1e-5, atol=1e-5)
    assert torch.equal(whole.indices[1:2], alone.indices)


def test_rows_and_columns_are_told_apart() -> None:
    model = tiny().eval()
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    turned = model.encode(x.transpose(-1, -2)).latents.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    assert (turned - model.encode(x).latents).abs().max() > 1e-3


def test_official_range_maps_both_ends() -> None:
    plain, official = tiny(), tiny(official_range=True)
    official.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    assert_close(official(x).sample, plain((x + 1) / 2).sample * 2 - 1, rtol=1e-6, atol=1e-6)


def test_gradient_reaches_every_trained_parameter_and_no_frozen_one(model: ViTVQModel) -> None:
    out = model.train()(torch.rand(2, 3, 8, 8) * 2 - 1)
    (out.sample.square().mean() + out.loss).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, name


def test_checkpointing_changes_no_gradient(model: ViTVQModel) -> None:
    x, gradients = torch.rand(2, 3, 8, 8) * 2 - 1, []
    for checkpointing in (False, True):
        model.train().zero_grad()
        model.gradient_checkpointing = checkpointing
        model(x).sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize("quantizer", ["simvq", "l2_vq", "vq"])
def test_save_and_load_keep_everything(quantizer: str, tmp_path: Path) -> None:
    model = tiny(quantizer).eval()
    model.save_pretrained(tmp_path)
    loaded = ViTVQModel.from_pretrained(tmp_path)
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    assert dict(loaded.config)["quantizer_config"]["name"] == quantizer
    assert_close(loaded(x).sample, model(x).sample, rtol=0, atol=0)


def test_half_precision_keeps_the_codebook_in_fp32(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    model = ViTVQModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert model.quantizer.embedding.weight.dtype == torch.float32 and model.pre_quant.weight.dtype == torch.bfloat16
    out = model((torch.rand(1, 3, 8, 8) * 2 - 1).bfloat16())
    assert out.sample.dtype == torch.bfloat16 and out.sample.isfinite().all()
    assert model.decode(out.indices).sample.dtype == torch.bfloat16


def test_compiles_as_one_graph(model: ViTVQModel) -> None:
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(x).sample, model(x).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "parameters"), [("small", 51_956_771), ("base", 172_237_347), ("large", 615_322_915)])
def test_official_sizes_have_the_published_parameter_counts(size: str, parameters: int) -> None:
    with torch.device("meta"):
        model = ViTVQModel(8, **SIZES[size], quantizer_config={"name": "l2_vq", "codebook_size": 8192, "dim": 32})
    tables = 1024 * (model.encoder.dim + model.decoder.dim)  # the official files store the two closed-form tables
    assert sum(p.numel() for p in model.parameters()) + tables == parameters


def test_bad_input_is_refused_with_what_is_accepted() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="multiples of the patch 4x4.*10x8"):
        model.encode(torch.zeros(1, 3, 10, 8))
    with pytest.raises(ValueError, match=r"c=3.*\[1, 1, 8, 8\]"):
        model.encode(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="grid"):
        model.decode(torch.zeros(1, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"0 \.\. 49.*50"):
        model.decode(torch.full((1, 2, 2), 50))
    with pytest.raises(ValueError, match="Did you mean 'mlp_dim'"):
        tiny(encoder_config={**TOWER, "mlp_dims": 3})
    with pytest.raises(ValueError, match="multiple of 4"):
        tiny(encoder_config={**TOWER, "dim": 18})
    with pytest.raises(ValueError, match="power of two"):
        tiny(stem="conv", patch_size=6)


def test_without_encoder_blocks_codes_are_local() -> None:
    model = tiny(stem="conv", encoder_config={**TOWER, "depth": 0}).eval()
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    moved = x.roll((8, 4), dims=(2, 3))
    codes, other = model.encode(x).indices, model.encode(moved).indices
    assert torch.equal(codes[:, 1:-3, 1:-2], other[:, 3:-1, 2:-1])  # wherever the edge is out of sight
    changed = x.clone()
    changed[..., :4, :4] = 1
    assert torch.equal(model.encode(changed).indices[:, 2:, 2:], codes[:, 2:, 2:])
    assert tuple(model(x).sample.shape) == (1, 3, 32, 32)


def test_towers_of_other_blocks() -> None:
    depth = TOWER["depth"]
    tower = {**TOWER, "stack": f"(window(2) + conv + mlp) * {depth}"}
    model, pixels = tiny(encoder_config=tower).eval(), torch.rand(2, 3, 8, 12) * 2 - 1
    plain = tiny().eval()
    assert model.encode(pixels).indices.shape == plain.encode(pixels).indices.shape
    assert not any("filters" in key for key in plain.state_dict()) and any("filters" in key for key in model.state_dict())
    with pytest.raises(ValueError, match=f"depth={depth}, got {depth + 1} blocks"):
        tiny(encoder_config={**TOWER, "stack": f"mlp * {depth + 1}"})
