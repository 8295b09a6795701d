"""Laws of the token mixers that are attention in another arrangement, linear recurrences, or convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from genkit.blocks import stack
from genkit.blocks.attention import AttentionConfig
from genkit.blocks.axial_kernel import AxialKernelConfig
from genkit.blocks.cga import CGAConfig
from genkit.blocks.conv import ConvConfig, to_map, to_tokens
from genkit.blocks.conv_mlp import ConvMLPConfig
from genkit.blocks.fca import FcaBlock
from genkit.blocks.folding import fold_batch_norms
from genkit.blocks.graph import relative
from genkit.blocks.group import GroupConfig, group_places, morton_order, snake_order
from genkit.blocks.latent import LatentConfig
from genkit.blocks.layout import Layout
from genkit.blocks.linear import LinearConfig
from genkit.blocks.lmu import LMUConfig, legendre_system
from genkit.blocks.memory import MemoryLayer
from genkit.blocks.mlp import MLPConfig
from genkit.blocks.modulation_mixer import ModulationConfig
from genkit.blocks.next_vit import NextViTBlock
from genkit.blocks.reduced import ReducedConfig
from genkit.blocks.retention import RetentionConfig, decays
from genkit.blocks.scan import scan
from genkit.blocks.shsa import SHSAConfig
from genkit.blocks.window import WindowConfig

D, HEADS = 8, 2


def tokens(n: int, b: int = 3, d: int = D) -> Tensor:
    return torch.randn(b, n, d, generator=torch.Generator().manual_seed(0))


def built(config: Any, dim: int = D) -> Any:
    torch.manual_seed(1)
    return config.build(dim, heads=HEADS).eval()


def windowed(x: Tensor, grid: tuple[int, int], size: int, shift: int, attention: Any) -> Tensor:
    """Attention in windows, one window after the other."""
    h, w = grid
    out = torch.empty_like(x)

    def starts(length: int) -> list[range]:
        edges = [0, *range(shift, length, size)] if shift else list(range(0, length, size))
        return [range(a, b) for a, b in zip(edges, [*edges[1:], length], strict=True)]

    for rows in starts(h):
        for columns in starts(w):
            index = torch.tensor([r * w + c for r in rows for c in columns])
            out[:, index] = attention(x[:, index])
    return out


@pytest.mark.parametrize(("grid", "size", "shift"), [((4, 6), 2, 0), ((5, 7), 3, 0), ((4, 6), 2, 1), ((5, 7), 3, 1)])
def test_windows_are_attention_of_each_window(grid: tuple[int, int], size: int, shift: int) -> None:
    mixer, x = built(WindowConfig(size, shift)), tokens(grid[0] * grid[1])
    assert_close(mixer(x, layout=Layout(grid=grid)), windowed(x, grid, size, shift, mixer.attention), rtol=1e-5, atol=1e-6)


def test_a_window_as_large_as_the_grid_is_attention_and_only_longer_sides_shift() -> None:
    x = tokens(15)
    mixer = built(WindowConfig(5, 2))
    assert_close(mixer(x[:, :9], layout=Layout(grid=(3, 3))), mixer.attention(x[:, :9]), rtol=1e-5, atol=1e-6)
    strip = built(WindowConfig(3, 1))
    parts = [strip.attention(x.view(3, 3, 5, D)[:, :, a:b].flatten(1, 2)).unflatten(1, (3, b - a)) for a, b in ((0, 1), (1, 4), (4, 5))]
    assert_close(strip(x, layout=Layout(grid=(3, 5))), torch.cat(parts, dim=2).flatten(1, 2), rtol=1e-5, atol=1e-6)


def test_padded_tokens_are_keys_only_on_request_and_frames_stay_apart() -> None:
    x = tokens(9)
    hidden, seen = (built(WindowConfig(2, pad=pad)) for pad in ("mask", "zero"))
    seen.load_state_dict(hidden.state_dict())
    whole, zeros = hidden(x, layout=Layout(grid=(3, 3))), seen(x, layout=Layout(grid=(3, 3)))
    assert_close(whole[:, 0], zeros[:, 0])
    assert_close(whole[:, 8:], hidden.attention(x[:, 8:]), rtol=1e-5, atol=1e-6)
    assert_close(zeros[:, 8:], hidden.attention(F.pad(x[:, 8:], (0, 0, 0, 3)))[:, :1], rtol=1e-5, atol=1e-6)
    both = torch.cat([x, x.flip(1)], dim=1)
    assert_close(hidden(both, layout=Layout(grid=(2, 3, 3)))[:, :9], whole, rtol=1e-5, atol=1e-6)


def test_prefix_tokens_enter_every_window_and_have_no_neighbours() -> None:
    mixer, x = built(WindowConfig(2, rope="2d")), tokens(14)
    layout = Layout(grid=(3, 4), prefix=2)
    out = mixer(x, layout=layout)
    window = torch.tensor([0, 1, 2, 3, 6, 7])  # the prefix, and the first window
    alone = mixer.attention(x[:, window], layout=Layout(grid=(2, 2), prefix=2))
    assert_close(out[:, window[2:]], alone[:, 2:], rtol=1e-5, atol=1e-6)
    one = mixer(x[:, window], layout=Layout(grid=(2, 2), prefix=2))
    assert_close(one, alone, rtol=1e-5, atol=1e-6)
    shifted = built(WindowConfig(2, 1))
    assert_close(shifted(x, layout=layout)[:, [2]], shifted.attention(x[:, :3])[:, 2:], rtol=1e-5, atol=1e-6)
    conv = built(ConvConfig())
    out = conv(x, layout=layout)
    assert_close(out[:, 2:], conv(x[:, 2:], layout=Layout(grid=(3, 4))))
    assert not out[:, :2].any()


def test_an_mlp_with_a_convolution_is_an_mlp_whose_hidden_units_see_their_neighbours() -> None:
    torch.manual_seed(0)
    mixer, x = ConvMLPConfig(ratio=2, act="relu").build(D), tokens(14)
    hidden = mixer.fc1(x).relu()
    image = mixer.filters(hidden[:, 2:].view(3, 3, 4, 2 * D).permute(0, 3, 1, 2))
    expected = mixer.fc2(image.permute(0, 2, 3, 1).reshape(3, 12, 2 * D).relu())
    out = mixer(x, layout=Layout(grid=(3, 4), prefix=2))
    assert_close(out[:, 2:], expected, rtol=1e-5, atol=1e-6)
    assert_close(out[:, :1], mixer(x[:, :1], layout=Layout(grid=(1, 1))), rtol=1e-5, atol=1e-6)
    both = mixer(torch.cat([x[:, 2:], x[:, 2:].flip(1)], dim=1), layout=Layout(grid=(2, 3, 4)))
    assert_close(both[:, :12], expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        mixer.filters.weight.zero_()[:, :, 1, 1] = 1
        mixer.filters.bias.zero_()  # type: ignore[union-attr]
    plain = MLPConfig(ratio=2, act="relu").build(D)
    plain.load_state_dict({key: value for key, value in mixer.state_dict().items() if key.startswith("fc")})
    assert_close(mixer(x, layout=Layout(grid=(2, 7))), plain(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"conv_mlp\(ratio=2, act='relu'\) does not take width"):
        mixer(x, layout=Layout(grid=(2, 7)), width=0.5)


@pytest.mark.parametrize("text", ["window(size=2, shift=1)", "conv(kind='pool')", "latent(m=4, source='pool')", "retention(scan='cross')"])
def test_grids_may_have_a_prefix(text: str) -> None:
    mixer = stack.parse(text)[0][0].build(D, heads=HEADS)
    assert mixer(tokens(14), layout=Layout(grid=(3, 4), prefix=2)).shape == (3, 14, D)


@pytest.mark.parametrize("kind", ["table_abs", "table_rel"])
def test_tables_add_a_number_per_distance_and_follow_their_weights(kind: str) -> None:
    mixer, x, layout = built(AttentionConfig(pos_bias=kind, table=(3, 4))), tokens(7), Layout(grid=(2, 3), prefix=1)
    torch.nn.init.normal_(mixer.bias_table.table)
    bias = torch.zeros(HEADS, 7, 7)
    for i in range(6):
        for j in range(6):
            dy, dx = i // 3 - j // 3, i % 3 - j % 3
            place = (abs(dy), abs(dx)) if kind == "table_abs" else (dy + 2, dx + 3)
            bias[:, 1 + i, 1 + j] = mixer.bias_table.table[:, place[0], place[1]]
    plain = built(AttentionConfig())
    plain.load_state_dict({key: value for key, value in mixer.state_dict().items() if "table" not in key})
    q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (plain.q(x), *plain.kv(x).chunk(2, -1)))
    wanted = plain.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None]).transpose(1, 2).flatten(2))
    assert_close(mixer(x, layout=layout), wanted, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        first = mixer(x, layout=layout)
        assert mixer.bias_table((2, 3), 1) is mixer.bias_table((2, 3), 1)
        mixer.bias_table.table.mul_(2)
        assert not torch.allclose(mixer(x, layout=layout), first)
    with pytest.raises(ValueError, match=r"at most \(3, 4\) tokens, got a grid of \(2, 5\)"):
        mixer(tokens(10), layout=Layout(grid=(2, 5)))
    with pytest.raises(ValueError, match="grid of 2 frames"):
        mixer(tokens(8), layout=Layout(grid=(2, 2, 2)))


def test_filtered_values_are_added_to_the_heads() -> None:
    mixer, plain, x = built(AttentionConfig(local_v_conv=3)), built(AttentionConfig()), tokens(14)
    plain.load_state_dict({key: value for key, value in mixer.state_dict().items() if "local_v" not in key})
    v = plain.kv(x)[..., D:].unflatten(2, (HEADS, -1))[:, 2:].unflatten(1, (3, 4))
    filtered = torch.stack([mixer.local_v(v[..., head, :].permute(0, 3, 1, 2)).permute(0, 2, 3, 1) for head in range(HEADS)], dim=3)
    added = F.linear(F.pad(filtered.flatten(1, 2).flatten(2), (0, 0, 2, 0)), plain.proj.weight)
    assert_close(mixer(x, layout=Layout(grid=(3, 4), prefix=2)), plain(x) + added, rtol=1e-5, atol=1e-6)


def test_reduced_by_one_is_attention_and_pools_take_means() -> None:
    x, layout = tokens(15), Layout(grid=(3, 5))
    mixer, plain = built(ReducedConfig(r=1)), built(AttentionConfig())
    plain.load_state_dict(
        {f"q.{p}": getattr(mixer.q, p) for p in ("weight", "bias")}
        | {f"kv.{p}": torch.cat([getattr(mixer.k, p), getattr(mixer.v, p)]) for p in ("weight", "bias")}
        | {f"proj.{p}": getattr(mixer.proj, p) for p in ("weight", "bias")}
    )
    assert_close(mixer(x, layout=layout), plain(x), rtol=1e-5, atol=1e-6)
    coarse = built(ReducedConfig(r=2))
    keys = torch.stack([x.view(3, 3, 5, D)[:, i : i + 2, j : j + 2].mean((1, 2)) for i in (0, 2) for j in (0, 2, 4)], dim=1)
    pairs = zip((coarse.q, coarse.k, coarse.v), (x, keys, keys), strict=True)
    q, k, v = (layer(part).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer, part in pairs)
    wanted = coarse.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    assert_close(coarse(x, layout=layout), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kv", ["pool", "conv", "avg", "run"])
def test_prefix_tokens_are_queries_and_keys_that_nothing_touches(kv: str) -> None:
    mixer, x = built(ReducedConfig(kv, q_conv=True)), tokens(14)
    layout = Layout(grid=(3, 4), prefix=2)
    out, swapped = mixer(x, layout=layout), mixer(torch.cat([x[:, [1, 0]], x[:, 2:]], dim=1), layout=layout)
    assert_close(swapped, torch.cat([out[:, [1, 0]], out[:, 2:]], dim=1), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(mixer(torch.cat([x[:, :2] + 1, x[:, 2:]], dim=1), layout=layout)[:, 2:], out[:, 2:])
    with pytest.raises(ValueError, match="belongs to no frame"):
        mixer(x, layout=Layout(grid=(2, 2, 3), prefix=2))


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("varying", [False, True])
def test_scans_are_the_recurrence(chunk: int, varying: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, HEADS, 10, 4), torch.randn(2, HEADS, 10, 4), torch.randn(2, HEADS, 10, 3)
    log_decay = -torch.rand(2, HEADS, 10) if varying else -torch.rand(HEADS)
    start = torch.randn(2, HEADS, 4, 3)
    state, wanted = start, []
    for t in range(10):
        g = (log_decay[:, :, t] if varying else log_decay.expand(2, -1)).exp()[..., None, None]
        state = g * state + k[:, :, t, :, None] * v[:, :, t, None]
        wanted.append((q[:, :, t, None] @ state)[:, :, 0])
    y, end = scan(q, k, v, log_decay, chunk=chunk, state=start)
    assert_close(y, torch.stack(wanted, dim=2), rtol=1e-4, atol=1e-5)
    assert_close(end, state, rtol=1e-4, atol=1e-5)


def _weighed(mixer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """(q k^T hd^-0.5 * weight) v of a retention's projections, weight [b|1, heads, n, n]."""
    q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (mixer.q(x), *mixer.kv(x).chunk(2, -1)))
    return mixer.proj(((q @ k.transpose(2, 3) * (D // HEADS) ** -0.5 * weight) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("decay", ["fixed", "learned", "data"])
def test_both_ways_weights_fall_with_the_distance(decay: str) -> None:
    mixer, x = built(RetentionConfig(decay, scan="bidir", chunk=3)), tokens(7)
    if decay == "data":
        steps = F.logsigmoid(mixer.decay(x)).transpose(1, 2) / 16
        reached = steps.cumsum(-1)
        weight = -(reached[..., :, None] - reached[..., None, :]).abs()
    else:
        place = torch.arange(7)
        weight = -(place[:, None] - place).abs() * -decays(HEADS).log().view(1, -1, 1, 1)
    assert_close(mixer(x), _weighed(mixer, x, weight.exp()), rtol=1e-4, atol=1e-5)


def test_a_cross_scan_adds_the_columns_way() -> None:
    cross, bidir, x = built(RetentionConfig(scan="cross")), built(RetentionConfig(scan="bidir")), tokens(12)
    bidir.load_state_dict(cross.state_dict())
    order = torch.arange(12).view(2, 2, 3).transpose(1, 2).flatten()
    columns = bidir(x[:, order])[:, order.argsort()]
    assert_close(cross(x, layout=Layout(grid=(2, 2, 3))), bidir(x) + columns - bidir.proj.bias, rtol=1e-4, atol=1e-5)


def test_linear_attention_of_one_token_is_its_value_and_equals_its_written_out_weights() -> None:
    mixer, x = built(LinearConfig()), tokens(9)
    alone = mixer.proj(mixer.kv(x[:, :1])[..., D:])
    assert_close(mixer(x[:, :1]), alone, rtol=1e-5, atol=1e-6)
    q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (mixer.q(x), *mixer.kv(x).chunk(2, -1)))
    weights = mixer.feature(q) @ mixer.feature(k).transpose(2, 3)
    wanted = mixer.proj((weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))
    assert_close(mixer(x), wanted, rtol=1e-5, atol=1e-6)
    causal = built(LinearConfig(causal=True, chunk=4))
    lower = weights.tril()
    wanted = mixer.proj((lower / lower.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))
    assert_close(causal(x), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [LinearConfig(), LinearConfig("elu1"), SHSAConfig(), SHSAConfig(norm="ln"), LatentConfig(m=3)])
def test_a_mask_is_the_same_as_leaving_tokens_out(config: Any) -> None:
    mixer, x = built(config), tokens(7)
    mask = torch.tensor([True, False, True, True, False, True, True]).expand(3, -1)
    assert_close(mixer(x, mask=mask)[:, mask[0]], mixer(x[:, mask[0]]), rtol=1e-5, atol=1e-6)


def test_masks_that_no_sum_can_honour_are_refused() -> None:
    x = tokens(4)
    nobody = built(LinearConfig())(x, mask=torch.zeros(3, 4, dtype=torch.bool))
    assert nobody.isfinite().all()
    with pytest.raises(ValueError, match=r"mask must be \[3, 4\]"):
        built(LinearConfig())(x, mask=torch.ones(3, 1, 4, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="must be bool"):
        built(LinearConfig())(x, mask=torch.ones(3, 4))
    with pytest.raises(ValueError, match="does not take mask"):
        built(SHSAConfig(norm="gn1"))(x, mask=torch.ones(3, 4, dtype=torch.bool))


@pytest.mark.parametrize(("grid", "k"), [((4, 6), 2), ((6, 6), 3), ((5, 7), 2), ((3, 4), 5)])
def test_minima_of_classes_are_the_rolls(grid: tuple[int, int], k: int) -> None:
    x = torch.randn(2, 3, *grid)
    wanted = torch.zeros_like(x)
    for axis in (2, 3):
        for shift in range(k, x.shape[axis], k):
            wanted = torch.maximum(wanted, x - x.roll(shift, axis))
    assert torch.equal(relative(x, k, "roll"), wanted) and torch.equal(relative(x, k), wanted)
    if grid[0] % k or grid[1] % k:
        with pytest.raises(ValueError, match="needs a grid that K divides"):
            relative(x, k, "min")


def test_modulation_multiplies_a_context_and_takes_no_prefix() -> None:
    mixer, x, layout = built(ModulationConfig(e=2)), tokens(12), Layout(grid=(3, 4))
    context = mixer.context(x, (1, 3, 4))
    wanted = mixer.fc2(F.gelu(mixer.fc1(x)) * torch.cat([context, context], dim=-1))
    assert_close(mixer(x, layout=layout), wanted)
    with pytest.raises(ValueError, match="takes no prefix"):
        mixer(tokens(13), layout=Layout(grid=(3, 4), prefix=1))


def test_latents_take_shares_that_sum_to_one_and_pools_start_at_means() -> None:
    mixer, x = built(LatentConfig(m=4, source="pool", self_layers=0)), tokens(16)
    k = mixer.kv(x)[..., :D].unflatten(2, (HEADS, -1)).transpose(1, 2)
    start = mixer._start(x, Layout(grid=(4, 4)))
    assert_close(start[:, 0], x.view(3, 4, 4, D)[:, :2, :2].mean((1, 2)), rtol=1e-5, atol=1e-6)
    assert_close(mixer.weights(k, start).sum(-1), torch.ones(3, HEADS, 4), rtol=1e-5, atol=1e-5)
    assert mixer._start(tokens(32), Layout(grid=(2, 4, 4))).shape == (3, 8, D)


def test_heads_of_a_cascade_hand_their_results_on() -> None:
    mixer, x = built(CGAConfig(window=4, key_dim=3, kernels=3)), tokens(16)
    first, second = x.chunk(2, dim=-1)
    bias = mixer.bias_table((4, 4))
    one = mixer.heads[0](first, (4, 4), bias[:, :1])
    two = mixer.heads[1](second + one, (4, 4), bias[:, 1:])
    wanted = mixer.proj(F.relu(torch.cat([one, two], dim=-1)))
    assert_close(mixer(x, layout=Layout(grid=(4, 4))), wanted, rtol=1e-5, atol=1e-6)
    windows = built(CGAConfig(window=2, key_dim=3, kernels=3))
    corner = torch.tensor([0, 1, 4, 5])
    assert_close(windows(x, layout=Layout(grid=(4, 4)))[:, corner], windows.attended(x[:, corner], (2, 2)), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="takes no prefix"):
        mixer(tokens(17), layout=Layout(grid=(4, 4), prefix=1))


def test_channels_that_do_not_attend_pass() -> None:
    mixer, x = built(SHSAConfig(p=3, qk_dim=4)), tokens(5)
    changed = x.clone()
    changed[:, 0, 3:] += 1
    assert torch.equal(mixer(changed)[:, 1:], mixer(x)[:, 1:]) and not torch.equal(mixer(changed)[:, 0], mixer(x)[:, 0])
    changed[:, 0, :3] += 1
    assert not torch.equal(mixer(changed)[:, 1:], mixer(x)[:, 1:])


@pytest.mark.parametrize("kind", ["dw", "mhca", "pool"])
def test_convolutions_commute_with_shifts_away_from_the_border(kind: str) -> None:
    mixer, grid = built(ConvConfig(kind)), (7, 8)
    x = tokens(56)
    out = mixer(x, layout=Layout(grid=grid))
    moved = to_tokens(to_map(x, (1, *grid)).roll((1, 2), (2, 3)), 3)
    again = to_map(mixer(moved, layout=Layout(grid=grid)), (1, *grid)).roll((-1, -2), (2, 3))
    assert_close(again[:, :, 1:-2, 1:-3], to_map(out, (1, *grid))[:, :, 1:-2, 1:-3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        "conv(norm='bn') + bn_mlp",
        "conv_mlp(norm='bn')",
        "shsa(bn=True, p=4) + mlp",
        "reduced(kv='conv', norm='bn', q_conv=True) + mlp(gated=True)",
    ],
)
@pytest.mark.parametrize("norm", ["none", "bn"])
def test_folded_batch_norms_change_nothing(text: str, norm: str) -> None:
    torch.manual_seed(2)
    block = stack.build(text, D, heads=HEADS, norm=norm)[0]
    layout, x = Layout(grid=(3, 4)), tokens(12)
    for _ in range(3):
        block(x * 2 + 1, layout=layout)
    block.eval()
    folded = fold_batch_norms(block)
    assert_close(folded(x, layout=layout), block(x, layout=layout), rtol=1e-5, atol=1e-5)
    left = sum("running_mean" in key for key in folded.state_dict())
    kept = {"conv(norm='bn') + bn_mlp": 2}.get(text, 1)  # norms in front of a mixer; those in front of an MLP are folded too
    assert left < sum("running_mean" in key for key in block.state_dict()) and left == (norm == "bn") * kept


@pytest.mark.parametrize("text", ["window", "conv", "conv_mlp", "reduced", "latent(source='pool')", "retention(scan='cross')"])
def test_mixers_of_grids_name_what_they_need(text: str) -> None:
    mixer = stack.parse(text)[0][0].build(D, heads=HEADS)
    for layout in (None, Layout(), Layout(grid=(2, 2)), Layout(grid=(6,))):
        with pytest.raises(ValueError, match=r"needs layout.grid \(h, w\) or \(f, h, w\) of all 6 tokens"):
            mixer(tokens(6), layout=layout)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attention(pos_bias='table_abs')", "go together"),
        ("attention(pos_bias='table_abs', table=(2, 2), causal=True)", "needs keys='self'"),
        ("attention(local_v_conv=2)", "must be 0 or odd"),
        ("attention(local_v_conv=3, kv_heads=1)", "as many kv_heads"),
        ("window(size=4, shift=4)", "shift lie in 0 .. size - 1"),
        ("graph(K=0)", "K must be positive"),
        ("modulation(k=4)", "k odd"),
        ("modulation(k=())", "k odd"),
        ("cga(kernels=4)", "kernels odd"),
        ("cga(kernels=(3, 3, 3))", "one for each of 2"),
        ("conv(k=4)", "k must be odd"),
        ("reduced(r=0)", "r must be positive"),
        ("retention(chunk=0)", "chunk must be positive"),
        ("retention(softmax=True, decay='data')", "needs scan='forward'"),
        ("linear(chunk=0)", "chunk must be positive"),
        ("shsa(norm='gn1', causal=True)", "needs norm='rms' or 'ln'"),
        ("shsa(p=0)", "p and qk_dim be positive"),
        ("latent(m=5, source='pool')", "square number of latents"),
        ("latent(m=0)", "m must be positive"),
        ("bn_mlp(ratio=0)", "ratio must be positive"),
        ("conv_mlp(ratio=0)", "ratio must be positive"),
        ("conv_mlp(k=2)", "k must be odd"),
        ("shsa(p=9)", "got p=9, dim=8"),
        ("linear(heads=3)", "divisible by heads, got dim=8, heads=3"),
    ],
)
def test_options_out_of_range_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stack.build(text, D, heads=HEADS)


def test_groups_are_attention_of_each_group_and_one_group_is_attention() -> None:
    x = tokens(11)
    mixer, whole = built(GroupConfig(4)), built(GroupConfig(20))
    plain = built(AttentionConfig())
    for one in (mixer, whole):
        one.load_state_dict(plain.state_dict())
    assert_close(whole(x), plain(x), rtol=1e-5, atol=1e-6)
    out = mixer(x)
    assert group_places(11, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 7]]
    assert_close(out[:, 4:8], plain(x[:, 4:8]), rtol=1e-5, atol=1e-6)
    assert_close(out[:, 8:], plain(x[:, [8, 9, 10, 7]])[:, :3], rtol=1e-5, atol=1e-6)
    assert mixer(x[:, :0]).shape == (3, 0, D)


def test_snakes_run_to_and_fro_through_windows_of_each_sample() -> None:
    grid = torch.tensor([[x, y] for y in range(4) for x in range(4)], dtype=torch.float32)
    order = snake_order(grid, (2, 2))
    path = [tuple(row) for row in grid[order].int().tolist()]
    assert path[:4] == [(0, 0), (0, 1), (1, 1), (1, 0)] and path[8:10] == [(3, 2), (3, 3)], "the second row of windows runs back"
    turned = grid[snake_order(grid, (2, 2), axis=1)].flip(-1)
    assert torch.equal(turned, grid[order]), "along the other axis it is the same with the axes exchanged"
    assert grid[snake_order(grid, (2, 2), shift=True)][:1].tolist() == [[0, 0]] and not torch.equal(
        snake_order(grid, (2, 2), shift=True), order
    )
    both = torch.stack([grid, grid.flip(0)])
    assert torch.equal(both[0][snake_order(both, (2, 2))[0]], both[1][snake_order(both, (2, 2))[1]])
    same = torch.zeros(5, 2)
    assert snake_order(same, (2, 2)).tolist() == [0, 1, 2, 3, 4], "points at one place keep their order"


def test_morton_order_halves_the_space_again_and_again() -> None:
    grid = torch.cartesian_prod(*[torch.arange(4.0)] * 3)
    path = grid[morton_order(grid + 7.5, (1, 1))]
    assert path[:4].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    for size in (8, 32):
        for part in path.split(size):
            assert float((part.amax(0) - part.amin(0)).prod()) <= (1 if size == 8 else 9)


@pytest.mark.parametrize("options", [{"order": "snake", "window": (2, 2), "pos": "sincos"}, {"order": "morton", "window": (0.5, 0.5)}])
def test_groups_by_place_do_not_depend_on_the_order_of_the_tokens(options: Any) -> None:
    mixer, x = built(GroupConfig(4, **options)), tokens(11)
    pos = torch.rand(3, 11, 2, generator=torch.Generator().manual_seed(2)) * 8
    out, order = mixer(x, layout=Layout(pos=pos)), torch.randperm(11)
    assert_close(mixer(x[:, order], layout=Layout(pos=pos[:, order])), out[:, order], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="need pos or a grid"):
        mixer(x)


def test_published_blocks_of_fixed_size_refuse_others() -> None:
    block = FcaBlock(D, HEADS, (2, 3), 4, 16)
    out, summary = block(tokens(6), tokens(4))
    assert out.shape == (3, 6, D) and summary is not None and summary.shape == (3, 1, D)
    for call, message in (
        (lambda: block(tokens(7), tokens(4)), "must be"),
        (lambda: block(tokens(6)), "context must be 4 summaries, got None"),
        (lambda: block(tokens(6), tokens(3)), "must be"),
        (lambda: FcaBlock(D, 3, (2, 3), 0, 16), "divisible by heads"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    last = FcaBlock(D, HEADS, (2, 3), 0, 16, summarises=False)
    assert last(tokens(6))[1] is None
    wide = NextViTBlock(D, 24, attention_dim=16, head_dim=8, r=2, stride=1, hidden=32).eval()
    assert wide(tokens(15), layout=Layout(grid=(3, 5))).shape == (3, 15, 24)
    with pytest.raises(ValueError, match="no prefix"):
        wide(tokens(15), layout=Layout(grid=(2, 7), prefix=1))


def test_codes_agree_as_much_as_the_kernel_says_and_are_fitted_to_likeness() -> None:
    mixer, x = built(LinearConfig("hash", bits=6, anchors=5)), tokens(12)
    codes = mixer.hash(mixer.queries(x))
    assert set(codes.unique().tolist()) == {-1.0, 1.0}
    weight = codes @ codes.transpose(-2, -1) + 7
    assert bool((weight > 0).all())
    v = mixer.v(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
    wanted = mixer.proj((weight / weight.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))
    assert_close(mixer(x), wanted, rtol=1e-5, atol=1e-6)
    own = built(LinearConfig("hash", bits=6, anchors=5, compat=True))
    own.load_state_dict(mixer.state_dict())
    assert not torch.allclose(own(x), wanted, atol=1e-3), "as released, a token's own value stands for the sum"

    alike = mixer.fit_hash(x, torch.arange(5), extremes=3)
    assert alike.sum() == 0 and (alike == 1).sum() == 3 * HEADS * 12 * 3
    before, after = (float(((c @ c.transpose(-2, -1)) * alike).mean()) for c in (codes, mixer.hash(mixer.queries(x))))
    assert after > before
    with pytest.raises(ValueError, match="needs 5 anchors and at most 12 extremes, got 4 and 3"):
        mixer.fit_hash(x, torch.arange(4), extremes=3)
    with pytest.raises(ValueError, match="never causal"):
        LinearConfig("hash", causal=True)


@pytest.mark.parametrize("mode", ["parallel", "chained"])
def test_axial_kernels_act_along_each_axis(mode: str) -> None:
    grid, mixer = (2, 3, 4), built(AxialKernelConfig("fhw", mode))
    x, layout = tokens(24), Layout(grid=grid)
    v = mixer.v(x).view(3, *grid, HEADS, -1)
    means = mixer.fc_in(x).view(3, *grid, D)
    found: list[Tensor] = []
    for axis, (kernel, letters) in enumerate(
        zip(mixer.kernels, ("bhij,bjyzhc->biyzhc", "bhij,bxjzhc->bxizhc", "bhij,bxyjhc->bxyihc"), strict=True)
    ):
        pos = (torch.arange(grid[axis]) / grid[axis])[None, :, None]
        weights = kernel(means.mean([1 + i for i in range(3) if i != axis]), pos)
        found.append(torch.einsum(letters, weights, v if mode == "parallel" or not found else found[-1]))
    whole = torch.cat(found, dim=-1) if mode == "parallel" else found[-1]
    flat = whole.flatten(4).flatten(1, 3)
    normed = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    assert_close(mixer(x, layout=layout), mixer.fc2(F.gelu(mixer.fc1(normed))), rtol=1e-4, atol=1e-5)


def test_axial_kernels_read_coordinates_and_not_the_resolution() -> None:
    mixer, x = built(AxialKernelConfig(scale=1000)), tokens(6)  # so large that the norm is one
    pos = torch.cartesian_prod(torch.arange(2) / 2, torch.arange(3) / 3)[None]
    out = mixer(x, layout=Layout(grid=(2, 3)))
    assert_close(mixer(x, layout=Layout(grid=(2, 3), pos=pos)), out)
    assert not torch.allclose(mixer(x, layout=Layout(grid=(2, 3), pos=2 * pos)), out, atol=1e-3)
    finer = x.view(3, 2, 3, D).repeat_interleave(2, dim=1).flatten(1, 2)
    places = torch.cartesian_prod(torch.tensor([0.0, 0.0, 0.5, 0.5]), torch.arange(3) / 3)[None]
    assert_close(mixer(finer, layout=Layout(grid=(4, 3), pos=places))[:, :3], out[:, :3], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="needs a grid of the axes h, w"):
        mixer(x, layout=Layout(grid=(1, 2, 3)))
    with pytest.raises(ValueError, match="must be even"):
        AxialKernelConfig(head_dim=3, key_mult=1).build(D, heads=HEADS)


@pytest.mark.parametrize("score", ["paper", "released"])
def test_memory_layers_read_the_row_that_the_signs_name(score: str) -> None:
    torch.manual_seed(0)
    layer, x = MemoryLayer(6, 5, 3, score=score), tokens(4, d=6)
    wanted = torch.zeros(3, 4, 5)
    for b in range(3):
        for i in range(4):
            for t in range(2):
                z = x[b, i, 3 * t : 3 * t + 3]
                code = int("".join("1" if value >= 0 else "0" for value in z.tolist()), 2)
                sure = (
                    z.abs().sum().exp() / (2 * z.cosh()).prod() if score == "paper" else z.abs().sum() / (1 + (-2 * z.abs()).exp()).prod()
                )
                wanted[b, i] += sure * layer.tables[8 * t + code]
    assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)
    if score == "paper":
        large = layer.codes(1e4 * x)[1]
        assert bool(((large > 0) & (large <= 1)).all())
    with pytest.raises(ValueError, match="bits in 1 .. 16 divide the 6 inputs"):
        MemoryLayer(6, 5, 4)


def test_a_legendre_memory_holds_its_window_and_no_more() -> None:
    memory, theta, n = 12, 20.0, 60
    mixer = built(LMUConfig(memory, theta))
    signal = torch.sin(torch.arange(n) / 5.0)[None] + 1
    coefficients = mixer.remember(signal, torch.zeros(1, memory))[0][0, -1].double()
    places = torch.arange(1, int(theta)).double()
    polynomials = [torch.ones_like(places), 2 * places / theta - 1]  # shifted, of how long ago
    for k in range(1, memory - 1):
        polynomials.append(((2 * k + 1) * polynomials[1] * polynomials[k] - k * polynomials[k - 1]) / (k + 1))
    found = torch.stack(polynomials).T @ coefficients
    assert_close(found[3:], signal[0].double().flip(0)[3 : int(theta) - 1], rtol=0, atol=0.12)
    a, _ = legendre_system(memory, theta)
    assert float(torch.linalg.eigvals(a).abs().max()) < 1, "what is older fades"
    with pytest.raises(ValueError, match="must be positive"):
        LMUConfig(0)
