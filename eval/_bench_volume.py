"""Volume decoders of a fitted shape VAE: seconds, share of the grid's points, peak memory, each in a process of its own."""

import multiprocessing
import resource
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any, cast

import torch
from _timing import machine

from genkit import GenPipeline
from genkit.data.shape_samples import meshes_of
from genkit.data.surfaces import normalised
from genkit.tokenizers.adaptive_kv import FlashDecoder
from genkit.tokenizers.volume_decoders import DenseDecoder, HierarchicalDecoder, ShapeQuery
from genkit.tokenizers.volume_grid import coordinates

MOST_DENSE = 20_000_000  # points; more are computed from the time of some
TIMED_POINTS = 400_000


def ways_of(has_slim: bool) -> list[tuple[str, str, Any]]:
    """Return (name, head, decoder)."""
    found = [
        ("dense", "base", DenseDecoder()),
        ("hierarchical, published band", "base", HierarchicalDecoder("band")),
        ("hierarchical, grow", "base", HierarchicalDecoder()),
        ("flash, mean, band", "base", FlashDecoder()),
        ("flash, mean, grow", "base", FlashDecoder(rule="grow")),
        ("flash, mass, grow", "base", FlashDecoder("mass", rule="grow")),
    ]
    slim = [("slim, grow", "slim", HierarchicalDecoder()), ("slim, flash, mean, grow", "slim", FlashDecoder(rule="grow"))]
    return found + (slim if has_slim else [])


def run_way(
    sender: Connection,
    model: str,
    data: str,
    shape: int,
    head: str,
    decoder: Any,
    resolution: int,
    threads: int,
    repeats: int,
    device: str,
    dtype: str,
) -> None:
    """Decode one shape and send (seconds, evaluated share, peak bytes, whether seconds are computed from some points)."""
    if threads:
        torch.set_num_threads(threads)
    pipe: Any = GenPipeline.from_pretrained(model)
    with torch.no_grad():
        centred, _, _ = normalised(meshes_of(data)[shape][1]())
        pipe.to(device)
        if dtype != "float32":
            pipe.to(getattr(torch, dtype))
        vae = pipe.vae_of(head)
        tokens = vae.decode(pipe.encode(centred, 0))[0]
        before = peak(device)
        clocks, share, scaled = [], 1.0, False
        total = (resolution + 1) ** 3
        if isinstance(decoder, DenseDecoder) and total > MOST_DENSE:
            query, scaled = ShapeQuery(vae, tokens, decoder.num_chunks), True
            points = coordinates(torch.arange(TIMED_POINTS, device=device) * (total // TIMED_POINTS), resolution, decoder.bound)
        for _ in range(repeats):
            began = time.perf_counter()
            if scaled:
                query(points)
            else:
                field = decoder(vae, tokens, resolution)
                share = field.evaluations / (field.resolution + 1) ** 3
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            clocks.append((time.perf_counter() - began) * (total / TIMED_POINTS if scaled else 1.0))
    sender.send((clocks, share, max(peak(device) - before, 0), scaled))


def peak(device: str) -> int:
    """Return the most bytes that were in use so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def volume(
    model: str,
    data: str,
    shape: int = 0,
    resolutions: tuple[int, ...] = (128, 256, 384),
    device: str = "cpu",
    dtype: str = "float32",
    threads: int = 0,
    repeats: int = 1,
    ways: tuple[str, ...] = (),
) -> None:
    """Time the decoders on one shape.

    Args:
        model: fitted shape VAE with an encoder: packaged name, folder or official file.
        data: parquet file with meshes, or folder of mesh files.
        shape: number of the mesh.
        resolutions: cells of the grid a side.
        device: cpu or cuda.
        dtype: of the weights.
        threads: CPU threads; 0 leaves PyTorch's choice.
        repeats: timed runs; the median counts.
        ways: names of those to time; all if left out.
    """
    context = multiprocessing.get_context("spawn")
    has_slim = cast(Any, GenPipeline.from_pretrained(model)).slim_vae is not None
    print(f"{model}, {dtype}; {machine(device)}; {threads or torch.get_num_threads()} threads in each process")
    for resolution in resolutions:
        print(f"\n{resolution}^3 cells")
        first = None
        for name, head, decoder in ways_of(has_slim):
            if ways and name not in ways:
                continue
            receiver, sender = context.Pipe(duplex=False)
            arguments = (sender, model, data, shape, head, decoder, resolution, threads, repeats, device, dtype)
            process = context.Process(target=run_way, args=arguments)
            process.start()
            sender.close()
            try:
                clocks, share, memory, scaled = receiver.recv()
            except EOFError:
                raise SystemExit(f"{name} at {resolution} failed, see above.") from None
            process.join()
            seconds = statistics.median(clocks)
            first = seconds if first is None else first
            spread = f"{min(clocks):.2f} .. {max(clocks):.2f}"
            note = f", from {TIMED_POINTS:,} points" if scaled else ""
            cost = f"{100 * share:5.1f} % of the points; {memory / 1e9:.2f} GB more"
            print(f"{name:30} {seconds:9.2f} s ({spread}{note}), {first / seconds:6.1f}x; {cost}")
