"""Quantizers beside the learned table: running means, finite scalars, signs, Gumbel mixtures; SimVQ's other forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from genkit.tokenizers.quantizers import FSQ, LFQ, QUANTIZERS, EMAVectorQuantizer, GumbelQuantizer, SimVQ, build_quantizer
from genkit.tokenizers.quantizers.base import VectorQuantizerBase

CONFIGS: dict[str, dict[str, Any]] = {
    "ema_vq": {"codebook_size": 20, "dim": 4}, "gumbel": {"codebook_size": 20, "dim": 4}, "fsq": {"levels": [5, 4, 3]}, "lfq": {"dim": 5},
    "vq": {"codebook_size": 20, "dim": 4}, "l2_vq": {"codebook_size": 20, "dim": 4}, "simvq": {"codebook_size": 20, "dim": 4},
}  # fmt: skip


@pytest.fixture(params=sorted(QUANTIZERS))
def quantizer(request: pytest.FixtureRequest) -> VectorQuantizerBase:
    torch.manual_seed(0)
    return build_quantizer({"name": request.param, **CONFIGS[request.param]}).eval()


def test_every_quantizer_keeps_the_common_contract(quantizer: VectorQuantizerBase) -> None:
    z = torch.randn(2, 3, quantizer.dim, requires_grad=True)
    out = quantizer(z)
    assert out.quantized.shape == z.shape and out.indices.shape == (2, 3) and out.indices.dtype == torch.int64 and out.loss.ndim == 0
    assert int(out.indices.min()) >= 0 and int(out.indices.max()) < quantizer.codebook_size
    assert_close(quantizer.lookup(out.indices), out.quantized, atol=1e-5, rtol=1e-4)
    (out.quantized.sum() + out.loss).backward()
    assert z.grad is not None and z.grad.isfinite().all() and z.grad.abs().sum() > 0
    index = torch.arange(quantizer.codebook_size)
    if not isinstance(quantizer, FSQ):  # squeezes its latents first
        assert torch.equal(quantizer(quantizer.lookup(index)).indices, index)
    half = quantizer(z.detach().bfloat16())
    assert half.quantized.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=f"d={quantizer.dim}"):
        quantizer(torch.zeros(2, quantizer.dim + 1))
    again = build_quantizer({"name": _name(quantizer), **CONFIGS[_name(quantizer)]})
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again.eval()(z).indices, out.indices)


def _name(quantizer: VectorQuantizerBase) -> str:
    names = {EMAVectorQuantizer: "ema_vq", GumbelQuantizer: "gumbel", FSQ: "fsq", LFQ: "lfq", SimVQ: "simvq"}
    return names.get(type(quantizer)) or ("l2_vq" if getattr(quantizer, "normalize", False) else "vq")


def test_codes_follow_the_latents_and_dead_ones_come_back() -> None:
    torch.manual_seed(0)
    middles = torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, 0.0], [0.0, -4.0]])
    plain, revived = (EMAVectorQuantizer(16, 2, decay=0.8, revive_below=r).train() for r in (0.0, 0.5))
    for _ in range(60):
        latents = middles[torch.randint(4, (200,))] + 0.1 * torch.randn(200, 2)
        plain(latents)
        revived(latents)
    for model in (plain, revived):
        assert torch.cdist(middles, model.codebook()).min(1).values.max() < 0.2
    used = [(model.counts > 0.5).sum() for model in (plain, revived)]
    assert used[1] == 16 > used[0]
    before = plain.embedding.clone()
    plain.eval()(middles)
    assert torch.equal(plain.embedding, before), "evaluation moves nothing"
    with pytest.raises(ValueError, match="decay"):
        EMAVectorQuantizer(4, 2, decay=1.0)


def test_running_means_have_no_parameters_and_only_the_commitment() -> None:
    model = EMAVectorQuantizer(8, 3).train()
    z = torch.randn(10, 3, requires_grad=True)
    out = model(z)
    assert not list(model.parameters()) and {"embedding", "counts", "sums"} == set(model.state_dict())
    assert_close(out.loss, 0.25 * out.terms["commitment"])


def test_finite_scalars_fill_their_grid() -> None:
    fsq = FSQ([5, 4, 3])
    assert fsq.codebook_size == 60 and fsq.dim == 3
    codes = fsq.codebook()
    assert len(codes.unique(dim=0)) == 60 and codes.abs().max() <= 1
    assert_close(fsq.lookup(torch.tensor([1]))[0] - fsq.lookup(torch.tensor([0]))[0], torch.tensor([0.5, 0.0, 0.0]))
    spread = fsq(torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0))).indices
    assert len(spread.unique()) == 60
    with pytest.raises(ValueError, match="at least 2 levels"):
        FSQ([3, 1])
    with pytest.raises(ValueError, match="quantize_after"):
        fsq.set_codes(codes)


def test_entropies_of_signs() -> None:
    lfq = LFQ(4, inverse_temperature=50.0)
    certain = torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1]])
    entropy, diversity = lfq.entropies(certain)
    assert float(entropy) == pytest.approx(0, abs=1e-3) and float(diversity) == pytest.approx(math.log(2), abs=1e-3)
    entropy, diversity = lfq.entropies(torch.zeros(3, 4))
    assert float(entropy) == float(diversity) == pytest.approx(4 * math.log(2), rel=1e-4)
    latents = torch.randn(50, 4) * 0.01
    grouped = LFQ(4, inverse_temperature=50.0, group_bits=2)
    assert_close(grouped.entropies(latents)[0], lfq.entropies(latents)[0], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="group_bits"):
        LFQ(20)
    with pytest.raises(ValueError, match="group_bits"):
        LFQ(4, group_bits=3)


def test_mixtures_sharpen_and_evaluation_is_certain() -> None:
    torch.manual_seed(0)
    model, z = GumbelQuantizer(12, 4).train(), torch.randn(30, 4)
    noise = -torch.log(-torch.log(torch.rand(30, 12)))
    soft, sharp = (model(z, noise, tau).quantized for tau in (5.0, 0.01))
    assert (sharp.norm(dim=-1) - 1).abs().max() < 0.05 < (soft.norm(dim=-1) - 1).abs().min()
    model.eval()
    assert torch.equal(model(z).indices, model(z).indices)
    with pytest.raises(ValueError, match="temperature"):
        GumbelQuantizer(4, 2, temperature=0)


@pytest.mark.parametrize("options", [{"frozen_dim": 9}, {"hidden": 7}, {"bias": False}, {"frozen_dim": 3, "hidden": 5, "bias": False}])
def test_other_forms_of_simvq_learn_and_keep_their_projection(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    simvq, z = SimVQ(30, 4, **options), torch.randn(12, 4)
    simvq(z).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in simvq.embedding_proj.parameters())
    simvq.eval()
    simvq(z)
    with torch.no_grad():
        for p in simvq.embedding_proj.parameters():
            p.add_(torch.randn_like(p))
    assert torch.equal(simvq(z).indices, torch.cdist(z, simvq.codebook()).argmin(1)), "a change is noticed"
    if options != {"bias": False}:
        with pytest.raises(ValueError, match="codes can be written"):
            simvq.set_codes(torch.zeros(30, 4))


def test_options_are_those_of_the_name() -> None:
    with pytest.raises(ValueError, match="needs.*levels"):
        build_quantizer({"name": "fsq"})
    with pytest.raises(ValueError, match="unknown option of quantizer 'lfq'"):
        build_quantizer({"name": "lfq", "dim": 4, "codebook_size": 16})
    for name in ("fsq", "lfq"):
        quantizer = build_quantizer({"name": name, **CONFIGS[name]})
        with pytest.raises(ValueError, match="draws no codes"):
            quantizer(torch.zeros(2, quantizer.dim), torch.zeros(2, quantizer.codebook_size))
