"""Laws of the stack string: round trip, canonical form, errors that point at the column, needs."""

from __future__ import annotations

import pytest
import torch

from genkit.blocks import stack
from genkit.blocks.attention import AttentionConfig
from genkit.blocks.caps import Caps
from genkit.blocks.layout import Layout
from genkit.blocks.mlp import MLPConfig

A, M = AttentionConfig(), MLPConfig()


@pytest.mark.parametrize(
    ("text", "blocks", "canonical"),
    [
        ("attention", [(A,)], "attention"),
        ("attention + mlp", [(A, M)], "attention + mlp"),
        ("attention()+mlp()", [(A, M)], "attention + mlp"),
        ("(attention + mlp) * 2", [(A, M)] * 2, "(attention + mlp) * 2"),
        ("mlp * 3", [(M,)] * 3, "mlp * 3"),
        ("attention + mlp, attention + mlp, mlp", [(A, M), (A, M), (M,)], "(attention + mlp) * 2, mlp"),
        ("(mlp, attention + mlp) * 2", [(M,), (A, M)] * 2, "mlp, attention + mlp, mlp, attention + mlp"),
        ("((attention + mlp) * 2, mlp) * 1", [(A, M), (A, M), (M,)], "(attention + mlp) * 2, mlp"),
        ("mlp,", [(M,)], "mlp"),
        ("(attention + mlp) + mlp", [(A, M, M)], "attention + mlp + mlp"),
        ("attention(6)", [(AttentionConfig(heads=6),)], "attention(heads=6)"),
        ("mlp(4)", [(M,)], "mlp"),
        ("mlp(2.0, nested=[0.5, 1])", [(MLPConfig(2, nested=(0.5, 1)),)], "mlp(ratio=2, nested=(0.5, 1))"),
        ("\n  attention(causal=True)\n  + mlp(act='tanh')", [(AttentionConfig(causal=True), MLPConfig(act="tanh"))], None),
        ("dit(2), mlp", [(A, M), (A, M), (M,)], "(attention + mlp) * 2, mlp"),
        ("dit_fast256(depth=5)", None, "(shsa + mlp) * 2, attention + mlp, (shsa + mlp) * 2"),
        ("dit_hires(4) * 1", None, "window + mlp, window(shift=4) + mlp, window + mlp, attention + mlp"),
        ("ar_state(4)", None, "(retention + mlp) * 3, attention(causal=True) + mlp"),
        ("video(2)", None, "(axial(axes='f') + axial + mlp) * 2"),
        ("tok_enc(3)", None, "modulation, modulation(e=4), modulation"),
        ("points(2)", None, "group(order='morton', window=(0.01, 0.01)) + mlp, latent + mlp"),
        ("attention(key_dim=64, qkv_bias=False)", [(AttentionConfig(key_dim=64, qkv_bias=False),)], None),
    ],
)
def test_parse_gives_the_blocks_and_str_parses_back_to_them(text: str, blocks: list | None, canonical: str | None) -> None:
    parsed = stack.parse(text)
    assert blocks is None or parsed == tuple(blocks)
    assert canonical is None or str(parsed) == canonical
    assert stack.parse(str(parsed)) == parsed
    assert str(stack.parse(str(parsed))) == str(parsed)


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        (
            "atention + mlp",
            1,
            r"unknown block 'atention'. Did you mean 'attention'\? Known: ar_state, attention, axial, ",
        ),
        ("attention + mpl", 13, "Did you mean 'mlp'"),
        ("attention(head=3)", 11, "unknown option of attention: 'head'. Did you mean 'heads'"),
        ("mlp, attention(rope='3d')", 6, "unknown value of attention option rope: '3d'"),
        ("mlp(hidden='a')", 1, "mlp option hidden must be int or None, got 'a'"),
        ("attention + mlp * 2", 13, r"write `\(a \+ b\) \* 2`"),
        ("attention * 2 + mlp", 1, r"write `\(a \+ b\) \* 2`"),
        ("(mlp, mlp) + mlp", 1, "cannot join lists of blocks; use `,`"),
        ("mlp * 0", 7, "expected a positive whole number, got '0'"),
        ("mlp * 2.0", 7, "got '2.0'"),
        ("mlp * True", 7, "got 'True'"),
        ("2 * mlp", 5, "got 'mlp'"),
        ("mlp(2, 3)", 8, r"only the first option of mlp \(ratio\)"),
        ("mlp(2, ratio=3)", 8, "option ratio of mlp is given twice"),
        ("mlp(ratio=2, ratio=3)", 14, "option ratio of mlp is given twice"),
        ("mlp(ratio=x)", 11, "options are literals"),
        ("mlp(**{'ratio': 2})", 5, "unknown option of mlp"),
        ("  mlp + blocks.mlp", 9, "expected a block name"),
        ("mlp - mlp", 1, "expected a block name"),
        ("__import__('os').remove('x')", 1, "expected a block name"),
        ("()", 1, "empty list"),
        ("mlp, dit", 6, r"dit is a preset; write how many blocks, as in dit\(12\)"),
        ("dit(2, 3)", 1, "dit is a preset"),
        ("dit(heads=3)", 1, "dit is a preset"),
        ("dit(2, heads=3)", 1, "dit is a preset"),
        ("dit(0)", 5, "expected a positive whole number, got '0'"),
        ("dit(2) + mlp", 1, "cannot join lists of blocks; use `,`"),
        ("dit_fast(3)", 1, "Did you mean 'dit_fast256'"),
        ("mlp(", 4, "not an expression"),
        ("mlp mlp", 5, "not an expression"),
        ("attention(causal=True, keys='context')", 1, "needs keys='self' or 'both'"),
    ],
)
def test_errors_name_the_column_and_what_was_expected(text: str, column: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf"column {column}: .*{message}"):
        stack.parse(text)


@pytest.mark.parametrize("text", ["", "  ", None, 3])
def test_what_is_not_a_stack_string_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="must be a string such as"):
        stack.parse(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", stack.PRESETS)
def test_presets_are_built_and_run(name: str) -> None:
    layout = Layout(grid=(2, 2, 3), pos=torch.rand(1, 12, 3))
    x = torch.randn(2, 12, 16)
    blocks = stack.build(f"{name}(4)", 16, heads=4)
    for block in blocks:
        x = block(x, layout=layout)
    assert len(blocks) == 4 and x.shape == (2, 12, 16) and x.isfinite().all()


def test_needs_are_checked_before_anything_is_built() -> None:
    text = "attention + mlp, attention(causal=True) + mlp"
    with pytest.raises(ValueError, match=r"block 2: attention\(causal=True\) lacks set_op, which this model needs"):
        stack.build(text, 7, heads=3, needs=Caps(set_op=True))  # 7 wide could not be built
    with pytest.raises(ValueError, match=r"block 1: attention lacks causal, cache.*Try attention\(causal=True\)"):
        stack.build(text, 8, heads=2, needs=Caps(causal=True, cache=True))
    with pytest.raises(ValueError, match=r"block 1: no branch takes context.*Try attention\(keys="):
        stack.build(text, 8, heads=2, needs=Caps(context=True))
    assert len(stack.build("(attention(keys='both') + mlp) * 2", 8, heads=2, needs=Caps(set_op=True, context=True, mask=True))) == 2
    assert (
        len(stack.build("attention(causal=True) + attention(keys='context') + mlp", 8, heads=2, needs=Caps(causal=True, cache=True))) == 1
    )


def test_build_takes_strings_and_parsed_stacks_and_refuses_unknown_modulation() -> None:
    parsed = stack.parse("(attention + mlp) * 2")
    names = [name for name, _ in stack.build(parsed, 8, heads=2).named_parameters()]
    assert names == [name for name, _ in stack.build(str(parsed), 8, heads=2).named_parameters()]
    with pytest.raises(ValueError, match="modulated must be True, False or 'given', got 'yes'"):
        stack.build("mlp", 8, modulated="yes")


def test_parameter_names_and_shapes_are_frozen() -> None:
    blocks = stack.build(
        "attention(key_dim=8, keys='both', qk_norm='rms') + mlp(gated=True)",
        16,
        heads=4,
        context_dim=10,
        context_norm="ln",
        modulated=True,
        cond_dim=6,
        layer_scale=0.1,
        residual="sandwich",
    )
    attention = {
        "q": [32, 16],
        "kv": [64, 16],
        "context_kv": [64, 10],
        "proj": [16, 32],
    }
    expected = {f"0.branches.0.f.{name}.weight": shape for name, shape in attention.items()}
    expected |= {f"0.branches.0.f.{name}.bias": shape[:1] for name, shape in attention.items()}
    expected |= {"0.branches.0.f.q_norm.weight": [8], "0.branches.0.f.k_norm.weight": [8]}
    for name, shape in {"fc1": [64, 16], "gate": [64, 16], "fc2": [16, 64]}.items():
        expected |= {f"0.branches.1.f.{name}.weight": shape, f"0.branches.1.f.{name}.bias": shape[:1]}
    expected |= {f"0.branches.{i}.{name}.{part}": [16] for i in (0, 1) for name in ("norm", "norm_out") for part in ("weight", "bias")}
    expected |= {f"0.branches.{i}.layer_scale": [16] for i in (0, 1)}
    expected |= {"0.branches.0.context_norm.weight": [10], "0.branches.0.context_norm.bias": [10]}
    expected |= {"0.modulation.linear.weight": [96, 6], "0.modulation.linear.bias": [96]}
    assert {name: list(parameter.shape) for name, parameter in blocks.state_dict().items()} == expected
