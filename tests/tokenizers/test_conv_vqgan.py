"""Laws of the convolutional tokenizers on tiny real configs, and their official layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from genkit import convert
from genkit.convert import maskgit_vqgan, simvq
from genkit.pipelines.tokenizers import load_tokenizer
from genkit.tokenizers.conv_vqgan import SIZES, ConvVQModel

VARIANTS: dict[str, dict[str, Any]] = {
    "simvq": {"quantizer_config": {"name": "simvq", "codebook_size": 50, "dim": 6}},
    "maskgit": {
        "quantizer_config": {"name": "vq", "codebook_size": 50, "dim": 6, "beta_on": "codebook"}, "resampling": "average",
        "shortcut": "branch", "official_range": True,
    },
}  # fmt: skip


def tiny(variant: str = "simvq", **options: Any) -> ConvVQModel:
    torch.manual_seed(0)
    return ConvVQModel(**{"channels": 32, "multipliers": [1, 1, 2], "num_res_blocks": 1, "num_mid_blocks": 1} | VARIANTS[variant] | options)


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> ConvVQModel:
    return tiny(request.param).eval()


def picture(b: int = 2, h: int = 8, w: int = 12) -> torch.Tensor:
    return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_pictures_of_any_size_become_codes_and_pictures(model: ConvVQModel) -> None:
    for h, w in ((4, 4), (8, 20)):
        out = model(picture(3, h, w))
        assert out.sample.shape == (3, 3, h, w) and out.indices.shape == (3, h // 4, w // 4)
    out = model(picture())
    assert_close(model.decode(out.indices).sample, out.sample, rtol=1e-4, atol=1e-4)
    alone = model(picture()[1:])
    assert_close(alone.sample, out.sample[1:], rtol=1e-4, atol=1e-4)


def test_gradient_reaches_every_trained_parameter_and_checkpointing_changes_none(model: ConvVQModel) -> None:
    gradients = []
    for checkpointing in (False, True):
        model.train().zero_grad()
        model.gradient_checkpointing = checkpointing
        out = model(picture())
        (out.sample.square().mean() + out.loss).backward()
        for name, p in model.named_parameters():
            assert (p.grad is not None and float(p.grad.abs().sum()) > 0) == p.requires_grad, name
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_the_released_shortcut_drops_the_input_where_the_width_changes() -> None:
    model = tiny("maskgit")
    block: Any = model.encoder.levels[2].blocks[0]  # type: ignore[index]
    x = torch.randn(1, 32, 4, 4)
    for weight in (block.conv2.weight,):
        torch.nn.init.zeros_(weight)
    assert float(block(x).detach().abs().max()) == 0
    plain: Any = tiny().encoder.levels[2].blocks[0]  # type: ignore[index]
    torch.nn.init.zeros_(plain.conv2.weight)
    assert_close(plain(x), plain.shortcut(x))


def test_saving_bf16_and_graphs(model: ConvVQModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert torch.equal(loaded(picture()).sample, model(picture()).sample)
    half = ConvVQModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    out = half(picture().bfloat16())
    assert out.sample.dtype == torch.bfloat16 and out.sample.isfinite().all()
    assert half.quantizer.embedding.weight.dtype == torch.float32
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(picture()).sample, model(picture()).sample, rtol=1e-5, atol=1e-5)


def test_official_sizes_have_the_published_parameter_counts() -> None:
    with torch.device("meta"):
        small = ConvVQModel(quantizer_config={"name": "simvq", "codebook_size": 1024, "dim": 128}, **SIZES["simvq"])
        maskgit = ConvVQModel(quantizer_config={"name": "vq", "codebook_size": 1024, "dim": 256}, **SIZES["maskgit"])
    count = [sum(p.numel() for p in part.parameters()) for part in (small.encoder, small.decoder, maskgit)]
    assert count == [24_282_496, 39_851_907, 54_515_587]
    assert simvq.OFFICIAL[0].parameters == sum(p.numel() for p in small.parameters())


def test_simvq_files_go_there_and_back_and_averages_win(tmp_path: Path) -> None:
    model = tiny().eval()
    official = simvq.to_official(model)
    names = [key for key in official if not key.startswith("quantize.embedding.")]
    averages = {"model_ema." + key.replace(".", ""): official[key] + 1 for key in names}
    extra = {"model_ema.decay": torch.tensor(0.999), "loss.discriminator.main.0.weight": torch.zeros(1)}
    path = tmp_path / "simvq.safetensors"
    save_file({**official, **averages, **extra}, path)
    assert convert.recognise(path) == ("simvq", path)
    averaged: Any = convert.load("simvq", path)
    assert_close(averaged.encoder.conv_out.bias, model.encoder.conv_out.bias + 1)
    assert torch.equal(averaged.quantizer.embedding.weight, model.quantizer.embedding.weight)
    raw: Any = convert.load("simvq", path, use_ema=False)
    assert all(torch.equal(a, b) for a, b in zip(raw.state_dict().values(), model.state_dict().values(), strict=True))
    back = simvq.to_official(raw)
    assert back.keys() == official.keys() and all(torch.equal(back[key], official[key]) for key in back)
    broken = {**official, **dict(list(averages.items())[1:])}
    with pytest.raises(ValueError, match="running averages of 1 weights are missing"):
        simvq.from_official(broken)


def test_channels_of_the_upsampler_come_block_by_block() -> None:
    blocks = torch.arange(8.0)  # d = 2: channels c, pixels s at s * d + c
    assert simvq.by_pixel(blocks).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert torch.equal(simvq.by_block(simvq.by_pixel(blocks)), blocks)


def test_both_layouts_of_maskgit_are_read() -> None:
    model = tiny("maskgit", num_mid_blocks=2).eval()
    port = maskgit_vqgan.to_official(model)
    muse = {}
    for key, value in port.items():
        name = key.replace("upsample.conv", "upsample_conv")
        for n in (1, 2):
            name = name.replace(f"mid.block_{n}", f"mid.{n - 1}")
        muse[name] = value
    assert muse.keys() != port.keys()
    for state in (port, muse):
        assert maskgit_vqgan.recognise({key: tuple(value.shape) for key, value in state.items()})
        found, _ = maskgit_vqgan.from_official(state)
        assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), model.state_dict().values(), strict=True))
        assert found.config["shortcut"] == "branch" and found.config["official_range"]
    assert not maskgit_vqgan.recognise({**dict.fromkeys(port, (1,)), "encoder.mid.attn_1.q.weight": (1,)})


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        tiny(channels=20)
    with pytest.raises(ValueError, match="Did you mean 'average'"):
        tiny(resampling="averaged")
    with pytest.raises(ValueError, match=r"multiples of the patch 4x4.*10x8"):
        tiny().encode(torch.zeros(1, 3, 10, 8))
    with pytest.raises(ValueError, match="one code per token"):
        tiny(quantizer_config={"name": "vq", "codebook_size": 4, "dim": 2, "num_levels": 2})
    with pytest.raises(ValueError, match="neither layout"):
        maskgit_vqgan.from_official({"a": torch.zeros(1)})
