"""What reusing features buys a masked-token generator: NAT and ENAT of equal training, and ENAT without its reuse, at several steps.

    python eval/reuse.py --nat runs/nat-lowpoly/export --enat runs/enat-short/export --train data/lowpoly/train.parquet --plot reuse.svg

Per picture: multiply-accumulates of the generator (matrix products and attention, counted while it runs; tokenizer and text encoder left
out), seconds of the whole call, one at a time, and the Frechet distance of all pictures to the real views, on EfficientNet-Lite0's features
(not FID). Picture i has prompt i modulo their number and seed i for every row. Without reuse the network starts anew at every step.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _plots import line_chart
from _timing import machine
from _views import SOURCE, ViewJudge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from genkit import GenPipeline
from genkit.blocks import fast_linear
from genkit.data.prompts import PromptBuilder

STEPS = (4, 8, 12, 16)


def pictures(pipe: Any, prompts: list[str], seeds: list[int], steps: int, reuse: bool) -> torch.Tensor:
    """Return pictures [b, 3, h, w] in [-1, 1]."""
    state = None
    for state in pipe.iterate(prompts, generator=seeds, num_inference_steps=steps):
        if not reuse:
            state.features = [None] * len(state.features)
    images: torch.Tensor = pipe.decode(state.sample).clamp(-1, 1)  # type: ignore[union-attr]
    return images


@contextmanager
def countable() -> Iterator[None]:
    """Let all products run as operations that torch's counter knows."""
    real = fast_linear.is_worthwhile
    fast_linear.is_worthwhile = lambda: False  # type: ignore[assignment]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        fast_linear.is_worthwhile = real


def work(pipe: Any, prompt: str, steps: int, reuse: bool) -> float:
    """Return the multiply-accumulates of the generator for one picture."""
    states = pipe.iterate([prompt], generator=[0], num_inference_steps=steps)  # encodes the prompt
    with countable(), FlopCounterMode(display=False) as counter:
        for state in states:
            if not reuse:
                state.features = [None] * len(state.features)
    return counter.get_total_flops() / 2


@torch.no_grad()
def main() -> None:
    """Parse the command line, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nat", required=True, help="pipeline with the plain transformer")
    parser.add_argument("--enat", required=True, help="pipeline with ENAT")
    parser.add_argument("--train", required=True, help="parquet file of the training views")
    parser.add_argument("--views", nargs="*", type=int, help="views of the reference; all if left out")
    parser.add_argument("--num-samples", type=int, default=620)
    parser.add_argument("--timed", type=int, default=20, help="pictures whose seconds are measured, one at a time (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=62)
    parser.add_argument("--plot", type=Path, help="SVG file of the distance against the work")
    args = parser.parse_args()
    judge = ViewJudge(args.train, args.views)
    builder = PromptBuilder.from_views(judge.views)
    prompts = [builder.plain(o) for o in range(judge.views.num_objects)]
    nat, enat = (GenPipeline.from_pretrained(name) for name in (args.nat, args.enat))
    ways = {"NAT": (nat, False), "ENAT without reuse": (enat, False), "ENAT": (enat, True)}
    print(f"{machine('cpu')}; {judge.count} real views, {args.num_samples} of each row; features {SOURCE}\n")
    print("| generator | steps | multiply-accumulates, G | s per picture | Frechet distance |\n|---|---|---|---|---|")
    lines: dict[str, list[tuple[float, float, str]]] = {name: [] for name in ways}
    for name, (pipe, reuse) in ways.items():
        for steps in STEPS:
            macs, clocks = work(pipe, prompts[0], steps, reuse) / 1e9, []
            for i in range(args.timed):
                began = time.perf_counter()
                pictures(pipe, [prompts[i % len(prompts)]], [i], steps, reuse)
                clocks.append(time.perf_counter() - began)

            def make(chosen: range, pipe: Any = pipe, steps: int = steps, reuse: bool = reuse) -> torch.Tensor:
                return pictures(pipe, [prompts[i % len(prompts)] for i in chosen], list(chosen), steps, reuse)

            distance = judge.distance(make, args.num_samples, args.batch_size)
            print(f"| {name} | {steps} | {macs:.2f} | {sorted(clocks)[len(clocks) // 2]:.3f} | {distance:.0f} |", flush=True)
            lines[name].append((macs, distance, str(steps)))
    if args.plot:
        line_chart(args.plot, lines, "multiply-accumulates of the generator per picture, G", "Frechet distance to real views")
        print(f"\n{args.plot}: numbers beside the points are steps")


if __name__ == "__main__":
    main()
