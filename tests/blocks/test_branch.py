"""Laws of branches and blocks: residual forms, modulation order, context, and arguments refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from genkit.blocks import stack
from genkit.blocks.branch import Block, Branch
from genkit.blocks.mlp import MLPConfig


def randomise(module: nn.Module) -> None:
    """Replace every parameter by noise, so that zeros and ones at the start hide nothing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def block_of(text: str, **options: object) -> Block:
    block = stack.build(text, 16, heads=4, **options)[0]  # type: ignore[arg-type]
    assert isinstance(block, Block)
    randomise(block)
    return block.eval()


def branch_of(block: Block, index: int) -> Branch:
    branch = block.branches[index]
    assert isinstance(branch, Branch)
    return branch


def enat_block() -> Block:
    return block_of(
        "attention(keys='both') + mlp(act='gelu_tanh')",
        norm="ln_noaffine",
        eps=1e-6,
        modulated=True,
        context_norm="ln_noaffine",
        modulate_context=True,
    )


@pytest.mark.parametrize("residual", ["pre", "post", "sandwich", "none"])
@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_residual_forms_equal_their_formulas(residual: str, layer_scale: float | None) -> None:
    branch = Branch(MLPConfig().build(16), 16, "ln", residual=residual, layer_scale=layer_scale)
    randomise(branch)
    x, f, ls = torch.randn(3, 5, 16), branch.f, 1.0 if branch.layer_scale is None else branch.layer_scale
    expected = {
        "pre": lambda: x + ls * f(branch.norm(x)),
        "post": lambda: branch.norm(x + ls * f(x)),
        "sandwich": lambda: x + ls * branch.norm_out(f(branch.norm(x))),
        "none": lambda: ls * f(branch.norm(x)),
    }[residual]()
    torch.testing.assert_close(branch(x), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(branch.norm_out, nn.Identity) == (residual != "sandwich")


def test_layer_scale_starts_at_its_value() -> None:
    branch = Branch(MLPConfig().build(4), 4, layer_scale=1e-4)
    assert branch.layer_scale is not None
    torch.testing.assert_close(branch.layer_scale.data, torch.full((4,), 1e-4), rtol=0, atol=0)


def layer_norm(x: Tensor, eps: float) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def test_modulated_block_with_own_context_equals_the_written_out_formula() -> None:
    block = enat_block()
    assert block.counts == [5, 3]
    x, context, cond = torch.randn(3, 5, 16), torch.randn(3, 4, 16), torch.randn(3, 16)
    assert block.modulation is not None
    chunks = block.modulation.linear(torch.nn.functional.silu(cond)).chunk(8, dim=-1)
    shift_a, scale_a, shift_x, scale_x, gate_a, shift_m, scale_m, gate_m = (chunk[:, None] for chunk in chunks)
    attention, mlp = branch_of(block, 0).f, branch_of(block, 1).f
    own = layer_norm(x, 1e-6) * (1 + scale_a) + shift_a
    other = layer_norm(context, 1e-6) * (1 + scale_x) + shift_x
    h = x + gate_a * attention(own, context=other)
    expected = h + gate_m * mlp(layer_norm(h, 1e-6) * (1 + scale_m) + shift_m)
    torch.testing.assert_close(block(x, cond, context=context), expected, rtol=1e-5, atol=1e-5)


def test_modulated_block_starts_as_the_identity() -> None:
    block = stack.build("attention + mlp", 16, heads=4, norm="ln_noaffine", modulated=True)[0]
    x = torch.randn(3, 5, 16)
    assert torch.equal(block(x, torch.randn(3, 16)), x)


def test_sandwich_branches_gate_after_the_second_norm() -> None:
    block = block_of("mlp", residual="sandwich", modulated="given")
    branch, x, vectors = branch_of(block, 0), torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    shift, scale, gate = vectors[:, :1], vectors[:, 1:2], vectors[:, 2:]
    expected = x + gate * branch.norm_out(branch.f(branch.norm(x) * (1 + scale) + shift))
    torch.testing.assert_close(block(x, vectors), expected, rtol=1e-5, atol=1e-5)


def test_modulation_inside_equals_ready_made_vectors() -> None:
    block = enat_block()
    x, context, cond = torch.randn(3, 5, 16), torch.randn(3, 4, 16), torch.randn(3, 16)
    assert block.modulation is not None
    assert torch.equal(block(x, block.modulation(cond), context=context), block(x, cond, context=context))
    given = stack.build(
        "attention(keys='both') + mlp(act='gelu_tanh')",
        16,
        heads=4,
        norm="ln_noaffine",
        eps=1e-6,
        modulated="given",
        context_norm="ln_noaffine",
        modulate_context=True,
    )[0]
    given.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith("modulation")})
    assert torch.equal(given(x, block.modulation(cond), context=context), block(x, cond, context=context))
    with pytest.raises(ValueError, match=r"no Linear for cond; give vectors \[b, 8, 16\], got \[3, 16\]"):
        given(x, cond, context=context)


@pytest.mark.parametrize("form", ["list", "pair"])
def test_projected_context_equals_the_context_tensor(form: str) -> None:
    block = enat_block()
    x, context, cond = torch.randn(3, 5, 16), torch.randn(3, 4, 16), torch.randn(3, 16)
    projected = block.project_context(context, cond)
    assert projected[1] is None
    given = projected if form == "list" else projected[0]
    assert torch.equal(block(x, cond, context=given), block(x, cond, context=context))


def test_context_norm_is_affine_without_modulation_and_has_the_contexts_width() -> None:
    block = block_of("attention + attention(keys='context') + mlp", context_dim=10, context_norm="ln")
    branch, context, x = branch_of(block, 1), torch.randn(2, 3, 10), torch.randn(2, 5, 16)
    h = branch_of(block, 0)(x)
    assert isinstance(branch.context_norm, nn.LayerNorm)
    affine = layer_norm(context, 1e-5) * branch.context_norm.weight + branch.context_norm.bias
    h = h + branch.f(branch.norm(h), context=affine)
    torch.testing.assert_close(block(x, context=context), branch_of(block, 1 + 1)(h), rtol=1e-5, atol=1e-5)
    assert isinstance(branch_of(block, 0).context_norm, nn.Identity)


def test_a_text_branch_in_a_modulated_block_has_three_vectors() -> None:
    block = block_of("attention + attention(keys='context') + mlp", modulated=True, cond_dim=6)
    assert block.counts == [3, 3, 3]
    assert block(torch.randn(2, 3, 16), torch.randn(2, 6), context=torch.randn(2, 4, 16)).shape == (2, 3, 16)


@torch.no_grad()
def test_block_caches_match_full_forward_in_any_chunking() -> None:
    block = block_of("attention(causal=True, rope='1d') + attention(keys='context') + mlp")
    x, context = torch.randn(3, 7, 16), torch.randn(3, 4, 16)
    full = block(x, context=context)
    for chunks in ((1,) * 7, (4, 3)):
        cache = block.new_cache(3, 7, device="cpu", dtype=torch.float32)
        assert [entry is None for entry in cache] == [False, True, True]
        projected = block.project_context(context)
        parts = [block(part, context=projected, cache=cache) for part in x.split(chunks, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-5, atol=1e-5)


def test_masks_per_branch_reach_their_branch() -> None:
    block = block_of("attention + attention(keys='context') + mlp")
    x, context = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    own, other = torch.tensor([[True] * 3 + [False] * 2] * 2), torch.tensor([[True] * 2 + [False] * 2] * 2)
    dropped = block(x[:, :3], context=context[:, :2])
    torch.testing.assert_close(block(x, context=context, mask=[own, other, None])[:, :3], dropped, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"must be \[2, 4\]"):
        block(x, context=context, mask=own)


def test_width_reaches_the_channel_mixers_only() -> None:
    block = block_of("attention + mlp(hidden=8, nested=(0.5, 1))")
    x = torch.randn(2, 5, 16)
    h = branch_of(block, 0)(x)
    torch.testing.assert_close(block(x, width=0.5), branch_of(block, 1)(h, width=0.5), rtol=0, atol=0)
    assert not torch.allclose(block(x, width=0.5), block(x))


X = torch.zeros(2, 3, 16)


@pytest.mark.parametrize(
    ("text", "options", "arguments", "message"),
    [
        ("attention + mlp", {}, {"context": X}, r"Block\(attention \+ mlp\): no branch takes context. Mixers that do: attention\(keys="),
        ("attention + mlp", {}, {"cond": X[:, 0]}, "no branch is modulated"),
        ("attention + mlp", {"modulated": True}, {}, r"cond is missing; give \[b, cond_dim\] or ready-made vectors \[b, 6, 16\]"),
        ("attention + mlp", {"modulated": True}, {"cond": X}, r"cond must be \[b, k, d\], k=6, d=16, got \[2, 3, 16\]"),
        ("attention", {}, {"width": 0.5}, r"attention does not take width. Mixers that do: mlp\(nested=...\)"),
        ("attention + mlp", {}, {"width": 0.5}, r"width must be one of \(1,\), got 0.5"),
        ("mlp", {}, {"mask": torch.ones(2, 3).bool()}, "mlp does not take mask"),
        ("attention + mlp", {}, {"cache": [None]}, r"cache must have one entry per branch \(2\), got 1"),
        ("attention + mlp", {}, {"mask": [None]}, r"mask must have one entry per branch \(2\), got 1"),
        ("attention(keys='both') + attention(keys='both')", {}, {"context": (X, X)}, "several branches take context"),
    ],
)
def test_an_argument_without_a_taker_is_refused(text: str, options: dict, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_of(text, **options)(X, **arguments)


def test_blocks_that_cannot_decode_refuse_a_cache() -> None:
    with pytest.raises(ValueError, match=r"attention does not take cache. Mixers that do: attention\(causal=True\)"):
        block_of("attention + mlp").new_cache(1, 4, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="no branch takes context"):
        block_of("attention + mlp").project_context(X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": "before"}, "unknown residual 'before'"),
        ({"residual": "post", "modulated": True}, "modulated=True needs residual 'pre' or 'sandwich', got 'post'"),
        ({"modulate_context": True}, "needs modulated=True and a mixer that takes context"),
        ({"norm": "layernorm"}, "unknown norm 'layernorm'"),
    ],
)
def test_branch_options_that_contradict_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Branch(MLPConfig().build(4), 4, **options)


def test_a_branch_refuses_vectors_it_has_no_use_for() -> None:
    branch = Branch(MLPConfig().build(16), 16)
    with pytest.raises(ValueError, match=r"mod must be \[b, 0, d\]"):
        branch(X, mod=X)
    with pytest.raises(ValueError, match="mlp does not take context"):
        branch.project_context(X)
