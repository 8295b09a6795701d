"""Laws of the quantizers: exact search, SimVQ's gradients and cache, gradient estimators, codebook statistics."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from genkit.tokenizers.quantizers import SimVQ, VectorQuantizer, build_quantizer
from genkit.tokenizers.quantizers.base import VectorQuantizerBase
from genkit.tokenizers.quantizers.gradient import rotation_trick, straight_through
from genkit.tokenizers.quantizers.kmeans import kmeans
from genkit.tokenizers.quantizers.search import nearest_codes
from genkit.tokenizers.quantizers.stats import CodebookStats


def full_search(z: Tensor, codes: Tensor) -> Tensor:
    return (z.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * z @ codes.T).argmin(1)


@pytest.fixture(params=["l2_vq", "simvq", "vq"])
def quantizer(request: pytest.FixtureRequest) -> VectorQuantizerBase:
    torch.manual_seed(0)
    return build_quantizer({"name": request.param, "codebook_size": 37, "dim": 6})


@pytest.mark.parametrize(("token_block", "code_block"), [(1, 1), (7, 5), (64, 1000), (1000, 64), (50, 211)])
def test_chunked_search_equals_full_search(token_block: int, code_block: int) -> None:
    generator = torch.Generator().manual_seed(1)
    z, codes = torch.randn(50, 8, generator=generator), torch.randn(211, 8, generator=generator)
    assert torch.equal(nearest_codes(z, codes, token_block=token_block, code_block=code_block), full_search(z, codes))


def test_lowest_index_wins_among_equal_codes() -> None:
    codes = (4 * torch.eye(5) + torch.arange(5.0)).repeat(3, 1)  # whole numbers: no rounding to decide between copies
    for code_block in (2, 5, 7, 15):
        assert torch.equal(nearest_codes(codes, codes, code_block=code_block), torch.arange(5).repeat(3))


def test_search_is_fp32_under_autocast() -> None:
    generator = torch.Generator().manual_seed(4)
    z, codes = torch.randn(64, 16, generator=generator), torch.randn(500, 16, generator=generator)
    expected = full_search(z, codes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_codes(z, codes), expected)
        assert not torch.equal(full_search(z, codes), expected)  # bf16 does pick other codes here


def test_search_refuses_other_widths_and_empty_blocks() -> None:
    with pytest.raises(ValueError, match=r"d=4.*\[3, 5\]"):
        nearest_codes(torch.zeros(3, 5), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="at least 1"):
        nearest_codes(torch.zeros(3, 4), torch.zeros(2, 4), code_block=0)


def test_codes_are_their_own_nearest(quantizer: VectorQuantizerBase) -> None:
    index = torch.arange(37)
    assert torch.equal(quantizer(quantizer.lookup(index)).indices, index)
    assert_close(quantizer.codebook(), quantizer.lookup(index), rtol=0, atol=0)


def test_output_shapes_and_dtypes(quantizer: VectorQuantizerBase) -> None:
    z = torch.randn(2, 3, 5, 6, dtype=torch.bfloat16)
    out = quantizer(z)
    assert out.quantized.shape == z.shape and out.quantized.dtype == z.dtype
    assert out.indices.shape == (2, 3, 5) and out.indices.dtype == torch.int64 and out.loss.dtype == torch.float32


def test_straight_through_gradient_is_the_identity(quantizer: VectorQuantizerBase) -> None:
    z = torch.randn(4, 6, requires_grad=True)
    grad = torch.randn(4, 6)
    quantizer(z).quantized.backward(grad)
    assert_close(z.grad, grad, rtol=0, atol=0)


def test_loss_is_zero_on_codes(quantizer: VectorQuantizerBase) -> None:
    assert quantizer(quantizer.codebook().detach()).loss.item() == pytest.approx(0.0, abs=1e-12)


def test_beta_weighs_the_named_term() -> None:
    z = torch.randn(9, 6)
    for beta_on, other in (("commitment", "codebook"), ("codebook", "commitment")):
        torch.manual_seed(0)
        out = VectorQuantizer(11, 6, beta=0.1, beta_on=beta_on)(z)
        assert_close(out.loss, 0.1 * out.terms[beta_on] + out.terms[other], rtol=1e-6, atol=0)


def test_l2_codes_have_unit_norm_and_ignore_the_scale_of_latents() -> None:
    quantizer = build_quantizer({"name": "l2_vq", "codebook_size": 37, "dim": 6})
    z = torch.randn(20, 6)
    assert torch.equal(quantizer(z).indices, quantizer(7.5 * z).indices)
    assert_close(quantizer.codebook().norm(dim=-1), torch.ones(37), rtol=1e-6, atol=1e-6)


def test_simvq_gradient_equals_that_of_the_full_projection() -> None:
    torch.manual_seed(0)
    simvq, z, grad = SimVQ(40, 6), torch.randn(15, 6), torch.randn(15, 6)
    codes = torch.nn.functional.linear(simvq.embedding.weight, *simvq.embedding_proj.parameters())
    out = simvq(z)
    full = codes[full_search(z, codes)]
    expected = torch.autograd.grad((full * grad).sum(), list(simvq.embedding_proj.parameters()))
    got = torch.autograd.grad((simvq.lookup(out.indices) * grad).sum(), list(simvq.embedding_proj.parameters()))
    assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_one_simvq_step_moves_every_code_and_no_table_row() -> None:
    torch.manual_seed(0)
    simvq = SimVQ(40, 6)
    table, before = simvq.embedding.weight.clone(), simvq.codebook().detach()
    trained = [p for p in simvq.parameters() if p.requires_grad]
    assert len(trained) == 2
    optimizer = torch.optim.SGD(trained, lr=0.1)
    simvq(torch.randn(3, 6)).loss.backward()
    optimizer.step()
    assert torch.equal(simvq.embedding.weight, table)
    assert (simvq.codebook() - before).abs().amax(1).min() > 0


def test_simvq_projection_is_kept_in_evaluation_and_renewed_after_changes() -> None:
    simvq, z = SimVQ(40, 6).eval(), torch.randn(12, 6)
    simvq(z)
    kept = simvq._projected
    simvq(z)
    assert kept is not None and simvq._projected is kept
    with torch.no_grad():
        list(simvq.embedding_proj.parameters())[1].add_(torch.randn(6))
    assert torch.equal(simvq(z).indices, full_search(z, simvq.codebook()))
    other = SimVQ(40, 6)
    simvq.load_state_dict(other.state_dict())
    assert torch.equal(simvq(z).indices, full_search(z, other.codebook()))
    assert copy.deepcopy(simvq)._projected is None and simvq.train()._projected is None


def test_rotation_has_the_codes_value_and_a_scaled_orthogonal_gradient() -> None:
    torch.manual_seed(0)
    z, codes = torch.randn(10, 6, dtype=torch.float64, requires_grad=True), torch.randn(10, 6, dtype=torch.float64)
    out = rotation_trick(z, codes)
    assert_close(out.detach(), codes, rtol=1e-9, atol=1e-9)
    grad = torch.randn_like(codes)
    out.backward(grad)
    assert z.grad is not None
    ratio = codes.norm(dim=-1) / z.detach().norm(dim=-1)
    assert_close(z.grad.norm(dim=-1), ratio * grad.norm(dim=-1), rtol=1e-9, atol=1e-9)


def test_estimators_are_finite_for_zero_and_opposite_latents() -> None:
    codes = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    for estimate in (straight_through, rotation_trick):
        z = torch.tensor([[0.0, 0.0], [-1.0, 0.0]], requires_grad=True)
        estimate(z, codes).sum().backward()
        assert z.grad is not None and z.grad.isfinite().all()


def test_unknown_names_and_options_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'simvq'"):
        build_quantizer({"name": "simvg", "codebook_size": 4, "dim": 2})
    with pytest.raises(ValueError, match="Did you mean 'codebook_size'"):
        build_quantizer({"name": "vq", "codebook_sise": 4, "dim": 2})
    with pytest.raises(ValueError, match="needs.*dim"):
        build_quantizer({"name": "vq", "codebook_size": 4})
    with pytest.raises(ValueError, match=r"d=2.*\[3, 5\]"):
        build_quantizer({"name": "vq", "codebook_size": 4, "dim": 2})(torch.zeros(3, 5))


def test_statistics_of_known_histograms() -> None:
    uniform, constant = CodebookStats(8), CodebookStats(8)
    uniform.update(torch.arange(8).repeat(3))
    constant.update(torch.full((5, 2), 3))
    assert uniform.compute()["perplexity"] == pytest.approx(8.0) and uniform.compute()["utilisation"] == 1.0
    assert constant.compute()["perplexity"] == pytest.approx(1.0) and constant.compute()["dead"] == 7
    assert constant.dead_codes().tolist() == [0, 1, 2, 4, 5, 6, 7]


def test_merged_statistics_equal_those_of_all_data() -> None:
    indices = torch.randint(0, 30, (200,), generator=torch.Generator().manual_seed(3))
    whole, left, right = CodebookStats(30), CodebookStats(30), CodebookStats(30)
    whole.update(indices)
    left.update(indices[:71])
    right.update(indices[71:])
    left.merge(right)
    assert torch.equal(left.counts, whole.counts) and left.compute() == whole.compute()
    with pytest.raises(ValueError, match="outside the codebook"):
        left.update(torch.tensor([30]))
    with pytest.raises(ValueError, match="cannot merge"):
        left.merge(CodebookStats(31))


def test_kmeans_finds_separate_clusters() -> None:
    generator = torch.Generator().manual_seed(5)
    middles = 10 * torch.eye(4)
    points = (middles.repeat_interleave(30, 0) + 0.1 * torch.randn(120, 4, generator=generator))[torch.randperm(120, generator=generator)]
    centres = kmeans(points, 4, generator)
    assert_close(centres[torch.cdist(middles, centres).argmin(1)], middles, rtol=0, atol=0.1)
    with pytest.raises(ValueError, match="3 different ones of 9"):
        kmeans(torch.eye(3).repeat(3, 1), 4, generator)


def test_fitted_codes_use_the_whole_codebook(quantizer: VectorQuantizerBase) -> None:
    latents = torch.randn(500, 6, generator=torch.Generator().manual_seed(6)) * 0.05 + 3
    before = CodebookStats(37)
    before.update(quantizer(latents).indices)
    quantizer.fit(latents, torch.Generator().manual_seed(7))
    after = CodebookStats(37)
    after.update(quantizer(latents).indices)
    assert after.compute()["utilisation"] == 1.0 > before.compute()["utilisation"]
    state = quantizer.state_dict()
    quantizer.fit(latents, torch.Generator().manual_seed(7))
    assert_close(quantizer.state_dict(), state, rtol=0, atol=0)


@pytest.mark.slow
def test_search_in_a_large_codebook_needs_little_memory() -> None:
    """262,144 codes x 128 for 4,096 tokens: the matrix alone would be 4.3 GB. A process of its own, whose peak is its own."""
    script = textwrap.dedent("""
        import resource, torch
        from genkit.tokenizers.quantizers import SimVQ
        torch.set_num_threads(1)
        quantizer = SimVQ(262_144, 128).train()
        latents = torch.randn(4096, 128)
        quantizer(latents[:8])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        quantizer(latents).loss.backward()
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    """)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 300


@pytest.mark.parametrize("name", ["vq", "simvq", "ema_vq"])
def test_codes_may_start_as_draws_with_the_latents_moments(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(500, 3, generator=generator) @ torch.tensor([[2.0, 0, 0], [1, 0.5, 0], [0, 0, 0]]) + torch.tensor([1.0, -2, 3])
    quantizer = build_quantizer({"name": name, "codebook_size": 20_000, "dim": 3})
    quantizer.fit(latents, torch.Generator().manual_seed(1), "moments")
    codes = quantizer.codebook().detach()
    assert_close(codes.mean(0), latents.mean(0), rtol=0, atol=0.06)
    assert_close(torch.cov(codes.T), torch.cov(latents.T), rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match="Did you mean 'moments'"):
        quantizer.fit(latents, generator, "moment")
