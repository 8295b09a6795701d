"""`genkit tokenizer-report`: what a tokenizer keeps of pictures, on a page: originals, reconstructions, errors, use of the codes."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

from genkit.cli._output import add_json, positive, print_json, progress_bar
from genkit.cli._sampling import check_out_folder
from genkit.cli.tokenize import add_tokenizer, open_both

HELP = "show what a tokenizer keeps of pictures, and which codes it uses"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("pictures", help="folder of pictures, parquet file of turntable views, or hub id")
    add_tokenizer(parser)
    add("--num-pictures", type=positive, default=1000, metavar="N", help="at most, spread over all (default: %(default)s)")
    add("--out", type=Path, default=Path("tokenizer.html"), metavar="FILE", help="page to write, a .html (default: %(default)s)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, write the page, print the figures."""
    if args.out.suffix.lower() != ".html":
        raise ValueError(f"--out must end in .html, got {str(args.out)!r}.")
    check_out_folder(args.out)
    model, data = open_both(args)
    import numpy as np
    import torch

    from genkit.eval.tokenizers import reconstruct_all, write_page
    from genkit.tokenizers.quantizers.stats import CodebookStats

    device, stats = next(model.parameters()).device, CodebookStats(model.quantizer.codebook_size)

    def reconstruct(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if args.tile is None:
            out = model(pictures.to(device))
            return out.sample, out.indices
        codes = model.tiled_encode(pictures.to(device), args.tile).indices
        return model.tiled_decode(codes, tile=args.tile).sample, codes

    numbers = np.unique(np.linspace(0, len(data) - 1, min(len(data), args.num_pictures)).astype(int)).tolist()
    began = time.perf_counter()
    with progress_bar(not args.json, "pictures") as bar:
        advance = None if bar is None else lambda done, total: bar(done, total, time.perf_counter() - began)
        found = reconstruct_all(reconstruct, data, numbers, stats.update, args.batch_size, advance)
    seconds = (time.perf_counter() - began) / len(numbers)
    values = figures(found, stats, seconds)
    title = f"{args.model} on {len(numbers):,} of {len(data):,} pictures of {args.pictures}"
    args.out.write_text(write_page(found, shown(values), stats.counts.cpu(), title), encoding="utf-8")
    if args.json:
        print_json({"page": str(args.out), "model": args.model, **values})
        return 0
    print("\n".join([title, *(f"  {name}: {value}" for name, value in shown(values).items()), f"wrote {args.out}"]))
    return 0


def figures(found: Any, stats: Any, seconds: float) -> dict[str, float]:
    """Return the figures of a report by name."""
    usage, pixels, tokens = stats.compute(), math.prod(found.size), math.prod(found.grid)
    return {
        "pictures": len(found.numbers), "height": found.size[0], "width": found.size[1], "rows": found.grid[0], "columns": found.grid[1],
        "psnr": float(found.psnr.mean()), "psnr_lowest": float(found.psnr.min()), "ssim": float(found.ssim.mean()),
        "codebook_size": stats.codebook_size, "utilisation": usage["utilisation"], "perplexity": usage["perplexity"],
        "bits_per_pixel": tokens * math.log2(stats.codebook_size) / pixels,
        "entropy_bits_per_pixel": tokens * usage["entropy_bits"] / pixels,
        "seconds_per_picture": seconds,
    }  # fmt: skip


def shown(values: dict[str, float]) -> dict[str, str]:
    """Return the figures as a person reads them."""
    v = values
    return {
        "pictures": f"{v['pictures']:,} of {v['height']}x{v['width']} pixels, {v['rows']}x{v['columns']} codes each",
        "PSNR": f"{v['psnr']:.2f} dB in the mean, {v['psnr_lowest']:.2f} dB at worst",
        "SSIM": f"{v['ssim']:.4f}",
        "codes used": f"{v['utilisation']:.1%} of {v['codebook_size']:,}, perplexity {v['perplexity']:.1f}",
        "bits a pixel": f"{v['bits_per_pixel']:.3f}, {v['entropy_bits_per_pixel']:.3f} by the entropy of single codes",
        "time": f"{1e3 * v['seconds_per_picture']:.1f} ms a picture, reading included",
    }
