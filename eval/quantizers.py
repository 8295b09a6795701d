"""Quantizers side by side in one tokenizer recipe, each trained for the same time: how many codes live, and what that is worth.

    python eval/quantizers.py --train data/lowpoly/train.parquet --test data/lowpoly/test.parquet --minutes 5 --out runs/quantizers

Every quantizer trains `tokenizers/recipes/simvq_lowpoly.yaml` with latents of one width; after some steps as plain autoencoder its codes
start as draws from a normal distribution with the latents' mean and covariance, for all alike (FSQ has none to start). The number of
steps is what fits the minutes by the speed of the first ones. Utilisation and perplexity are those of all training views; PSNR and SSIM
of the test views, intervals 95 %, bootstrap over objects; the distance is Frechet's between training views and their reconstructions.
"""

import argparse
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from genkit.data.views import ViewDataset
from genkit.eval.assets import bootstrap_mean, reconstruction_features, statistics_of
from genkit.eval.features import FeatureNetwork
from genkit.eval.frechet import frechet_distance
from genkit.paths import recipes_dir
from genkit.pipelines.tokenizers import load_tokenizer
from genkit.tokenizers.quantizers.stats import CodebookStats
from genkit.training import launch
from genkit.training.loop import Trainer

LEVELS = {1024: [8, 5, 5, 5], 65536: [8, 8, 8, 5, 5, 5]}  # FSQ's recommended grids of about that size
PROBE = 20  # steps that tell the speed
SIDE = 64


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
    recipe = launch.read_recipe(recipes_dir() / "tokenizers" / "recipes" / "simvq_lowpoly.yaml")
    out = args.out / f"{name}-{codes}"
    common = ["--task_config.data", args.train, "--task_config.quantize_after", str(args.start), "--train.sample_every", "0"]
    common += options(name, codes, args.width)
    def run(folder: Path, steps: int, until: int | None = None) -> float:
        overrides = [*common, "--train.out", str(folder), "--train.steps", str(steps), "--train.warmup", str(min(100, steps))]
        name, task_config, config = launch.resolve(recipe, None, overrides)
        return Trainer(importlib.import_module(f"genkit.tasks.{name}").build(task_config), config).run(until=until).seconds

    before = args.start + 5
    run(out / "probe", before + PROBE, before)
    each = run(out / "probe", before + PROBE) / PROBE  # of the steps with codes
    steps = max(before, round(args.minutes * 60 / each))
    return out / "run" / "export" / "vqvae", steps, run(out / "run", steps)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the figures of a tokenizer."""
    model, network, source = load_tokenizer(str(folder)), FeatureNetwork("efficientnet-lite0", size=SIDE), "efficientnet-lite0"

    def reconstruct(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = model(x)
        return out.sample, out.indices

    real, fake, codes, *_ = reconstruction_features(network, ViewDataset(args.train, SIDE), reconstruct)
    stats = CodebookStats(model.quantizer.codebook_size)
    stats.update(codes)
    test = ViewDataset(args.test, SIDE)
    *_, psnr, ssim = reconstruction_features(network, test, reconstruct)
    objects = [test.object_of(i) for i in range(len(test))]
    return {
        "codes": model.quantizer.codebook_size, **{key: stats.compute()[key] for key in ("utilisation", "perplexity")},
        "psnr": bootstrap_mean(psnr, objects), "ssim": bootstrap_mean(ssim, objects),
        "distance": frechet_distance(statistics_of(real, source), statistics_of(fake, source)),
    }  # fmt: skip


def rows(args: argparse.Namespace) -> Iterator[str]:
    """Train and measure everything; yield lines of the table."""
    yield f"latents of width {args.width}, {args.minutes:g} minutes each, {torch.get_num_threads()} threads"
    yield "| quantizer | codes | used | perplexity | PSNR, dB | SSIM | Frechet distance | steps | s |\n" + "|---" * 9 + "|"
    for codes in args.codebooks:
        for name in args.quantizers:
            folder, steps, seconds = train(args, name, codes)
            with torch.inference_mode():
                r = measure(args, folder)
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
