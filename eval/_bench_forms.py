"""Mixers as their released code computes them against the form here: the same weights, the same numbers, other time and memory."""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from _bench_blocks import mixer_alone
from _timing import growth, in_own_process, machine, timed
from torch import Tensor

from genkit.blocks import attention, cga, graph, reduced, shsa
from genkit.blocks.bias_table import BiasTable
from genkit.blocks.hash_attention import KernelHash
from genkit.blocks.layout import Layout

Patch = tuple[Any, str, Callable[..., Tensor]]


def softmax_matrix(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None, **_: object) -> Tensor:
    """Attend by a matrix of all pairs; biases are added."""
    logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (logits if bias is None else logits + bias).softmax(-1) @ v


_PLACES: dict[tuple[int, int], Tensor] = {}


def gathered_table(table: BiasTable, grid: tuple[int, int], prefix: int = 0) -> Tensor:
    """Gather every pair's bias by its index, which is made once, in every call."""
    if grid not in _PLACES:
        rows, columns = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
        down, across = ((axis[:, None] - axis).abs() for axis in (rows, columns))
        _PLACES[grid] = down * table.sides[1] + across
    return table.table.flatten(1)[:, _PLACES[grid]][None]


def distance_tensor(code: KernelHash, q: Tensor) -> Tensor:
    """Take distances to anchors from a tensor of all differences."""
    distances = (q[..., None, :] - code.anchors[:, :, None]).square().sum(-1)
    return torch.exp(-distances / (2 * distances.mean((-2, -1), keepdim=True)))


def rolled_differences(x: Tensor, k: int, method: str = "auto") -> Tensor:
    """Take the largest of all differences to a map that is rolled, channels in front in memory."""
    x = x.contiguous()
    found = torch.zeros_like(x)
    for axis in (2, 3):
        for shift in range(k, x.shape[axis], k):
            found = torch.maximum(found, x - x.roll(shift, axis))
    return found


def _forms(n: int) -> dict[str, tuple[Any, ...]]:
    """Return name -> (what is released, mixer here, what is put in place of its functions, another mixer if that computes it)."""
    side = math.isqrt(n)
    table = f"attention(pos_bias='table_abs', table=({side}, {side}))"
    return {
        "attention": ("softmax matrix", "attention", [(attention, "attend", softmax_matrix)]),
        "attention, table": (
            "softmax matrix, table gathered every call", table,
            [(attention, "attend", softmax_matrix), (BiasTable, "forward", gathered_table)],
        ),
        "shsa": ("softmax matrix", "shsa", [(shsa, "attend", softmax_matrix)]),
        "cga, whole grid": ("softmax matrix", f"cga({side})", [(cga, "attend", softmax_matrix)]),
        "reduced(r=2)": ("softmax matrix", "reduced(r=2)", [(reduced, "attend", softmax_matrix)]),
        "graph": ("difference to a rolled map for every neighbour", "graph", [(graph, "relative", rolled_differences)]),
        "retention": ("one matrix of all tokens", "retention", [], f"retention(chunk={n})"),
        "linear(feature='hash')": ("tensor of differences", "linear(feature='hash')", [(KernelHash, "similarities", distance_tensor)]),
    }  # fmt: skip


@contextlib.contextmanager
def _patched(patches: Sequence[Patch]) -> Iterator[None]:
    with contextlib.ExitStack() as exits:
        for where, name, other in patches:
            exits.enter_context(mock.patch.object(where, name, other))
        yield


def _ways(name: str, n: int, dim: int, heads: int) -> dict[str, Callable[[], Tensor]]:
    """Return the runs of a mixer: as released, as here; with the same weights."""
    _, here, patches, *other = _forms(n)[name]
    ours, released = mixer_alone(here, dim, heads), mixer_alone(*other or [here], dim, heads)
    x, side = torch.randn(1, n, dim), math.isqrt(n)

    @torch.no_grad()
    def as_released() -> Tensor:
        with _patched(patches):
            found: Tensor = released(x, layout=Layout(grid=(side, side)))
        return found

    @torch.no_grad()
    def as_here() -> Tensor:
        found: Tensor = ours(x, layout=Layout(grid=(side, side)))
        return found

    return {"released": as_released, "here": as_here}


def peak(name: str, way: str, n: int, dim: int, heads: int, threads: int) -> float:
    """Return the MB by which this process grows at most during a second run (Linux)."""
    torch.set_num_threads(threads)
    _ways(name, 64, dim, heads)[way]()
    run = _ways(name, n, dim, heads)[way]
    return growth(run)


def forms(tokens: list[int] | None = None, dim: int = 384, heads: int = 6, repeats: int = 5, threads: int | None = None) -> None:
    """Time mixers as released and as here, and measure the memory of both at the largest number of tokens.

    Args:
        tokens: numbers of tokens, squares of even sides; 1,024 and 4,096 if None.
        dim: width.
        heads: of mixers that have some.
        repeats: timed runs of each.
        threads: of PyTorch; its choice if None.
    """
    if threads:
        torch.set_num_threads(threads)
    counts = tokens or [1024, 4096]
    print(f"{machine('cpu')}, float32, width {dim}, {heads} heads, forward, median of {repeats}; milliseconds released / here")
    head = ["mixer", "as released", *(part for n in counts for part in (f"{n:,}", "x")), f"MB at {counts[-1]:,}", "difference"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name, (what, *_) in _forms(counts[0]).items():
        cells, apart = [], 0.0
        for n in counts:
            released, here = timed(_ways(name, n, dim, heads), repeats, "cpu").values()
            middle = [statistics.median(way.clock) for way in (released, here)]
            spread = " / ".join(f"{1e3 * m:.1f} ({1e3 * min(w.clock):.1f} .. {1e3 * max(w.clock):.1f})"
                                for m, w in zip(middle, (released, here), strict=True))  # fmt: skip
            cells += [spread, f"{middle[0] / middle[1]:.2f}x"]
            assert released.result is not None and here.result is not None
            apart = max(apart, float((released.result - here.result).norm() / here.result.norm()))
        at = f"{counts[-1]}, {dim}, {heads}, {torch.get_num_threads()}"
        cells.append(" / ".join(f"{in_own_process('_bench_forms', f'peak({name!r}, {way!r}, {at})'):.0f}" for way in ("released", "here")))
        print(f"| `{name}` | {what} | " + " | ".join(cells) + f" | {apart:.0e} |", flush=True)
