"""Time and memory of token and channel mixers at several numbers of tokens, beside attention."""

import statistics

import torch
from _timing import growth, in_own_process, machine, timed
from torch import nn

from genkit.blocks import stack
from genkit.blocks.layout import Layout

MIXERS = (
    "attention", "attention(causal=True)", "axial('h')", "window(8)", "window(size=8, shift=4)", "reduced(r=2)", "reduced(r=4)",
    "reduced(kv='conv', q_conv=True)", "cga", "shsa", "latent", "linear", "linear(causal=True)", "retention", "retention(scan='bidir')",
    "retention(decay='data', gate=True)", "conv", "conv(k=7)", "conv(kind='mhca')", "conv(kind='pool')",
    "graph", "modulation", "modulation(e=4)", "group", "group(order='snake')", "axial_kernel", "linear(feature='hash')", "lmu",
    "mlp", "mlp(ratio=2)", "mlp(ratio=1)", "conv_mlp", "memory",
)  # fmt: skip


def blocks(
    tokens: list[int] | None = None, dim: int = 384, heads: int = 6, mixers: list[str] | None = None, backward: bool = False,
    repeats: int = 5, threads: int | None = None, device: str = "cpu", dtype: str = "float32", memory: bool = True,
) -> None:  # fmt: skip
    """Time every mixer alone, projections included, without norm and residual.

    Args:
        tokens: numbers of tokens, squares of even sides; 256, 1,024 and 4,096 if None.
        dim: width.
        heads: of mixers that have some.
        mixers: as in a stack string; all if None.
        backward: with the backward pass.
        repeats: timed runs of each.
        threads: of PyTorch; its choice if None.
        device: cpu or cuda.
        dtype: of weights and tokens.
        memory: also measure the peak memory that a mixer adds at the largest number of tokens, in a process of its own (CPU, on Linux), or
            as CUDA counts it.
    """
    if threads:
        torch.set_num_threads(threads)
    texts, counts = mixers or list(MIXERS), tokens or [256, 1024, 4096]
    print(f"{machine(device)}, {dtype}, width {dim}, {heads} heads, {'forward + backward' if backward else 'forward'}, median of {repeats}")
    rows: dict[str, list[str]] = {text: [text, f"{_parameters(text, dim, heads):.2f}"] for text in texts}
    for n in counts:
        ways = {text: _run(text, n, dim, heads, backward, device, dtype) for text in texts}
        timings = timed(ways, repeats, device)
        base = statistics.median(next(iter(timings.values())).clock)
        for text, timing in timings.items():
            clock = statistics.median(timing.clock)
            rows[text] += [f"{1e3 * clock:.2f} ({1e3 * min(timing.clock):.2f} .. {1e3 * max(timing.clock):.2f})", f"{base / clock:.2f}x"]
    if memory:
        for text in texts:
            rows[text].append(f"{_memory(text, counts[-1], dim, heads, backward, device, dtype):.0f}")
    head = ["mixer", "M weights", *(part for n in counts for part in (f"{n:,} tokens, ms", "x")), *(["MB"] if memory else [])]
    for row in (head, ["---"] * len(head), *rows.values()):
        print("| " + " | ".join(row) + " |")


def mixer_alone(text: str, dim: int, heads: int) -> nn.Module:
    """Return a mixer alone."""
    torch.manual_seed(0)
    return stack.parse(text)[0][0].build(dim, heads=heads)


def _parameters(text: str, dim: int, heads: int) -> float:
    """Return the weights of a mixer in millions."""
    return sum(parameter.numel() for parameter in mixer_alone(text, dim, heads).parameters()) / 1e6


def _run(text: str, n: int, dim: int, heads: int, backward: bool, device: str, dtype: str):  # type: ignore[no-untyped-def]
    """Return what one timed run of a mixer does."""
    side = round(n**0.5)
    if side * side != n:
        raise SystemExit(f"tokens must be squares such as 1024, got {n}.")
    mixer = mixer_alone(text, dim, heads).to(device, getattr(torch, dtype))
    x = torch.randn(1, n, dim, device=device, dtype=getattr(torch, dtype), requires_grad=backward)

    def run() -> torch.Tensor:
        with torch.set_grad_enabled(backward):
            out = mixer(x, layout=Layout(grid=(side, side)))
        if backward:
            mixer.zero_grad(set_to_none=True)
            out.sum().backward()
        return out.detach()

    return run


def _memory(text: str, n: int, dim: int, heads: int, backward: bool, device: str, dtype: str) -> float:
    """Return the MB that a run of a mixer adds to what its weights and tokens take."""
    if device.startswith("cuda"):
        run = _run(text, n, dim, heads, backward, device, dtype)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    return in_own_process("_bench_blocks", f"peak({text!r}, {n}, {dim}, {heads}, {backward}, {dtype!r}, {torch.get_num_threads()})")


def peak(text: str, n: int, dim: int, heads: int, backward: bool, dtype: str, threads: int) -> float:
    """Return the MB by which this process grows at most while a mixer runs, its kernels being loaded by a small run before (Linux)."""
    torch.set_num_threads(threads)
    _run(text, 64, dim, heads, backward, "cpu", dtype)()
    return growth(_run(text, n, dim, heads, backward, "cpu", dtype))
