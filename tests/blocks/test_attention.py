"""Laws of the attention mixer: written-out reference, causality, caches, permutations, masks, context."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from genkit.blocks import stack
from genkit.blocks.attention import Attention, AttentionConfig
from genkit.blocks.caches import StateCache
from genkit.blocks.layout import Layout


def make(text: str, dim: int = 16, heads: int = 4, context_dim: int | None = None, seed: int = 0) -> Attention:
    torch.manual_seed(seed)
    config = stack.parse(text)[0][0]
    assert isinstance(config, AttentionConfig)
    return config.build(dim, heads=heads, context_dim=context_dim).eval()


def reference(mixer: Attention, x: Tensor, context: Tensor | None, scale: float) -> Tensor:
    """Attention with plain matrices, one sample and one head at a time, from the documented weight layout."""
    config, hd, vd, out = mixer.config, mixer.key_dim, mixer.value_dim, []
    sources = [] if context is None else [(context, mixer.kv if config.context_kv == "shared" else mixer.context_kv)]
    sources += [(x, mixer.kv)] if config.keys != "context" else []
    for i in range(x.shape[0]):
        heads = []
        for h in range(mixer.heads):
            g = h // (mixer.heads // mixer.kv_heads)
            q = mixer.q_norm(mixer.q(x[i])[:, h * hd : (h + 1) * hd])
            rows = torch.cat([layer(tokens[i]) for tokens, layer in sources if layer is not None])
            k = mixer.k_norm(rows[:, g * hd : (g + 1) * hd])
            first = mixer.kv_heads * hd + g * vd
            logits = q @ k.T * scale
            if config.causal:
                logits = logits.masked_fill(~torch.ones_like(logits).tril(k.shape[0] - q.shape[0]).bool(), float("-inf"))
            heads.append(logits.softmax(-1) @ rows[:, first : first + vd])
        out.append(mixer.proj(torch.cat(heads, -1)))
    return torch.stack(out)


@pytest.mark.parametrize(
    "text",
    [
        "attention",
        "attention(2)",
        "attention(kv_heads=2)",
        "attention(key_dim=6, value_ratio=1.5)",
        "attention(key_dim=8, value_ratio=0.5, qkv_bias=False)",
        "attention(out_bias=False)",
        "attention(heads=1, key_dim=16, out_proj=False)",
        "attention(qk_norm='ln')",
        "attention(qk_norm='rms', kv_heads=1)",
        "attention(causal=True)",
        "attention(keys='context')",
        "attention(keys='both')",
        "attention(keys='both', causal=True, kv_heads=2, qk_norm='rms')",
    ],
)
def test_attention_equals_plain_matrices_on_the_documented_weights(text: str) -> None:
    with_context = "keys" in text
    mixer = make(text, context_dim=10 if with_context else None)
    x, context = torch.randn(3, 5, 16), torch.randn(3, 4, 10) if with_context else None
    torch.testing.assert_close(mixer(x, context=context), reference(mixer, x, context, mixer.key_dim**-0.5), rtol=1e-5, atol=1e-5)


def test_shared_context_projection_is_the_tokens_own_one() -> None:
    mixer = make("attention(keys='both', context_kv='shared')")
    assert mixer.context_kv is None
    x, context = torch.randn(2, 3, 16), torch.randn(2, 4, 16)
    torch.testing.assert_close(mixer(x, context=context), reference(mixer, x, context, 0.5), rtol=1e-5, atol=1e-5)
    joint = make("attention")
    joint.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(x, context=context), joint(torch.cat([context, x], 1))[:, 4:], rtol=1e-5, atol=1e-5)


def test_scale_dim_divides_logits_by_the_root_of_the_width() -> None:
    mixer = make("attention(scale='dim')")
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(mixer(x), reference(mixer, x, None, 16**-0.5), rtol=1e-5, atol=1e-5)


def test_options_decide_which_weights_exist() -> None:
    names = {name for name, _ in make("attention(qkv_bias=False)").named_parameters()}
    assert names == {"q.weight", "kv.weight", "proj.weight", "proj.bias"}
    names = {name for name, _ in make("attention(1, qkv_bias=False, out_proj=False)").named_parameters()}
    assert names == {"q.weight", "kv.weight"}
    shapes = {n: tuple(p.shape) for n, p in make("attention(key_dim=64, keys='both')", context_dim=10).named_parameters()}
    assert shapes["q.weight"] == (256, 16)
    assert shapes["kv.weight"] == (512, 16)
    assert shapes["context_kv.weight"] == (512, 10)
    assert make("attention(keys='context')").kv is None


@pytest.mark.parametrize("text", ["attention(causal=True)", "attention(causal=True, rope='1d')", "attention(causal=True, keys='both')"])
def test_a_later_token_leaves_earlier_outputs_bit_equal(text: str) -> None:
    mixer = make(text)
    x, context = torch.randn(3, 7, 16), torch.randn(3, 2, 16) if "both" in text else None
    before = mixer(x, context=context)
    changed = x.clone()
    changed[:, 4] += 1
    after = mixer(changed, context=context)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("chunks", [(7,), (1,) * 7, (3, 4), (1, 5, 1)])
@pytest.mark.parametrize(
    "text",
    [
        "attention(causal=True)",
        "attention(causal=True, rope='1d', kv_heads=2, qk_norm='rms')",
        "attention(causal=True, value_ratio=2)",
        "attention(causal=True, keys='both')",
    ],
)
@torch.no_grad()
def test_kv_cache_in_any_chunking_matches_full_forward(text: str, chunks: tuple[int, ...]) -> None:
    mixer = make(text)
    x, context = torch.randn(3, 7, 16), torch.randn(3, 2, 16) if "both" in text else None
    cache = mixer.new_cache(3, 7, device="cpu", dtype=torch.float32)
    parts = [mixer(part, context=context, cache=cache) for part in x.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), mixer(x, context=context), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_kv_cache_matches_full_forward_after_reorder_and_reset() -> None:
    mixer = make("attention(causal=True, rope='1d')")
    x = torch.randn(3, 6, 16)
    cache = mixer.new_cache(3, 6, device="cpu", dtype=torch.float32)
    assert cache is not None
    mixer(x[:, :4], cache=cache)
    rows = torch.tensor([2, 0])
    cache.reorder(rows)
    torch.testing.assert_close(mixer(x[rows, 4:], cache=cache), mixer(x[rows])[:, 4:], rtol=1e-5, atol=1e-5)
    cache.reset()
    torch.testing.assert_close(mixer(x[:2], cache=cache), mixer(x[:2]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_key_mask_with_a_cache_covers_cached_tokens_and_combines_with_the_triangle() -> None:
    mixer = make("attention(causal=True)")
    x = torch.randn(2, 6, 16)
    mask = torch.tensor([[False, True, True, True, True, True], [True, True, False, True, True, True]])
    full = mixer(x, mask=mask)
    cache = mixer.new_cache(2, 6, device="cpu", dtype=torch.float32)
    parts = [mixer(x[:, i : i + 2], mask=mask[:, : i + 2], cache=cache) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-5, atol=1e-5)
    dropped = mixer(x[:1, 1:])
    torch.testing.assert_close(full[:1, 1:], dropped, rtol=1e-5, atol=1e-5)


def test_a_four_axis_mask_is_complete_and_replaces_the_triangle() -> None:
    mixer, free = make("attention(causal=True)"), make("attention")
    x = torch.randn(2, 5, 16)
    assert mixer.state_dict().keys() == free.state_dict().keys()
    torch.testing.assert_close(mixer(x, mask=torch.ones(2, 1, 5, 5).bool()), free(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", ["attention", "attention(rope='1d')", "attention(rope='2d', qk_norm='ln')", "attention(keys='both')"])
def test_attention_commutes_with_permutations_of_tokens_with_their_positions(text: str) -> None:
    mixer, order = make(text), torch.randperm(6)
    assert mixer.config.caps.set_op
    x, pos = torch.randn(3, 6, 16), torch.rand(3, 6, 2) * 5
    context = torch.randn(3, 4, 16) if "both" in text else None
    out = mixer(x, layout=Layout(pos=pos), context=context)
    shuffled = None if context is None else context[:, torch.randperm(4)]
    torch.testing.assert_close(mixer(x[:, order], layout=Layout(pos=pos[:, order]), context=shuffled), out[:, order], rtol=1e-5, atol=1e-5)


def test_masked_tokens_may_as_well_be_dropped() -> None:
    mixer = make("attention(keys='both')")
    x, context = torch.randn(3, 6, 16), torch.randn(3, 5, 16)
    keep, keep_context = torch.tensor([0, 2, 3]), torch.tensor([1, 4])
    mask = torch.zeros(3, 11, dtype=torch.bool)
    mask[:, keep_context] = True
    mask[:, 5 + keep] = True
    kept = mixer(x[:, keep], context=context[:, keep_context])
    torch.testing.assert_close(mixer(x, context=context, mask=mask)[:, keep], kept, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keys", ["context", "both"])
def test_projected_context_equals_the_context_tensor(keys: str) -> None:
    mixer = make(f"attention(keys='{keys}', kv_heads=2, qk_norm='rms', value_ratio=2)", context_dim=10)
    x, context = torch.randn(3, 5, 16), torch.randn(3, 4, 10)
    k, v = mixer.project_context(context)
    assert k.shape == (3, 2, 4, 4)
    assert v.shape == (3, 2, 4, 8)
    assert torch.equal(mixer(x, context=(k, v)), mixer(x, context=context))


def test_an_empty_context_is_no_context() -> None:
    both = make("attention(keys='both')")
    x, empty = torch.randn(3, 5, 16), torch.randn(3, 0, 16)
    torch.testing.assert_close(both(x, context=empty), both(x), rtol=1e-5, atol=1e-5)
    both(x, context=empty).sum().backward()
    assert both.context_kv is not None
    gradient = both.context_kv.weight.grad
    assert gradient is not None  # so that distributed training counts the weight as used
    assert not gradient.any()
    cross = make("attention(keys='context')")
    assert isinstance(cross.proj, nn.Linear)
    torch.testing.assert_close(cross(x, context=empty), cross.proj.bias.expand(3, 5, 16), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="context is missing"):
        cross(x)


def test_cross_attention_treats_each_query_alone() -> None:
    mixer = make("attention(keys='context')")
    caps = mixer.config.caps
    assert caps.causal
    assert caps.cache
    assert mixer.new_cache(1, 4, device="cpu", dtype=torch.float32) is None
    x, context = torch.randn(2, 4, 16), torch.randn(2, 3, 16)
    torch.testing.assert_close(mixer(x[:, 2:3], context=context), mixer(x, context=context)[:, 2:3], rtol=1e-5, atol=1e-5)


def test_rope_2d_reads_the_grid_and_depends_on_differences_only() -> None:
    mixer, order = make("attention(rope='2d')"), torch.randperm(6)
    x = torch.randn(2, 6, 16)
    layout = Layout(grid=(2, 3))
    pos = layout.positions(2, 6, x.device)
    out = mixer(x, layout=layout)
    torch.testing.assert_close(mixer(x, layout=Layout(pos=pos + 7)), out, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixer(x[:, order], layout=layout), out[:, order], atol=1e-3)
    with pytest.raises(ValueError, match="2-axis positions need pos or a grid"):
        mixer(x)


def test_blocks_of_one_call_share_the_rotation() -> None:
    mixer, layout = make("attention(rope='2d')"), Layout(grid=(2, 3))
    x = torch.randn(1, 6, 16)
    mixer(x, layout=layout)
    layout.positions = None  # type: ignore[method-assign, assignment]
    mixer(x, layout=layout)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("attention", {"context": torch.zeros(2, 1, 16)}, r"^attention does not take context. Mixers that do: attention\(keys="),
        ("attention", {"cache": "kv"}, r"^attention does not take cache. Mixers that do: attention\(causal=True\)"),
        ("attention(causal=True)", {"cache": StateCache()}, "must be a KVCache from new_cache.*got StateCache"),
        ("attention(keys='both')", {"context": torch.zeros(2, 1, 8)}, r"context must be \[b, m, d\], d=16, got \[2, 1, 8\]"),
        ("attention(keys='both')", {"context": torch.zeros(2, 1, 16), "mask": torch.ones(2, 3).bool()}, r"must be \[2, 4\].*got \[2, 3\]"),
    ],
)
def test_an_argument_that_cannot_be_honoured_is_refused_by_name(text: str, arguments: dict, message: str) -> None:
    if arguments.get("cache") == "kv":
        arguments = {"cache": make("attention(causal=True)").new_cache(2, 3, device="cpu", dtype=torch.float32)}
    with pytest.raises((ValueError, TypeError), match=message):
        make(text)(torch.zeros(2, 3, 16), **arguments)


def test_what_needs_a_causal_or_context_mixer_is_refused_by_the_others() -> None:
    with pytest.raises(ValueError, match="does not take cache"):
        make("attention").new_cache(1, 2, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="does not take context"):
        make("attention").project_context(torch.zeros(1, 2, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "dim must be divisible by heads unless key_dim is given, got dim=16, heads=3"),
        ({"kv_heads": 3}, "kv_heads must divide heads, got heads=4, kv_heads=3"),
        ({"key_dim": 3, "value_ratio": 0.5}, r"key_dim \* value_ratio must be whole, got 3 \* 0.5"),
        ({"key_dim": 8, "out_proj": False}, r"out_proj=False needs heads \* value width = dim, got 4 \* 8, dim=16"),
        ({"rope": "2d", "key_dim": 6}, "rope='2d' needs key_dim divisible by 4, got 6"),
        ({"keys": "both", "context_kv": "shared"}, "needs context_dim = dim, got 10 and 16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_their_values(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**options).build(16, heads=4, context_dim=10 if "keys" in options else None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads must be positive, got 0"),
        ({"heads": "6"}, "heads must be int or None, got '6'"),
        ({"qkv_bias": 1}, "qkv_bias must be bool, got 1"),
        ({"qk_norm": "lnn"}, "Did you mean 'ln'"),
        ({"causal": True, "keys": "context"}, "needs keys='self' or 'both'"),
        ({"context_kv": "shared"}, "needs keys='both', got keys='self'"),
        ({"rope": "1d", "keys": "both"}, "rope needs keys='self'"),
    ],
)
def test_options_that_contradict_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**options)


def test_heads_left_open_everywhere_is_refused() -> None:
    with pytest.raises(ValueError, match="number of heads is open"):
        AttentionConfig().build(16)


def test_autocast_runs_and_stays_close_to_float32() -> None:
    mixer = make("attention(qk_norm='rms', rope='1d')")
    x = torch.randn(2, 5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mixer(x)
    torch.testing.assert_close(out.float(), mixer(x), rtol=0.05, atol=0.05)
    assert isinstance(mixer.proj, nn.Linear)
