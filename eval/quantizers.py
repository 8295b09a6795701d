"""Quantizers side by side in one tokenizer recipe, each trained for the same time: how many codes live, and what that is worth.

    python eval/quantizers.py --train data/lowpoly/train.parquet --test data/lowpoly/test.parquet --minutes 5 --out runs/quantizers

Every quantizer trains `tokenizers/recipes/simvq_lowpoly.yaml` with latents of one width; after some steps as plain autoencoder its codes
start as draws from a normal distribution with the latents' mean and covariance, for all alike (FSQ has none to start). The number of
steps is what fits the minutes by the speed of the first ones. Utilisation and perplexity are those of all training views; PSNR and SSIM
of the test views, intervals 95 %, bootstrap over objects; the distance is Frechet's between training views and their reconstructions.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from _equal_time import train_for
from _views import tokenizer_figures

from genkit.pipelines.tokenizers import load_tokenizer

LEVELS = {1024: [8, 5, 5, 5], 65536: [8, 8, 8, 5, 5, 5]}  # FSQ's recommended grids of about that size


def options(name: str, codes: int, width: int) -> list[str]:
    """Return the overrides of the recipe for a quantizer.

    Raises:
        SystemExit: for a codebook that FSQ has no grid for.
    """
    if name == "fsq":
        if codes not in LEVELS:
            raise SystemExit(f"--codebooks {codes}: FSQ has grids for {', '.join(map(str, LEVELS))} codes.")
        quantizer = {"name": name, "options": {"levels": LEVELS[codes]}}
        return ["--task_config.quantizer", json.dumps(quantizer), "--task_config.quantize_after", "0"]
    own = {"revive_below": 1.0} if name == "ema_vq" else {}
    quantizer = {"name": name, "codebook_size": codes, "dim": width, "options": own}
    return ["--task_config.quantizer", json.dumps(quantizer), "--task_config.fit", "moments"]


def train(args: argparse.Namespace, name: str, codes: int) -> tuple[Path, int, float]:
    """Train one quantizer for the minutes asked for; return its tokenizer, steps and seconds."""
    overrides = ["--task_config.data", args.train, "--task_config.quantize_after", str(args.start), "--train.sample_every", "0"]
    overrides += options(name, codes, args.width)
    folder, steps, seconds = train_for("tokenizers/simvq_lowpoly", overrides, args.out / f"{name}-{codes}", args.minutes, args.start)
    return folder / "vqvae", steps, seconds


def rows(args: argparse.Namespace) -> Iterator[str]:
    """Train and measure everything; yield lines of the table."""
    yield f"latents of width {args.width}, {args.minutes:g} minutes each, {torch.get_num_threads()} threads"
    yield "| quantizer | codes | used | perplexity | PSNR, dB | SSIM | Frechet distance | steps | s |\n" + "|---" * 9 + "|"
    for codes in args.codebooks:
        for name in args.quantizers:
            folder, steps, seconds = train(args, name, codes)
            with torch.inference_mode():
                r = tokenizer_figures(load_tokenizer(str(folder)), args.train, args.test)
            live = f"{r['codes']:,} | {100 * r['utilisation']:.1f} % | {r['perplexity']:.0f}"
            yield f"| {name} | {live} | {r['psnr']} | {r['ssim']} | {r['distance']:.1f} | {steps:,} | {seconds:.0f} |"


def main() -> None:
    """Parse the command line, train, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="parquet file of the training views")
    parser.add_argument("--test", required=True, help="parquet file of the test views")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--quantizers", nargs="+", default=["simvq", "vq", "ema_vq", "fsq"])
    parser.add_argument("--codebooks", nargs="+", type=int, default=[1024, 65536])
    parser.add_argument("--width", type=int, default=32, help="of latents and codes (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training for each (default: %(default)s)")
    parser.add_argument("--start", type=int, default=100, help="steps without quantization (default: %(default)s)")
    args = parser.parse_args()
    for line in rows(args):
        print(line, flush=True)


if __name__ == "__main__":
    main()
