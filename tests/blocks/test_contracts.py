"""Contracts of every mixer under every kind of block: shapes, dtypes, compile, gradients, save/load, and capabilities kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genkit.blocks import stack
from genkit.blocks.branch import Block
from genkit.blocks.caps import MIXERS
from genkit.blocks.layout import Layout

MIXER_TEXTS = [
    "attention",
    "attention(kv_heads=2, qk_norm='ln')",
    "attention(rope='1d', value_ratio=2)",
    "attention(rope='2d', qk_norm='rms')",
    "attention(pos_bias='table_abs', table=(3, 3))",
    "attention(local_v_conv=3)",
    "attention(causal=True)",
    "attention(causal=True, rope='1d', kv_heads=1)",
    "attention(keys='context', key_dim=6)",
    "attention(keys='both')",
    "attention(keys='both', context_kv='shared', causal=True)",
    "axial",
    "axial(axes='h', out_layers=2)",
    "axial_kernel",
    "axial_kernel(mode='chained', head_dim=3, latent=5)",
    "bn_mlp",
    "cga(window=2, key_dim=3, kernels=3)",
    "cga(window=3, key_dim=2, kernels=(3, 1, 1, 3), norm='bn')",
    "conv",
    "conv(kind='mhca', norm='bn')",
    "conv(kind='pool', norm='ln')",
    "conv_mlp",
    "conv_mlp(ratio=2, k=5, norm='bn', bias=False)",
    "graph",
    "graph(K=1, norm='bn')",
    "group(size=5)",
    "group(size=4, order='snake', axis=1, window=(2, 2), shift=True, pos='sincos')",
    "group(size=3, order='morton', window=(1, 1))",
    "latent(m=3)",
    "latent(m=4, source='pool', self_layers=0)",
    "linear",
    "linear(feature='elu1', causal=True, chunk=4)",
    "linear(feature='hash', bits=4, anchors=3)",
    "lmu(memory=4, theta=5)",
    "modulation",
    "modulation(e=2, k=(3, 5), bias=False)",
    "reduced",
    "reduced(kv='conv', q_conv=True, norm='bn')",
    "reduced(kv='run', r=1, norm='ln')",
    "retention",
    "retention(decay='learned', scan='bidir', out_norm='rms')",
    "retention(decay='data', chunk=2, gate=True, out_norm='ln')",
    "retention(decay='data', scan='cross')",
    "retention(softmax=True)",
    "shsa",
    "shsa(norm='ln', causal=True, p=5)",
    "shsa(norm='gn1', bn=True, p=8)",
    "window(size=2)",
    "window(size=2, shift=1, rope='2d', qk_norm='rms')",
    "window(size=4, pad='zero', norm='ln', pos_bias='table_abs')",
    "window(size=2, shift=1, pos_bias='table_rel')",
    "memory(bits=4)",
    "memory(bits=2, ratio=2, projected=True, score='released')",
    "mlp",
    "mlp(act='silu', gated='product', nested=(0.5, 1))",
    "mlp(act='silu', gated=True, nested=(0.5, 1))",
]
BLOCK_KINDS: dict[str, dict[str, Any]] = {
    "plain": {"norm": "ln"},
    "modulated": {"norm": "rms_noaffine", "modulated": True},
    "sandwich": {"norm": "rms", "residual": "sandwich", "layer_scale": 0.5},
    "post": {"norm": "ln", "residual": "post"},
}
pytestmark = [
    pytest.mark.parametrize("text", MIXER_TEXTS),
    pytest.mark.parametrize("kind", BLOCK_KINDS),
]


def make(text: str, kind: str) -> tuple[Block, dict]:
    """A block with noise for parameters, and the arguments it needs: batch 3, a 2 x 3 grid, 4 context tokens."""
    torch.manual_seed(0)
    block = stack.build(text, 16, heads=4, **BLOCK_KINDS[kind])[0].eval()
    assert isinstance(block, Block)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    arguments: dict = {"x": torch.randn(3, 6, 16), "layout": Layout(grid=(2, 3))}
    if "modulated" in BLOCK_KINDS[kind]:
        arguments["cond"] = torch.randn(3, 16)
    if stack.parse(text)[0][0].caps.context:
        arguments["context"] = torch.randn(3, 4, 16)
    return block, arguments


def converted(arguments: dict, dtype: torch.dtype) -> dict:
    return {name: value.to(dtype) if isinstance(value, Tensor) else Layout(grid=(2, 3)) for name, value in arguments.items()}


def test_output_has_the_inputs_shape_and_inputs_stay_untouched(text: str, kind: str) -> None:
    block, arguments = make(text, kind)
    copies = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    out = block(**arguments)
    assert out.shape == (3, 6, 16)
    assert out.isfinite().all()
    assert all(torch.equal(arguments[name], copy) for name, copy in copies.items())
    assert {stack.parse(t)[0][0].name for t in MIXER_TEXTS} == set(MIXERS), "add every registered mixer to MIXER_TEXTS"


def test_a_sample_does_not_depend_on_its_batch(text: str, kind: str) -> None:
    block, arguments = make(text, kind)
    one = {name: value[1:2] if isinstance(value, Tensor) else value for name, value in arguments.items()}
    torch.testing.assert_close(block(**one), block(**arguments)[1:2], rtol=1e-5, atol=1e-5)


def test_one_token_is_enough(text: str, kind: str) -> None:
    block, arguments = make(text, kind)
    out = block(**arguments | {"x": arguments["x"][:, :1], "layout": Layout(grid=(1, 1))})
    assert out.shape == (3, 1, 16)
    assert out.isfinite().all()


def test_bf16_runs_and_stays_close(text: str, kind: str) -> None:
    block, arguments = make(text, kind)
    expected = block(**arguments)
    out = block.bfloat16()(**converted(arguments, torch.bfloat16))
    assert out.dtype == torch.bfloat16
    error = (out.float() - expected).norm() / expected.norm()
    assert error < 0.05


def test_gradients_reach_every_parameter_and_input(text: str, kind: str) -> None:
    block, arguments = make(text, kind)
    inputs = [value.requires_grad_() for value in arguments.values() if isinstance(value, Tensor)]
    block(**arguments).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert all(value.grad is not None and value.grad.any() for value in inputs)


def test_checkpointing_equals_not(text: str, kind: str) -> None:
    block, arguments = make(text, kind)
    x = arguments.pop("x").requires_grad_()
    (plain,) = torch.autograd.grad(block(x, **arguments).square().sum(), x)
    (again,) = torch.autograd.grad(checkpoint(block, x, use_reentrant=False, **arguments).square().sum(), x)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_save_and_load_gives_the_same_output(text: str, kind: str, tmp_path: Path) -> None:
    block, arguments = make(text, kind)
    save_file(block.state_dict(), tmp_path / "block.safetensors")
    other = stack.build(text, 16, heads=4, **BLOCK_KINDS[kind])[0].eval()
    other.load_state_dict(load_file(tmp_path / "block.safetensors"))
    assert torch.equal(other(**arguments), block(**arguments))


def test_compile_fullgraph_equals_eager(text: str, kind: str) -> None:
    torch.compiler.reset()
    block, arguments = make(text, kind)
    expected = block(**arguments)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**arguments | {"layout": Layout(grid=(2, 3))}), expected, rtol=1e-6, atol=1e-6)


def test_claimed_capabilities_hold(text: str, kind: str) -> None:
    block, arguments = make(text, kind)
    caps = stack.parse(text)[0][0].caps
    pos = torch.rand(3, 6, 2) * 5
    grid = (2, 3) if caps.grid else None
    arguments["layout"] = Layout(grid=grid, pos=pos)
    x, out = arguments["x"], block(**arguments)
    if caps.set_op:
        order = torch.tensor([3, 0, 5, 1, 2, 4])
        moved = arguments | {"x": x[:, order], "layout": Layout(pos=pos[:, order])}
        torch.testing.assert_close(block(**moved), out[:, order], rtol=1e-5, atol=1e-5)
    changed = x.clone()
    changed[:, 4] += torch.linspace(-1, 2, 16)
    leak = (block(**arguments | {"x": changed, "layout": Layout(grid=grid, pos=pos)}) - out)[:, :4].abs().max()
    assert caps.causal == (leak == 0).item()
    if caps.cache:
        with torch.no_grad():
            cache = block.new_cache(3, 6, device="cpu", dtype=torch.float32)
            parts = [
                block(**arguments | {"x": x[:, a:b], "layout": Layout(pos=pos[:, a:b]), "cache": cache})
                for a, b in ((0, 2), (2, 3), (3, 6))
            ]
        torch.testing.assert_close(torch.cat(parts, 1), out, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="does not take cache"):
            block.new_cache(3, 6, device="cpu", dtype=torch.float32)
