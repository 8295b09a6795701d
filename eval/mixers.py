"""What token mixers buy a generator or a tokenizer: one recipe, its attention replaced, each variant trained for the same time.

    python eval/mixers.py nat --train data/lowpoly/train.parquet --minutes 8 --out runs/mixers --plot mixers.svg
    python eval/mixers.py tokenizer --train data/lowpoly/train.parquet --test data/lowpoly/test.parquet --minutes 5 --out runs/decoders

nat: `pipelines/recipes/nat_lowpoly.yaml` for classes, a caption of the data each, because most mixers cannot leave out the padding of a
text. Seconds of a picture are those of the whole call, one at a time, all networks in turn; the distance is Frechet's between pictures
(picture i is of class i modulo their number, with seed i) and the views that training saw, on EfficientNet-Lite0's features (not FID). A
variant with nested widths trains all of them and is measured at each. A second call goes on where the first was stopped.

tokenizer: `tokenizers/recipes/simvq_lowpoly.yaml`, its decoder's blocks replaced; see `eval/quantizers.py` for the figures.

The number of steps is what fits the minutes by the speed of the first ones. Losses of training are not compared, results are.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _equal_time import train_for
from _plots import line_chart
from _timing import machine, timed
from _views import ViewJudge, tokenizer_figures

from genkit import GenPipeline
from genkit.pipelines.tokenizers import load_tokenizer

MLP, NESTED = "mlp(ratio=2)", (0.25, 0.5, 1.0)
GENERATORS = {  # seven blocks, as the recipe's depth of 6 means
    "attention": f"(attention + {MLP}) * 7",
    "shsa": f"(shsa + {MLP}) * 7",
    "shsa, attention": f"(shsa + {MLP}, shsa + {MLP}, attention + {MLP}) * 2, shsa + {MLP}",
    "window, attention": f"window(8) + {MLP}, (attention + {MLP}, window(8) + {MLP}) * 3",
    "reduced": f"(reduced(r=2) + {MLP}) * 7",
    "linear": f"(linear + {MLP}) * 7",
    "retention": f"(retention(scan='bidir') + {MLP}) * 7",
    "attention, conv mlp": "(attention + conv_mlp(ratio=2)) * 7",
    "nested mlp": f"(attention + mlp(ratio=2, nested={NESTED})) * 7",
}
DECODERS = {  # four blocks
    "attention": "(attention + mlp(hidden=512)) * 4",
    "modulation": "modulation * 4",
    "cga": "(cga + mlp(hidden=512)) * 4",
}
VIEWS = [2, 14]  # of the recipe


def millions(model: torch.nn.Module) -> float:
    """Return the number of weights."""
    return sum(p.numel() for p in model.parameters()) / 1e6


def seconds(run: Callable[[int], object], count: int) -> float:
    """Return the median seconds of runs 0 .. count - 1, after one that does not count."""
    clocks = []
    for i in (0, *range(count)):
        began = time.perf_counter()
        run(i)
        clocks.append(time.perf_counter() - began)
    return statistics.median(clocks[1:])


@dataclass
class Row:
    """One network at one width: what is printed of it, and how it makes picture 0."""

    size: float
    distance: float
    trained: str
    run: Callable[[], torch.Tensor]


def generator(args: argparse.Namespace, name: str, stack: str) -> dict[str, Row]:
    """Train a NAT with a stack; return its rows, one for each width. Distances that were measured are read again."""
    nested, out = list(NESTED) if "nested" in stack else None, args.out / slug(name)
    overrides = ["--task_config.data", args.train, "--task_config.text_encoder", "null", "--task_config.tokenizer", "null"]
    overrides += ["--task_config.model.stack", stack, "--task_config.widths", json.dumps(nested)]
    overrides += ["--task_config.views", json.dumps(VIEWS), "--train.sample_every", "0", "--train.batch_size", str(args.batch_size)]
    folder, steps, took = train_for("pipelines/nat_lowpoly", overrides, out, args.minutes)
    pipe: Any = GenPipeline.from_pretrained(folder)
    classes, rows = len(pipe.id2label), {}
    for width in nested or [None]:

        @torch.no_grad()
        def make(chosen: range, width: float | None = width) -> torch.Tensor:
            *_, last = pipe.iterate([i % classes for i in chosen], generator=list(chosen), width=width)
            images: torch.Tensor = pipe.decode(last.sample).clamp(-1, 1)
            return images

        net = pipe.transformer if width is None else pipe.transformer.cut(width)
        distance = kept(out / f"distance-{width or 1:g}-{args.num_samples}.txt", partial(judged, args, make))
        row = name if width is None else f"{name}, {width:g}"
        rows[row] = Row(millions(net), distance, f"{steps:,} in {took / 60:.1f} min", partial(make, range(1)))
        print(f"{row}: {distance:.0f}", file=sys.stderr, flush=True)
    return rows


def judged(args: argparse.Namespace, make: Callable[[range], torch.Tensor]) -> float:
    """Return the distance of pictures to the views that training saw."""
    return ViewJudge(args.train, VIEWS).distance(make, args.num_samples)


def kept(path: Path, measure: Callable[[], float]) -> float:
    """Return the number of a file, which is measured and written where it is missing."""
    if not path.is_file():
        path.write_text(f"{measure()}\n", encoding="utf-8")
    return float(path.read_text(encoding="utf-8"))


def tokenizer(args: argparse.Namespace, name: str, stack: str) -> str:
    """Train a tokenizer with a stack in its decoder; return a row."""
    overrides = ["--task_config.data", args.train, "--task_config.decoder.stack", stack, "--train.sample_every", "0"]
    folder, steps, took = train_for("tokenizers/simvq_lowpoly", overrides, args.out / slug(name), args.minutes, skip=300)
    model: Any = load_tokenizer(str(folder / "vqvae"))
    picture = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    each, r = seconds(lambda _: model(picture), args.timed), tokenizer_figures(model, args.train, args.test)
    shown = f"{millions(model):.2f} | {1e3 * each:.1f} | {r['psnr']} | {r['ssim']} | {r['distance']:.1f}"
    return f"| {name} | {shown} | {steps:,} in {took / 60:.1f} min |"


def slug(name: str) -> str:
    """Return the folder of a variant."""
    return name.replace(", ", "-").replace(" ", "-")


def chosen(table: dict[str, str], names: list[str] | None) -> dict[str, str]:
    """Return the variants asked for.

    Raises:
        SystemExit: for names that there are none of.
    """
    unknown = sorted(set(names or ()) - set(table))
    if unknown:
        raise SystemExit(f"--variants: no {', '.join(unknown)}; there are {', '.join(map(repr, table))}.")
    return {name: stack for name, stack in table.items() if names is None or name in names}


def main() -> None:
    """Parse the command line, train, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("nat", "tokenizer"))
    parser.add_argument("--train", required=True, help="parquet file of the training views")
    parser.add_argument("--test", help="parquet file of the test views, for tokenizers")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--variants", nargs="+", help="some of the variants; all if left out")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training for each (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="of the generators' training (default: %(default)s)")
    parser.add_argument("--num-samples", type=int, default=620, help="pictures of each row (default: %(default)s)")
    parser.add_argument("--timed", type=int, default=20, help="runs whose seconds are measured (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="SVG file of the generators' distance against seconds")
    args = parser.parse_args()
    if args.kind == "tokenizer" and not args.test:
        parser.error("tokenizer needs --test.")
    print(f"{machine('cpu')}; {args.minutes:g} minutes each\n")
    if args.kind == "tokenizer":
        print("| decoder | M weights | ms per picture | PSNR, dB | SSIM | Frechet distance | steps |\n" + "|---" * 7 + "|")
        for name, stack in chosen(DECODERS, args.variants).items():
            print(tokenizer(args, name, stack), flush=True)
        return
    rows: dict[str, dict[str, Row]] = {name: generator(args, name, stack) for name, stack in chosen(GENERATORS, args.variants).items()}
    timings = timed({row: found.run for group in rows.values() for row, found in group.items()}, args.timed, "cpu")
    print("| mixer | M weights | s per picture | Frechet distance | steps |\n" + "|---" * 5 + "|")
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for name, group in rows.items():
        for row, found in group.items():
            clock = timings[row].clock
            each = statistics.median(clock)
            shown = f"{each:.3f} ({min(clock):.3f} .. {max(clock):.3f})"
            print(f"| {row} | {found.size:.2f} | {shown} | {found.distance:.0f} | {found.trained} |")
            lines.setdefault(name, []).append((each, found.distance, row.removeprefix(name).removeprefix(", ")))
    if args.plot:
        line_chart(args.plot, lines, "seconds per picture", "Frechet distance to real views", log_x=False)
        print(f"\n{args.plot}")


if __name__ == "__main__":
    main()
